"""`abscot traces --method clusters`: each row read once; killed, in shards, by several: always the same file."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import abscot
from safetensors.torch import load_file
from sklearn.cluster import MiniBatchKMeans
from transformers import AutoModelForCausalLM
from warmups import killed_at_every_write

from abscot_trl import storage
from abscot_trl.data.prepare import load_prepared
from abscot_trl.data.toy import chain_arithmetic, write_problems
from abscot_trl.errors import Refused
from abscot_trl.phases import run_phase
from abscot_trl.traces import clusters, make
from abscot_trl.traces.make import TracesArguments, make_traces

ROWS, FITTED = 60, 20
FILES = ("traces.jsonl", "summary.json", "clusters.safetensors")


@pytest.fixture(scope="module")
def prepared(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    rows = [row for steps in (2, 4, 9) for row in chain_arithmetic(ROWS // 3, steps, 5, seed=0)]
    fields = {"data": write_problems(folder / "rows.jsonl", rows), "data_format": "problems"}
    fields |= {"tokenizer": str(checkpoint), "output_dir": str(folder / "data")}
    run_phase("data", [part for key, value in fields.items() for part in (f"--{key}", value)])
    return str(folder / "data")


@pytest.fixture
def read(monkeypatch) -> list[tuple]:
    """Clusters fitted on some of the rows only; gives the CoTs that the model has read."""
    monkeypatch.setattr(clusters, "FIT_ROWS", FITTED)
    seen, states = [], clusters.step_states

    def counting(model, tokenizer, rows, *args):
        seen.extend(map(tuple, rows["cot_ids"]))
        return states(model, tokenizer, rows, *args)

    monkeypatch.setattr(clusters, "step_states", counting)
    return seen


@pytest.fixture
def arguments(checkpoint, prepared, tmp_path, read):
    """Some ten parts of states and traces."""
    fields = {"model": str(checkpoint), "data": prepared, "output_dir": str(tmp_path / "traces")}
    return TracesArguments(**fields, method="clusters", seed=3, part_tokens=400, dtype="float32")


def content(args: TracesArguments) -> list[bytes]:
    return [(Path(args.output_dir) / name).read_bytes() for name in FILES]


@pytest.fixture
def whole(arguments, tmp_path, read) -> list[bytes]:
    """The files of a run that nobody disturbed."""
    args = replace(arguments, output_dir=str(tmp_path / "whole"))
    make_traces(args)
    assert not Path(args.output_dir + ".parts").exists()
    read.clear()
    return content(args)


def test_each_row_is_read_once_and_gets_its_states_clusters(arguments, checkpoint, prepared, read):
    """Against the model run row by row, and scikit-learn's own assignment; the longest traces are of grouped steps."""
    make_traces(arguments)
    data, _ = load_prepared(prepared)
    assert sorted(read) == sorted(map(tuple, data["cot_ids"]))
    model, states = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), []
    for row in data:
        with torch.no_grad():
            hidden = model.base_model(torch.tensor([row["prompt_ids"] + row["cot_ids"]])).last_hidden_state[0]
        ends = [len(row["prompt_ids"]) + end for end in row["step_ends"]]
        assert len(ends) in (2, 4, 9)
        states.append(hidden[[ends[i] for i in (1, 2, 4, 5, 7, 8)] if len(ends) == 9 else ends].numpy())
    chosen = np.random.default_rng(3).permutation(ROWS)[:FITTED].tolist()
    chosen.sort(key=lambda i: -len(data[i]["prompt_ids"] + data[i]["cot_ids"]))
    sample = np.concatenate([states[i] for i in chosen])
    kmeans = MiniBatchKMeans(8, random_state=3, n_init=10, batch_size=4096, max_iter=300).fit(sample)
    records = [json.loads(line) for line in (Path(arguments.output_dir) / "traces.jsonl").read_text().splitlines()]
    assert [record["row"] for record in records] == list(range(ROWS))
    assert [record["trace"] for record in records] == [kmeans.predict(found).tolist() for found in states]
    centroids = load_file(Path(arguments.output_dir) / "clusters.safetensors")["centroids"]
    assert np.abs(centroids.numpy() - kmeans.cluster_centers_).max() < 1e-4


def test_killed_at_every_write_it_ends_in_the_same_file(arguments, whole, read, monkeypatch):
    """Each attempt finishes one file and dies at the next; what was finished is never made again."""
    made, kills = Path(arguments.output_dir + ".parts"), 0

    def times() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in made.glob("*0*")}

    def writes() -> int:
        return 2 if (made / "clusters.safetensors").exists() else 1  # the fit writes two

    before = times()
    for _ in killed_at_every_write(monkeypatch, clusters, lambda: make_traces(arguments), writes):
        assert before.items() <= times().items()
        before, kills = times(), kills + 1
    assert kills > 6 and content(arguments) == whole


def test_shards_make_the_same_file(arguments, whole, read):
    """First all make states, and the last of them fits; given again they make the traces, and the last joins."""
    for turn, shard in ((1, "2/2"), (1, "1/2"), (2, "1/2")):
        left = make_traces(replace(arguments, shard=shard))
        assert left["parts_left_to_others"] > 0 and not Path(arguments.output_dir).exists()
        fitted = Path(arguments.output_dir + ".parts") / "000000.jsonl"
        assert fitted.exists() == (shard == "1/2")
        assert (len(read) == FITTED) == (turn == 1 and shard == "1/2")
    make_traces(replace(arguments, shard="2/2"))
    assert content(arguments) == whole and len(read) == ROWS


def test_one_process_a_gpu(arguments, whole, monkeypatch):
    """Twice all of them; further machines' shards once a call."""
    ran = []

    def run(jobs, gpus):
        ran.append(gpus)
        for job in jobs:
            assert job["engine"] == {"data_parallel_size": 1}
            try:
                make_traces(TracesArguments(**job))
            except Refused as error:  # nothing was left for it, and the others have joined
                assert "is there already" in str(error) and Path(job["output_dir"]).exists()
        if Path(jobs[0]["output_dir"]).exists():
            raise Refused("1 process failed")

    monkeypatch.setattr(make, "visible_gpus", lambda: ["4", "5", "6"])
    monkeypatch.setattr(make, "run_jobs", run)
    assert make_traces(arguments)["traces"] == ROWS
    assert content(arguments) == whole and ran == [[["4"], ["5"], ["6"]]] * 2
    two = replace(arguments, output_dir=arguments.output_dir + "2", engine={"data_parallel_size": 2})
    calls = [make_traces(replace(two, shard=f"{node}/2")) for node in (1, 2, 1, 2)]
    assert ran[2:] == [[["4"], ["5"]]] * 4 and content(two) == whole
    assert calls[0]["parts_left_to_others"] and calls[-1]["traces"] == ROWS


def test_two_shards_that_join_without_a_lock(arguments, whole, monkeypatch):
    """As on a network disk without locks: the other shard's file is there before ours, and the parts are gone."""
    make_traces(replace(arguments, shard="1/1", output_dir=arguments.output_dir + "2"))
    write = make._write

    def overtaken(*args):
        summary = write(*args)
        Path(arguments.output_dir + "2").rename(arguments.output_dir)
        return summary

    monkeypatch.setattr(make, "_write", overtaken)
    assert make_traces(arguments)["traces"] == ROWS and content(arguments) == whole


def test_a_damaged_part_of_traces_is_named(arguments):
    for shard in ("1/2", "2/2", "1/2"):
        make_traces(replace(arguments, shard=shard))
    (Path(arguments.output_dir + ".parts") / "000000.jsonl").write_text("{}\n")
    with pytest.raises(Refused, match="000000.jsonl is damaged .row is missing.*; remove it and run the same command"):
        make_traces(replace(arguments, shard="2/2"))


def test_a_damaged_part_is_named(arguments):
    make_traces(replace(arguments, shard="1/2"))
    damaged = Path(arguments.output_dir + ".parts") / "states000000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    with pytest.raises(Refused, match="states000000.safetensors is damaged .*; remove it and run the same command"):
        make_traces(replace(arguments, shard="2/2"))


@pytest.mark.slow
def test_sigkill_and_the_same_command_again(arguments, prepared, tmp_path, monkeypatch):
    monkeypatch.undo()  # the command fits on all rows
    whole = replace(arguments, output_dir=str(tmp_path / "whole"))
    make_traces(whole)
    parts, flags = Path(arguments.output_dir + ".parts"), []
    for key in ("model", "data", "output_dir", "method", "seed", "part_tokens", "dtype"):
        flags += [f"--{key}", str(getattr(arguments, key))]
    process = abscot(["traces", *flags], tmp_path / "log")
    while len(list(parts.glob("states*"))) < 3:
        assert process.is_alive(), (tmp_path / "log").read_text()[-2000:]
        time.sleep(0.002)
    process.kill()
    process.join()
    kept = {path.name: path.stat().st_mtime_ns for path in parts.glob("states*")}
    assert len(kept) >= 3 and not Path(arguments.output_dir).exists()
    remove, seen = storage.Parts.remove, {}

    def noting(self):
        seen.update({path.name: path.stat().st_mtime_ns for path in parts.glob("states*")})
        remove(self)

    monkeypatch.setattr(storage.Parts, "remove", noting)
    make_traces(arguments)
    assert content(arguments) == content(whole) and kept.items() <= seen.items()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_gpus_make_the_file_of_one(arguments, tmp_path, dtype):
    """A process a GPU, without being asked; against one process that sees one GPU."""
    flags = ["--method", "clusters", "--part_tokens", "400", "--dtype", dtype, "--seed", "3"]
    flags += ["--model", arguments.model, "--data", arguments.data]
    for name, visible in (("one", {"CUDA_VISIBLE_DEVICES": "0"}), ("all", {})):
        command = [sys.executable, "-m", "abscot_trl.scripts.traces", *flags, "--output_dir", str(tmp_path / name)]
        said = subprocess.run(command, env=os.environ | visible, check=True, capture_output=True, text=True).stderr
        assert ("step states 2/" in said) == (name == "all")
    found = [content(replace(arguments, output_dir=str(tmp_path / name))) for name in ("one", "all")]
    assert found[0] == found[1]


def test_too_few_steps_are_refused_before_the_model_is_read(arguments, monkeypatch):
    monkeypatch.setattr(clusters, "FIT_ROWS", 1)
    monkeypatch.setattr(clusters, "load_model", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(Refused, match="steps in 1 rows cannot form 8 clusters; give more rows"):
        make_traces(arguments)
    assert not Path(arguments.output_dir + ".parts").exists()
    with pytest.raises(Refused, match="data_parallel_size: 0 is no number of processes"):
        replace(arguments, engine={"data_parallel_size": 0})
