"""`abscot traces`: killed and started again, in shards, by several processes: always the same file."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from forked import abscot
from sampling import ENGINE, ENVIRONMENT, ON_GPU, need_vllm
from transformers import AutoTokenizer

from abscot_trl.data.prepare import load_prepared
from abscot_trl.data.toy import chain_arithmetic, write_problems
from abscot_trl.errors import Refused
from abscot_trl.phases import run_phase
from abscot_trl.storage import TEMPORARY, Parts
from abscot_trl.traces import make
from abscot_trl.traces.batching import cut
from abscot_trl.traces.hf import HFTraceSampler
from abscot_trl.traces.make import TracesArguments, make_traces
from abscot_trl.traces.parallel import parse_shard
from abscot_trl.vocabulary import AbstractVocabulary

FILES = ("traces.jsonl", "summary.json")


@pytest.fixture(scope="module")
def prepared(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    rows = [row for steps in (2, 4, 8) for row in chain_arithmetic(100, steps, 5, seed=0)]
    fields = {"data": write_problems(folder / "rows.jsonl", rows), "data_format": "problems"}
    fields |= {"tokenizer": str(checkpoint), "output_dir": str(folder / "data")}
    run_phase("data", [part for key, value in fields.items() for part in (f"--{key}", value)])
    return str(folder / "data")


@pytest.fixture
def arguments(checkpoint, prepared, tmp_path):
    """300 rows in about 20 parts."""
    fields = {"model": str(checkpoint), "data": prepared, "output_dir": str(tmp_path / "traces")}
    return TracesArguments(**fields, given="cot", seed=3, part_tokens=800, dtype="float32")


def content(folder) -> list[bytes]:
    return [(Path(folder) / name).read_bytes() for name in FILES]


@pytest.fixture(scope="module")
def whole(checkpoint, prepared, tmp_path_factory):
    """The files of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "traces"
    fields = {"model": str(checkpoint), "data": prepared, "output_dir": str(folder)}
    make_traces(TracesArguments(**fields, given="cot", seed=3, part_tokens=800, dtype="float32"))
    assert not folder.with_name("traces.parts").exists()
    return folder


def command(args: TracesArguments) -> list[str]:
    """Of `abscot`."""
    fields = {
        key: getattr(args, key) for key in ("model", "data", "output_dir", "given", "seed", "part_tokens", "dtype")
    }
    return ["traces", *(part for key, value in fields.items() for part in (f"--{key}", str(value)))]


@pytest.mark.slow
def test_killed_and_started_again(arguments, whole, tmp_path, monkeypatch):
    """SIGKILL twice in the middle: no row is sampled again, and the file is the same, byte by byte."""
    parts, seen = Path(arguments.output_dir + ".parts"), 0
    for _ in range(2):
        process = abscot(command(arguments), tmp_path / "log")
        while len(list(parts.glob("*.jsonl"))) < seen + 3:
            assert process.is_alive(), (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.005)
        process.kill()
        process.join()
        seen = len(list(parts.glob("*.jsonl")))
    finished = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.jsonl")}
    kept = sum(len(path.read_text().splitlines()) for path in parts.glob("*.jsonl"))
    assert 6 <= len(finished) and 0 < kept < 300 and not Path(arguments.output_dir).exists()
    sampled, sample, join = [], HFTraceSampler.sample, shutil_free(parts, monkeypatch)

    def counting(self, prefixes, *args, **kwargs):
        sampled.extend(kwargs["rows"])
        return sample(self, prefixes, *args, **kwargs)

    monkeypatch.setattr(HFTraceSampler, "sample", counting)
    make_traces(arguments)
    assert len(sampled) == len(set(sampled)) == 300 - kept
    assert content(arguments.output_dir) == content(whole)
    assert {name: time for name, time in join.items() if name in finished} == finished
    rows = [json.loads(line)["row"] for line in (whole / "traces.jsonl").read_text().splitlines()]
    assert rows == list(range(300))


def shutil_free(parts: Path, monkeypatch) -> dict[str, int]:
    """Notes when each part was written, just before they are removed."""
    times: dict[str, int] = {}
    remove = Parts.remove

    def noting(self):
        times.update({path.name: path.stat().st_mtime_ns for path in parts.glob("*.jsonl")})
        remove(self)

    monkeypatch.setattr(Parts, "remove", noting)
    return times


@pytest.mark.slow
def test_shards_join_to_the_same_file(arguments, whole, tmp_path):
    """Three shards one after another; the last one joins. Then three at once."""
    for index in (2, 1):
        left = make_traces(replace(arguments, shard=f"{index}/3"))
        assert left["parts_left_to_others"] > 0 and not Path(arguments.output_dir).exists()
    summary = make_traces(replace(arguments, shard="3/3"))
    assert summary["traces"] == 300 and content(arguments.output_dir) == content(whole)
    other = replace(arguments, output_dir=arguments.output_dir + "-at-once")
    logs = {f"{i}/3": tmp_path / f"log{i}" for i in (1, 2, 3)}
    jobs = [abscot([*command(other), "--shard", shard], log) for shard, log in logs.items()]
    assert [job.join() or job.exitcode for job in jobs] == [0, 0, 0]
    assert content(other.output_dir) == content(whole)
    assert any("300 traces" in log.read_text() for log in logs.values())


def test_a_run_begun_with_other_settings_is_refused(arguments, checkpoint):
    make_traces(replace(arguments, shard="1/2"))
    with pytest.raises(ValueError, match=r"begun with other settings \(seed: 3 -> 4\)"):
        make_traces(replace(arguments, seed=4))
    with pytest.raises(ValueError, match=r"begun with other settings \(temperature: 1.0 -> 0.5\)"):
        make_traces(replace(arguments, temperature=0.5))
    make_traces(replace(arguments, batch_tokens=2000))  # less memory: no other traces
    with pytest.raises(Refused, match="choose another output_dir"):
        make_traces(arguments)


def test_an_engine_that_computes_otherwise_is_another_setting(arguments, monkeypatch):
    """Half the traces by one engine and half by another are no sample of either."""

    def stopped(*_):
        raise RuntimeError("stopped")

    monkeypatch.setattr(make, "load_sampler", stopped)
    short = {"max_model_len": 64, "tensor_parallel_size": 2}
    for engine in (short, short | {"tensor_parallel_size": 1, "max_num_seqs": 8}):
        with pytest.raises(RuntimeError, match="stopped"):
            make_traces(replace(arguments, backend="vllm", engine=engine))
    for engine in ({"max_model_len": 128}, short | {"dtype": "float16"}, None):
        with pytest.raises(Refused, match="begun with other settings .engine: .*'max_model_len': 64"):
            make_traces(replace(arguments, backend="vllm", engine=engine))


FOREIGN = [{".notes": "mine"}, {".git/config": "mine"}, {"settings.json": '{"editor": 1}', "a.jsonl": "mine"}]


@pytest.mark.parametrize("files", FOREIGN)
def test_a_folder_of_that_name_that_is_not_ours_stays(arguments, files):
    """Hidden files were taken for nobody's, and removed with the finished parts."""
    parts = Path(arguments.output_dir + ".parts")
    for name, text in files.items():
        (parts / name).parent.mkdir(parents=True, exist_ok=True)
        (parts / name).write_text(text)
    with pytest.raises(Refused, match="traces.parts"):
        make_traces(arguments)
    assert {str(p.relative_to(parts)): p.read_text() for p in parts.rglob("*") if p.is_file()} == files


def test_parts_that_were_hardly_begun_are_begun_again(arguments, whole):
    """Killed before its settings were there whole."""
    parts = Path(arguments.output_dir + ".parts")
    parts.mkdir()
    (parts / f".settings.json.123{TEMPORARY}").write_text("{")
    make_traces(arguments)
    assert content(arguments.output_dir) == content(whole) and not parts.exists()


def test_two_shards_that_end_at_the_same_moment(arguments, whole, monkeypatch):
    """The one that comes second finds the parts joined and gone."""
    joining, first = Parts.joining, replace(arguments, shard="1/2")
    make_traces(first)

    def late(self):
        monkeypatch.setattr(Parts, "joining", joining)
        make_traces(first)  # joins
        return joining(self)

    monkeypatch.setattr(Parts, "joining", late)
    summary = make_traces(replace(arguments, shard="2/2"))
    assert summary["traces"] == 300 and content(arguments.output_dir) == content(whole)


def test_settings_of_the_shares_overwrite_nothing(arguments, monkeypatch):
    """`data_parallel_size` writes a configuration for each process."""
    mine = Path(arguments.output_dir + ".shard1.yaml")
    mine.write_text("mine")
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(Refused, match="2 of 2 processes failed"):
        make_traces(replace(arguments, backend="vllm", engine={"data_parallel_size": 2}))
    assert mine.read_text() == "mine"


def test_rows_that_do_not_fit_are_dropped_and_counted(arguments, prepared, monkeypatch, checkpoint):
    """A model of 60 positions: the rows whose prefix leaves no room for 6 tokens and the delimiters are left out."""
    init = HFTraceSampler.__init__

    def short(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.positions = 60

    monkeypatch.setattr(HFTraceSampler, "__init__", short)
    data, _ = load_prepared(prepared)
    fitting = [i for i, r in enumerate(data) if len(r["prompt_ids"]) + len(r["cot_ids"]) + 8 <= 60]
    assert 0 < len(fitting) < 300
    summary = make_traces(arguments)
    rows = [json.loads(line)["row"] for line in (Path(arguments.output_dir) / "traces.jsonl").read_text().splitlines()]
    assert rows == fitting and summary["dropped_too_long"] == 300 - len(fitting)


def test_a_row_s_draw_does_not_depend_on_the_others(checkpoint, prepared, whole):
    """The file's traces are those of one plain call over all rows, with the rows' numbers as seeds."""
    from transformers import AutoModelForCausalLM

    data, _ = load_prepared(prepared)
    tokenizer, vocabulary = AutoTokenizer.from_pretrained(checkpoint), AbstractVocabulary.load(checkpoint)
    sampler = HFTraceSampler(AutoModelForCausalLM.from_pretrained(checkpoint), tokenizer, vocabulary)
    traces = sampler.sample([x + c for x, c in zip(data["prompt_ids"], data["cot_ids"], strict=True)], 6, 1, seed=3)
    index = {token: i for i, token in enumerate(vocabulary.ids(tokenizer))}
    records = [json.loads(line) for line in (whole / "traces.jsonl").read_text().splitlines()]
    assert [r["trace"] for r in records] == [[index[token] for token in t.token_ids] for t in traces]
    assert [r["logp"] for r in records] == pytest.approx([sum(t.logps) + t.end_logp for t in traces], abs=1e-3)
    assert [r["forced_end"] for r in records] == [t.forced_end for t in traces]


def test_cut_and_shards():
    lengths = [5, 5, 5, 30, 1, 1]
    assert cut(lengths, 10) == [range(0, 2), range(2, 3), range(3, 4), range(4, 6)]
    assert cut(lengths, None) == [range(0, 6)] and cut([], 10) == []
    assert parse_shard(None) == (1, 1) and parse_shard("2/8") == (2, 8)
    for bad in ("0/8", "9/8", "2", "a/b", "-1/2", "2/8/3"):
        with pytest.raises(ValueError, match="is not of the form 2/8"):
            parse_shard(bad)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"shard": "3/2"}, "shard '3/2' is not of the form"),
        ({"method": "uniform", "shard": "1/2"}, "method uniform reads no model"),
        ({"method": "content", "backend": "vllm"}, "method content samples no policy"),
        ({"engine": {"tensor_parallel_size": 2}}, "engine is for backend: vllm"),
        ({"backend": "vllm", "engine": "{"}, "is no JSON object"),
        ({"backend": "vllm", "engine": {"trust_remote_code": True}}, "trust_remote_code is never set"),
        ({"backend": "server"}, "server and backend: server go together"),
        ({"server": "http://x"}, "server and backend: server go together"),
        ({"part_tokens": 0}, "part_tokens must be at least 1"),
    ],
)
def test_bad_fields_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        TracesArguments("model", "data", "out", **fields)


@pytest.mark.slow
def test_data_parallel_processes_of_vllm(arguments, checkpoint, prepared, monkeypatch):
    """Two vLLM engines share the rows (`data_parallel_size`); greedy, so the traces are transformers'."""
    need_vllm(gpus=2 if ON_GPU else 0)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    greedy = replace(arguments, temperature=0.0)
    make_traces(replace(greedy, output_dir=arguments.output_dir + "-hf"))
    summary = make_traces(replace(greedy, backend="vllm", engine=ENGINE | {"data_parallel_size": 2}))
    assert summary["backend"] == "vllm" and summary["traces"] == 300
    found, expected = (
        [json.loads(line) for line in (Path(folder) / "traces.jsonl").read_text().splitlines()]
        for folder in (arguments.output_dir, arguments.output_dir + "-hf")
    )
    assert [(r["row"], r["id"], r["trace"]) for r in found] == [(r["row"], r["id"], r["trace"]) for r in expected]
    assert [r["logp"] for r in found] == pytest.approx([r["logp"] for r in expected], abs=1e-3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ValueError, match="needs 4 GPUs, 2 are visible"):
        engine = {"data_parallel_size": 2, "tensor_parallel_size": 2}
        make_traces(replace(greedy, output_dir=arguments.output_dir + "-x", backend="vllm", engine=engine))
