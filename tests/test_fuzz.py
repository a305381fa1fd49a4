"""Hostile inputs to all that is read: refused in words or taken, never a traceback, a hang or a file that is gone."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import KINDS, TOY, Wrong, check_box, fill_box, mutated, stamps


@pytest.mark.slow
def test_hostile_inputs_are_taken_or_refused():
    """In a process of its own, which forks: this one may hold threads."""
    command = [sys.executable, Path(__file__).with_name("fuzz.py"), "--count", "250"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
    assert all(f"| {kind} | " in found.stdout for kind in KINDS)


def test_inputs_are_reproducible_and_differ():
    """A number names its input."""
    drawn = [[mutated(TOY[0], random.Random(f"rows {number}")) for number in range(50)] for _ in range(2)]
    assert repr(drawn[0]) == repr(drawn[1]) and len(set(map(repr, drawn[0]))) > 30


@pytest.mark.parametrize("name", [".notes.2024", "sub/.backup.2024-11-01.tar", "out.parts/.hidden"])
def test_a_foreign_file_that_is_changed_or_gone_is_seen(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fixed").mkdir()
    (tmp_path / "fixed" / "rows.jsonl").write_text("{}")
    box, before = tmp_path / "box", stamps(tmp_path / "fixed")
    fill_box(box)
    check_box(box, before)
    (box / name).write_text("other")
    with pytest.raises(Wrong, match=f"changed: {name}"):
        check_box(box, before)
    (box / name).unlink()
    with pytest.raises(Wrong, match=f"gone: {name}"):
        check_box(box, before)
