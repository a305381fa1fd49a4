"""A run of two rounds killed over and over ends in the files of one that never was."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from test_warmup import LORA, recipes, toy  # noqa: F401

CLOCK = {"wall_s", "attempts", "environment"}


def contents(run: Path) -> dict[str, str]:
    """Digests of a run's files; of its manifests without the clock, without what shows wall times."""
    found = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.name == "manifest.json":
            record = json.loads(content)
            assert record.keys() >= CLOCK
            content = json.dumps({key: value for key, value in record.items() if key not in CLOCK}).encode()
        if path.name != "record.md":
            found[str(path.relative_to(run))] = hashlib.sha256(content).hexdigest()
    return found


@pytest.mark.parametrize("keep", ["all", "last"])
def test_killed_again_and_again(toy, tmp_path, keep):  # noqa: F811
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
    # An evaluation that was whole but lacked its manifest is not made again.
    assert all(count > 2 for stage, count in Counter(started).items() if not stage.endswith("evaluate"))
    # No row lost or repeated.
    rows = [
        json.loads(line)["row"]
        for path in (tmp_path / "killed" / "run").glob("round*/*-traces/traces.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert len(rows) == len(set(rows)) == 2 * fields["rounds"] * fields["rows_per_phase"]
    if keep == "last":
        assert sorted(path.parent.name for path in (tmp_path / "killed").rglob("model.safetensors")) == ["distill"]
