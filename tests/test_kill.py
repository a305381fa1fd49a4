"""A run of two rounds killed over and over ends in the files of one that never was."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from kill_table import ENVIRONMENT, Cell, Table, contents
from warmups import LORA, NODES, recipes, toy_fields

from abscot_trl.errors import Refused
from abscot_trl.loop.warmup import WarmupArguments, warmup

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def killed(checkpoint, tmp_path_factory):
    """By `keep`: a run of two rounds by LoRA, one round of full fine-tuning; its fields, folder and what was found."""
    given = {}
    for keep, tuning in (("all", LORA), ("last", {})):
        folder = tmp_path_factory.mktemp(keep)
        training = tuning | {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
        fields = toy_fields(checkpoint, folder) | recipes(folder, str(folder / "test.jsonl"), training)
        fields |= {"run_dir": "run", "keep": keep, "rounds": 2 if keep == "all" else 1}
        given[keep] = {"fields": fields, "folder": str(folder), "seed": 0}
    script = Path(__file__).with_name("kill_run.py")
    done = subprocess.run(
        [sys.executable, str(script), *map(json.dumps, given.values())], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = map(json.loads, done.stdout.splitlines()[-2:])
    return {keep: (one["fields"], Path(one["folder"]), next(found)) for keep, one in given.items()}


@pytest.mark.parametrize("keep", ["all", "last"])
def test_killed_again_and_again(killed, keep):
    fields, tmp_path, found = killed[keep]
    log = (tmp_path / "killed.jsonl").read_text()
    events = [json.loads(line)[:2] for line in log.splitlines()]
    assert not [event for event in events if event[0] == "error"] and set(found["codes"]) <= {-9, 0}
    assert found["kills"] >= 3 * len(found["stages"]) and (found["last"], found["again"]) == (0, 0)
    if keep == "all":
        assert found["kills"] >= 20 and len(found["stages"]) == 14
    whole, killed = (contents(tmp_path / name / "run") for name in ("whole", "killed"))
    assert killed == whole
    # Training went on from checkpoints, and no stage began again once the one after it had.
    assert any(kind == "resume" for kind, _ in events)
    started = [what for kind, what in events if kind == "start"]
    assert [stage for i, stage in enumerate(started) if i == 0 or started[i - 1] != stage] == found["stages"]
    # What was whole but lacked its manifest is not made again.
    assert Counter(what for kind, what in events if kind == "end") == dict.fromkeys(found["stages"], 1)
    # No row lost or repeated.
    rows = [
        json.loads(line)["row"]
        for path in (tmp_path / "killed" / "run").glob("round*/*-traces/traces.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert len(rows) == len(set(rows)) == 2 * fields["rounds"] * fields["rows_per_phase"]
    if keep == "last":
        assert sorted(path.parent.name for path in (tmp_path / "killed").rglob("model.safetensors")) == ["distill"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Phase A by LoRA in two ranks, whole and with kills; its traces and codes are made once, in this process."""
    table = Table(tmp_path_factory.mktemp("table"), until="round1/bottleneck")
    table.prepare()
    fields = yaml.safe_load((table.folder / "warmup.lora.2.yaml").read_text())
    fields |= {"launch": "inline", "until": "round1/codes"}
    with contextlib.chdir(table.fresh("begun")):
        warmup(WarmupArguments(**fields))
    table.run_whole("lora", 2)
    yield table
    table.watch.ended = True


def test_a_part_of_the_table_of_kills(table):
    """Real processes under accelerate; the whole table, with full fine-tuning and one rank: tests/kill_table.py."""
    driver, launcher = Cell("driver", "SIGKILL", "lora", 2, "seal"), Cell("launcher", "SIGTERM", "lora", 2, "seal")
    row = table.run_cell(driver, 0, then=launcher)
    assert row["right"] and len(row["rerun_codes"]) == row["reruns"] == 2 and row["rerun_codes"][0] != 0, row
    assert row["gone_s"] < 60  # torchrun gives ranks 30 s


def of_attempt(attempt: str) -> dict[int, tuple[str, str]]:
    """Processes that carry `ABSCOT_ATTEMPT`: their node and what they run."""
    found = {}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
            pairs = dict(entry.partition("=")[::2] for entry in environment)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if pairs.get("ABSCOT_ATTEMPT") == attempt and state not in "ZX":
            found[int(pid)] = pairs.get("NODE", ""), command
    return found


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


def test_two_nodes_end_in_the_files_of_one(table, monkeypatch):
    """A rank of the second node is killed: the driver says so, and goes on from there. (More: tests/test_nodes.py.)"""
    monkeypatch.chdir(table.fresh("nodes"))
    for name, value in (ENVIRONMENT | {"ABSCOT_ATTEMPT": "1"}).items():
        monkeypatch.setenv(name, value)
    config = yaml.safe_load((table.folder / "accelerate.2.yaml").read_text())
    Path("two.yaml").write_text(yaml.safe_dump(config | {"main_process_port": free_port()}))
    two = yaml.safe_load((table.folder / "warmup.lora.2.yaml").read_text())
    two |= NODES | {"accelerate_config": "two.yaml"}
    ended = threading.Event()

    def kill_a_rank() -> dict:
        while not Path("run/round1/bottleneck/checkpoint-2/sealed.json").exists():
            assert not ended.wait(0.005)
        running = of_attempt("1")
        ranks = [p for p, (node, ran) in running.items() if node == "127.0.0.1" and "scripts.bottleneck" in ran]
        os.kill(max(ranks), signal.SIGKILL)
        return running

    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill_a_rank)
        with pytest.raises(Refused, match="stage round1/bottleneck failed on node"):
            warmup(WarmupArguments(**two))
        ended.set()
    assert {node for node, _ in killing.result().values()} == {*NODES["nodes"]} and not of_attempt("1")
    assert not Path("run/round1/bottleneck/training_log.json").exists()
    warmup(WarmupArguments(**two))
    found = {name: digest for name, digest in contents(Path("run")).items() if ".node" not in name}
    assert found == table.whole["lora", 2]
    second = yaml.safe_load(Path("run/round1/bottleneck.node1.yaml").read_text())
    assert (second["machine_rank"], second["num_machines"], second["main_process_ip"]) == (1, 2, "localhost")
