"""The measured figures, `results/*.json`: what SPEED.md is made from, and outside checks read."""

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "vllm", "liger-kernel")


def versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def card() -> str:
    """The GPU's name, with how many there are if more than one; `cpu` without."""
    if not torch.cuda.is_available():
        return "cpu"
    count = torch.cuda.device_count()
    return (f"{count} x " if count > 1 else "") + torch.cuda.get_device_name()


def record(file: Path, rows: list[dict], command: str) -> None:
    """
    Write figures to `file`, in place of those of the same names there; others stay.

    Args:
        rows (`list[dict]`): `name`, `value`, `unit`, and `baseline`: what it is a ratio to, or measured beside, in
            words (`None` for a plain figure). Other keys are kept.
        command (`str`): gives them again.
    """
    there = json.loads(file.read_text()) if file.is_file() else []
    made = [{**row, "card": card(), "command": command, "versions": versions()} for row in rows]
    names = {row["name"] for row in made}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([row for row in there if row["name"] not in names] + made, indent=1) + "\n")
