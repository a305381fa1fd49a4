"""Staged splits: disjoint, seeded, and refused where they are not those of this run."""

import json
from pathlib import Path

import pytest

from abscot_trl.data.splits import load_splits, save_splits, staged_splits
from abscot_trl.errors import Refused

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")


def test_splits_are_disjoint_and_seeded():
    splits = staged_splits(100, rounds=3, rows_per_phase=16, seed=1)
    assert list(splits) == ["1.bottleneck", "1.distill", "2.bottleneck", "2.distill", "3.bottleneck", "3.distill"]
    drawn = [index for part in splits.values() for index in part]
    assert {len(part) for part in splits.values()} == {16}
    assert len(set(drawn)) == 96 and set(drawn) <= set(range(100))
    assert splits == staged_splits(100, 3, 16, 1) != staged_splits(100, 3, 16, 2)


def test_splits_that_do_not_fit():
    with pytest.raises(ValueError, match="need 120 rows, the data has 119: set rows_per_phase to at most 19"):
        staged_splits(119, rounds=3, rows_per_phase=20, seed=0)
    with pytest.raises(ValueError, match="at least 1"):
        staged_splits(10, rounds=0, rows_per_phase=1, seed=0)


def test_splits_file_refuses_other_settings(tmp_path):
    path = tmp_path / "splits.json"
    splits = staged_splits(40, rounds=2, rows_per_phase=5, seed=1)
    save_splits(path, splits, n_rows=40, seed=1)
    assert load_splits(path, n_rows=40) == splits
    assert load_splits(path, n_rows=40, rounds=2, rows_per_phase=5, seed=1) == splits
    with pytest.raises(ValueError, match="n_rows 40 there, 41 asked for; seed 1 there, 2 asked for"):
        load_splits(path, n_rows=41, rounds=2, rows_per_phase=5, seed=2)
    with pytest.raises(ValueError, match="rounds 2 there, 3 asked for"):
        load_splits(path, n_rows=40, rounds=3)
    path.unlink()
    with pytest.raises(Refused, match=r"splits\.json.*run `abscot warmup`.* leave `splits` and `part` out"):
        load_splits(path, n_rows=40)


@pytest.mark.parametrize("content", [b"[]", b"{}", b"\xff", b"[" * 100_000, b"9" * 5000], ids=range(5))
def test_what_is_no_splits_file(tmp_path, content):
    (tmp_path / "splits.json").write_bytes(content)
    with pytest.raises(Refused, match=r"splits\.json is damaged .*; remove it to draw them anew"):
        load_splits(tmp_path / "splits.json", n_rows=40)


@pytest.mark.parametrize("rows", [True, {"0": 1}, [], [1, 40], [-1], [1.0], [True], [[1]], ["1"], None])
def test_parts_without_row_numbers_are_refused(tmp_path, rows):
    splits = staged_splits(40, rounds=1, rows_per_phase=5, seed=1)
    save_splits(tmp_path / "splits.json", splits, n_rows=40, seed=1)
    content = json.loads((tmp_path / "splits.json").read_text())
    if rows is None:
        del content["splits"]["1.distill"]
    else:
        content["splits"]["1.distill"] = rows
    (tmp_path / "splits.json").write_text(json.dumps(content))
    with pytest.raises(Refused, match=r"damaged .*1\.distill"):
        load_splits(tmp_path / "splits.json", 40, rounds=1, rows_per_phase=5, seed=1)
