"""A run of two rounds killed over and over ends in the files of one that never was."""

import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kill_table import Cell, Table, contents
from warmups import LORA, recipes

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("keep", ["all", "last"])
def test_killed_again_and_again(toy, tmp_path, keep):
    training = LORA if keep == "all" else {}
    training = training | {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    fields = toy | recipes(tmp_path, str(tmp_path / "test.jsonl"), training)
    fields |= {"run_dir": "run", "keep": keep, "rounds": 2 if keep == "all" else 1}
    given = {"fields": fields, "folder": str(tmp_path), "seed": 0}
    script = Path(__file__).with_name("kill_run.py")
    done = subprocess.run([sys.executable, str(script), json.dumps(given)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
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


def test_a_part_of_the_table_of_kills(tmp_path):
    """Real processes under accelerate, LoRA and full, one and two ranks; the whole table: tests/kill_table.py."""
    cells = [Cell("driver", "SIGKILL", "full", 2, "seal"), Cell("launcher", "SIGTERM", "lora", 1, "seal")]
    table = Table(tmp_path, until="round1/bottleneck")
    table.prepare()

    def run(number: int) -> dict:
        table.run_whole(cells[number].tuning, cells[number].processes)
        return table.run_cell(cells[number], number)

    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(run, range(2)))
    table.watch.ended = True
    assert [row["right"] for row in rows] == [True, True], rows
    assert all(row["gone_s"] < 10 and row["reruns"] == 1 for row in rows), rows
