"""The measured figures, and the page that shows them."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import figures
import speed_page

FILES = sorted(figures.RESULTS.glob("*.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_figure_says_where_it_comes_from(file):
    rows = json.loads(file.read_text())
    assert len({row["name"] for row in rows}) == len(rows) > 0
    for row in rows:
        assert {"name", "value", "unit", "card", "baseline", "command", "versions"} <= row.keys(), row["name"]
        assert isinstance(row["value"], int | float) and row["unit"] and row["card"] and row["versions"]["torch"]


def test_the_page_shows_these_figures():
    assert speed_page.filled(speed_page.PAGE.read_text(), speed_page.figures()) == speed_page.PAGE.read_text()


def test_a_figure_measured_again_replaces_the_old_one(tmp_path):
    file, row = tmp_path / "results" / "x.json", {"unit": "s", "baseline": None}
    figures.record(file, [{"name": "a", "value": 1} | row, {"name": "b", "value": 2} | row], "make bench-x")
    figures.record(file, [{"name": "a", "value": 3} | row], "make bench-x")
    assert {entry["name"]: entry["value"] for entry in json.loads(file.read_text())} == {"a": 3, "b": 2}
