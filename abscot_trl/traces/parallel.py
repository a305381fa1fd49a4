"""Shares of a work, and processes side by side, each with GPUs of its own."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml

from abscot_trl.errors import Refused
from abscot_trl.processes import start


def parse_shard(shard: str | None) -> tuple[int, int]:
    """
    `2/8` as (2, 8); `None` as (1, 1).

    Raises:
        Refused: anything else.
    """
    if shard is None:
        return 1, 1
    index, _, count = shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise Refused(f"shard {shard!r} is not of the form 2/8 (the second of eight)")
    return int(index), int(count)


def visible_gpus() -> list[str]:
    """As `CUDA_VISIBLE_DEVICES` names them."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    return [name for name in names.split(",") if name]


def run_jobs(jobs: list[dict], gpus: list[list[str]]) -> None:
    """
    `abscot traces` with each of the settings, all at once.

    Args:
        gpus (`list[list[str]]`): what each of them sees; an empty list leaves it to the environment.

    Raises:
        Refused: a process failed.
    """
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number, settings in enumerate(jobs):
                config = Path(folder) / f"{number}.yaml"
                config.write_text(yaml.safe_dump(settings))
                visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpus[number])} if gpus[number] else {}
                command = [sys.executable, "-m", "abscot_trl.scripts.traces", "--config", str(config)]
                processes.append(start(command, env=os.environ | visible, stdout=subprocess.DEVNULL))
            failed = sum(process.wait() != 0 for process in processes)
        finally:
            for process in processes:
                process.terminate()
    if failed:
        raise Refused(f"{failed} of {len(jobs)} processes failed, see above; the same command goes on from here")
