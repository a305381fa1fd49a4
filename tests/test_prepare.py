"""Preparation in shards: killed, resumed, by several processes, cut by a limit: always the same folder."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
from tiny import row, write_jsonl
from transformers import AutoTokenizer

from abscot_trl.data import prepare as module
from abscot_trl.data.dolci import iter_rows
from abscot_trl.data.prepare import DataArguments, load_prepared, prepare
from abscot_trl.errors import Refused
from abscot_trl.traces.files import write_traces
from abscot_trl.training.phase import BaselineArguments, TrainArguments, training_rows
from abscot_trl.vocabulary import AbstractVocabulary

SHARD, CHUNK, ROWS = 40, 8, 600
SCRIPT = Path(__file__).with_name("prepare_run.py")


def numbered(n: int) -> list[dict]:
    """Row i answers i; some are unusable, some share an id, all of one stretch (three shards, unshuffled) are."""
    rows = []
    for i in range(n):
        content = f"<think>{'123' * (1 + i % 7)}</think>{i}"
        if i % 9 == 4 or 80 <= i < 200:
            content = "none"
        rows.append(row(content, id=f"r{i // 2 if i % 5 == 0 else i}", dataset_source=f"s{i % 3}"))
    return rows


@pytest.fixture(scope="module")
def fields(tmp_path_factory, tokenizer_folder):
    folder = tmp_path_factory.mktemp("rows")
    data = [write_jsonl(folder / f"{k}.jsonl", numbered(ROWS)[k * 300 : (k + 1) * 300]) for k in range(2)]
    return {"data": data, "tokenizer": tokenizer_folder, "shuffle_buffer": 50, "max_cot_tokens": 21}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(module, "SHARD", SHARD)
    monkeypatch.setattr(module, "CHUNK", CHUNK)


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


class Script:
    """`prepare_run.py`, started once."""

    def __init__(self, errors: Path):
        self.errors = errors
        with open(errors, "w") as stderr:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": stderr}
            self.process = subprocess.Popen([sys.executable, str(SCRIPT)], text=True, **pipes)

    def start(self, fields: dict, folder: Path, **kwargs) -> int:
        given = {"fields": fields | {"output_dir": str(folder / "out")}, "log": str(folder / "log")} | kwargs
        self.process.stdin.write(json.dumps(given | {"shard": SHARD, "chunk": CHUNK}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def ended(self) -> int:
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    found = Script(tmp_path_factory.mktemp("script") / "errors")
    yield found
    found.process.communicate()


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def logged(log: Path) -> list[str]:
    return log.read_text().split() if log.is_file() else []


@pytest.mark.slow
@pytest.mark.parametrize("num_proc", [1, 2])
def test_killed_at_random_it_ends_in_the_same_files(fields, tmp_path, small, script, num_proc):
    counts = prepare(DataArguments(**fields, output_dir=str(tmp_path / "whole")))
    tokenised = counts["rows_read"] - counts["rejected"]["no_think"]
    parts, log, rng = tmp_path / "out.parts", tmp_path / "log", random.Random(num_proc)
    given, lost = (fields | {"num_proc": num_proc}, tmp_path), 0
    for _ in range(5):
        before, done_before = len(logged(log)), len(list(parts.glob("[0-9]*.json")))
        pid = script.start(*given, sleep=0.01)
        moment = before + rng.randint(1, 90)
        wait_for(lambda: len(logged(log)) > moment)  # noqa: B023
        time.sleep(rng.uniform(0, 0.05))
        workers = psutil.Process(pid).children(recursive=True)
        os.kill(pid, signal.SIGKILL)
        assert script.ended() == -signal.SIGKILL
        assert not psutil.wait_procs(workers, timeout=60)[1]  # none is left behind
        done = sorted(parts.glob("[0-9]*.json"))
        outcomes = sum((Counter(json.loads(file.read_text())) for file in done[done_before:]), Counter())
        lost += len(logged(log)) - before - (outcomes.total() - outcomes["rejected.no_think"])
    assert 0 < len(done) <= ROWS // SHARD
    script.start(*given)
    assert script.ended() == 0, script.errors.read_text()[-2000:]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and not parts.exists()
    # Only what a kill left unfinished was tokenised again.
    seen = Counter(logged(log))
    assert len(seen) == tokenised and seen.total() - tokenised == lost <= 5 * (SHARD + 2 * num_proc * CHUNK)


@pytest.mark.parametrize("limit", [None, 1, 37, 64])
def test_any_number_of_processes_gives_the_same_folder(fields, tmp_path, small, limit):
    for num_proc in (1, 2, 3):
        prepare(DataArguments(**fields, output_dir=str(tmp_path / str(num_proc)), num_proc=num_proc, limit=limit))
    first, *others = (contents(tmp_path / str(n)) for n in (1, 2, 3))
    assert others == [first, first]
    assert all(file.startswith("data-") or file.endswith(".json") for file in first)


@pytest.mark.parametrize("limit", [None, 1, 36, 100])
def test_shards_hold_the_rows_in_order_and_counts_add_up(fields, tmp_path, small, limit):
    counts = prepare(DataArguments(**fields, output_dir=str(tmp_path / "out"), limit=limit))
    # One row after the other, without shards, by this file's own reading of what is kept.
    rows = list(iter_rows(fields["data"], shuffle_buffer=50))
    usable = [r for r in rows if r["messages"][-1]["content"] != "none"]
    fitting = [r for r in usable if len(r["messages"][-1]["content"].split("</think>")[0]) - len("<think>") < 21][
        :limit
    ]
    data, _ = load_prepared(tmp_path / "out")
    assert data["id"][:] == [r["id"] for r in fitting]
    assert data["answer"][:] == [r["messages"][-1]["content"].split("</think>")[1] for r in fitting]
    read = len(rows) if limit is None else rows.index(fitting[-1]) + 1
    assert counts["rows_read"] == read
    assert counts["rejected"].get("no_think", 0) == sum(r["messages"][-1]["content"] == "none" for r in rows[:read])
    assert (
        counts["rows_kept"]
        == len(fitting)
        == read - counts["rejected"].get("no_think", 0) - sum(counts["filtered"].values())
    )
    assert counts["sources"] == Counter(r["dataset_source"] for r in fitting)
    assert counts["duplicate_ids"] == len(fitting) - len({r["id"] for r in fitting})
    lengths = [len(r["cot_ids"]) for r in data]
    assert counts["lengths"]["cot"]["mean"] == round(sum(lengths) / len(lengths), 1)
    assert len(data.cache_files) == len(list((tmp_path / "out").glob("*.arrow")))  # mapped, not read


def test_a_stretch_of_unusable_rows_leaves_no_empty_file(fields, tmp_path, small):
    counts = prepare(DataArguments(**fields | {"shuffle_buffer": 0}, output_dir=str(tmp_path / "out")))
    files = sorted(file.name for file in (tmp_path / "out").glob("*.arrow"))
    assert files == [f"data-{n:05}.arrow" for n in (0, 1, *range(5, 15))]
    data, _ = load_prepared(tmp_path / "out")
    assert (
        len(data)
        == counts["rows_kept"]
        == sum(len(datasets.Dataset.from_file(f["filename"])) for f in data.cache_files)
    )


def test_other_settings_and_other_rows_are_refused(fields, tmp_path, small, monkeypatch):
    args = fields | {"output_dir": str(tmp_path / "out")}

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.Shards, "join", stopped)  # everything but the end
        with pytest.raises(KeyboardInterrupt):
            prepare(DataArguments(**args))
    for changed, difference in (
        ({"max_cot_tokens": 20}, "max_cot_tokens: 21 -> 20"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"data": fields["data"][:1]}, "inputs: .* -> "),
    ):
        with pytest.raises(ValueError, match=rf"out\.parts was begun with other settings .*{difference}"):
            prepare(DataArguments(**args | changed))
    with monkeypatch.context() as patch:
        patch.setattr(module.Shards, "write", stopped)  # nothing is left to make
        counts = prepare(DataArguments(**args, num_proc=2))
    assert counts["rows_read"] == ROWS and not (tmp_path / "out.parts").exists()


def test_a_finished_output_that_was_removed_is_made_anew(fields, tmp_path, small, monkeypatch):
    args = DataArguments(**fields, output_dir=str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr(module.Shards, "remove", lambda self: None)  # killed right after the move
        prepare(args)
    before = contents(tmp_path / "out")
    assert (tmp_path / "out.parts").is_dir()
    (tmp_path / "out").rename(tmp_path / "gone")
    prepare(args)
    assert contents(tmp_path / "out") == before and not (tmp_path / "out.parts").exists()


def test_two_at_once_are_refused(fields, tmp_path, script):
    pid = script.start(fields, tmp_path, sleep=0.2)
    wait_for(lambda: logged(tmp_path / "log"))
    with pytest.raises(Refused, match="another preparation is at work here"):
        prepare(DataArguments(**fields, output_dir=str(tmp_path / "out")))
    os.kill(pid, signal.SIGKILL)
    assert script.ended() == -signal.SIGKILL


def test_a_process_that_dies_is_an_error_and_finished_shards_stay(fields, tmp_path, script):
    given = (fields | {"shuffle_buffer": 0, "num_proc": 2}, tmp_path)
    script.start(*given, dies=str(next(i for i in range(6 * SHARD, ROWS) if i % 9 != 4)))
    error = (script.ended(), script.errors.read_text())
    assert error[0] == 1 and "one of 2 processes died" in error[1] and "lower num_proc" in error[1]
    assert not (tmp_path / "out").exists() and (tmp_path / "out.parts" / "00004.json").is_file()
    (tmp_path / "log").unlink()
    script.start(*given)
    assert script.ended() == 0 and (tmp_path / "out").is_dir()
    assert min(map(int, logged(tmp_path / "log"))) >= 5 * SHARD  # the finished ones were not made again


def test_training_reads_the_prepared_files_themselves(fields, tmp_path, small):
    prepare(DataArguments(**fields, output_dir=str(tmp_path / "out")))
    data, _ = load_prepared(tmp_path / "out")
    chosen = random.Random(0).sample(range(len(data)), 20)
    records = [{"row": i, "id": data[i]["id"], "trace": [i % 8] * (k % 4)} for k, i in enumerate(chosen)]
    write_traces(tmp_path, records)
    vocabulary = AbstractVocabulary.load(fields["tokenizer"])
    tokenizer = AutoTokenizer.from_pretrained(fields["tokenizer"])
    rows = training_rows(TrainArguments(str(tmp_path / "out"), str(tmp_path)), vocabulary, tokenizer)
    assert rows.cache_files == data.cache_files
    columns = ("prompt_ids", "cot_ids", "answer_ids")
    assert list(rows) == [{name: data[r["row"]][name] for name in columns} | {"trace": r["trace"]} for r in records]
    plain = training_rows(BaselineArguments(str(tmp_path / "out")), vocabulary, tokenizer)
    assert list(plain) == [{name: row[name] for name in columns} for row in data]
    assert plain.cache_files == data.cache_files


@pytest.mark.parametrize("column", ["prompt_ids", "cot"])
def test_a_row_that_begins_beyond_the_file_s_end_is_refused(fields, tmp_path, small, column):
    """A reader would end by a signal there."""
    prepare(DataArguments(**fields, output_dir=str(tmp_path / "out")))
    data, _ = load_prepared(tmp_path / "out")
    begins = data.data.column(column).chunk(0).buffers()[1].to_pybytes()
    wrong = np.frombuffer(begins, "<i4").copy()
    wrong[2] = 2**30
    file = tmp_path / "out" / "data-00000.arrow"
    content = file.read_bytes()
    assert content.count(begins) == 1
    file.write_bytes(content.replace(begins, wrong.tobytes()))
    with pytest.raises(Refused, match="out is damaged .*; prepare the data again"):
        load_prepared(tmp_path / "out")
