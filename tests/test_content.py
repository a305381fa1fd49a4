"""`abscot traces --method content`: what it takes, against slow references; killed, in shards: the same file."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import abscot
from safetensors.torch import load_file, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from warmups import killed_at_every_write, recipes

from abscot_trl import storage
from abscot_trl.data.prepare import load_prepared
from abscot_trl.data.toy import chain_arithmetic, write_problems
from abscot_trl.errors import Refused
from abscot_trl.loop.warmup import WarmupArguments, stages, warmup
from abscot_trl.phases import run_phase
from abscot_trl.traces import content, make
from abscot_trl.traces.content import candidates, chosen_at, fit_codes, influences, of_words, steps_at, tokens_of_codes
from abscot_trl.traces.make import TracesArguments, make_traces
from abscot_trl.traces.words import token_texts, words
from abscot_trl.vocabulary import AbstractVocabulary

BASE = Path(__file__).resolve().parents[1] / "recipes" / "demo" / "base"
ROWS = 48
FILES = ("traces.jsonl", "summary.json", "content.safetensors")


def phase(name: str, **fields) -> None:
    run_phase(name, [part for key, value in fields.items() for part in (f"--{key}", str(value))])


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> dict[str, str]:
    """The demo's base model, which speaks its CoT, with a codebook; and its rows."""
    folder = tmp_path_factory.mktemp("spoken")
    found = {"model": str(folder / "init"), "data": str(folder / "data")}
    rows = write_problems(folder / "rows.jsonl", chain_arithmetic(ROWS, 6, 5, seed=7))
    phase("init", base_model=BASE, output_dir=found["model"], codebook_size=16, m_max=8)
    phase("data", data=rows, data_format="problems", tokenizer=found["model"], output_dir=found["data"])
    return found


@pytest.fixture
def arguments(spoken, tmp_path):
    fields = spoken | {"output_dir": str(tmp_path / "traces"), "method": "content", "ratio": 6.0}
    return TracesArguments(**fields, part_tokens=600, dtype="float32", seed=3)


def files(args: TracesArguments) -> list[bytes]:
    return [(Path(args.output_dir) / name).read_bytes() for name in FILES]


@pytest.fixture(scope="module")
def whole(spoken, tmp_path_factory) -> TracesArguments:
    """A run that nobody disturbed."""
    fields = spoken | {"output_dir": str(tmp_path_factory.mktemp("whole") / "traces"), "method": "content"}
    args = TracesArguments(**fields, ratio=6.0, part_tokens=600, dtype="float32", seed=3)
    make_traces(args)
    return args


def test_it_takes_the_result_of_each_step(whole, spoken):
    """Which nothing told it to: `3-4=4;` has three digits, and only the last one is read by later steps."""
    tokens, tokenizer = tokens_of_codes(whole.output_dir), AutoTokenizer.from_pretrained(spoken["model"])
    cots = dict(zip(*(load_prepared(spoken["data"])[0][name] for name in ("id", "cot")), strict=True))
    records = [json.loads(line) for line in (Path(whole.output_dir) / "traces.jsonl").read_text().splitlines()]
    same = []
    for record in records:
        results = [line.rstrip(";")[-1] for line in cots[record["id"]].splitlines()]
        same.append([tokenizer.decode(tokens[code]) for code in record["trace"]] == results)
    assert len(same) == ROWS and sum(same) >= 0.95 * ROWS
    assert {tokenizer.decode(token) for token in tokens if token >= 0} == set("01234")


def test_who_finds_more_writes_more(spoken, tmp_path):
    """One threshold for all rows: of three steps and of six, each has its results, at one ratio."""
    rows = [*chain_arithmetic(ROWS, 3, 5, seed=1), *chain_arithmetic(ROWS, 6, 5, seed=2)]
    fields = {"data": str(tmp_path / "data"), "output_dir": str(tmp_path / "traces")}
    given = write_problems(tmp_path / "rows.jsonl", [replace(row, id=f"{n}") for n, row in enumerate(rows)])
    phase("data", data=given, data_format="problems", tokenizer=spoken["model"], output_dir=fields["data"])
    make_traces(TracesArguments(model=spoken["model"], method="content", ratio=6.0, dtype="float32", **fields))
    records = [json.loads(line) for line in (tmp_path / "traces" / "traces.jsonl").read_text().splitlines()]
    right = [len(record["trace"]) == (3 if int(record["id"]) < ROWS else 6) for record in records]
    assert len(right) == 2 * ROWS and sum(right) >= 0.9 * len(right)


SPOKEN = "(Zoe's) 501 boys-only classes cost £10250, not 39.5; so 7 * 12 =84 books\n数字学 501, الكتاب ten\n"
BYTES = [
    "Ġ",
    pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]),
    decoders.ByteLevel(),
]
SPACES = ["▁", pre_tokenizers.Metaspace(), decoders.Metaspace()]


@pytest.mark.parametrize("space, pre, decoder", [BYTES, SPACES], ids=["bytes", "spaces"])
def test_a_word_has_its_largest_influence(space, pre, decoder):
    """Against the words of a regular expression on the text. Letters of scripts without capitals stand alone."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre, decoder
    alphabet = pre_tokenizers.ByteLevel.alphabet() if space == "Ġ" else []
    size = len(alphabet) + 60 if alphabet else 60
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>"], initial_alphabet=alphabet)
    backend.train_from_iterator([SPOKEN], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    encoded = tokenizer(SPOKEN, return_offsets_mapping=True)
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    row = {"prompt_ids": [5, 6], "cot_ids": ids, "answer_ids": [7], "step_ends": [len(ids) - 1]}
    of_row = np.random.default_rng(0).normal(size=len(ids) + 3).astype(np.float32)
    told = of_row[2:-2]  # of c without its line break
    in_text = [
        match.span() for match in re.finditer(r"(?:[^\W\u0600-\u06ff\u4e00-\u9fff]|(?<=\d)[.,](?=\d))+", SPOKEN)
    ]

    def word_of(k: int):
        start, end = spans[k]
        return next((word for word in in_text if word[0] < end <= word[1] and end > start), ("token", k))

    every = [word_of(k) for k in range(len(ids) - 1)]
    expected = [max(told[i] for i, word in enumerate(every) if word == own) for own in every]
    assert of_words(of_row, row, token_texts(tokenizer)).tolist() == expected
    assert len(set(every)) < len(every) - 5


def test_a_trace_takes_whole_words(spoken, tmp_path):
    """Every number of two equal digits: a trace under m_max holds no digit without its twin."""
    rows = [row for row in chain_arithmetic(600, 3, 5, seed=7) if "-" not in row.id][:ROWS]  # a code for every token
    rows = [replace(row, cot=re.sub(r"(\d)", r"\1\1", row.cot)) for row in rows]
    fields = {"data": str(tmp_path / "data"), "output_dir": str(tmp_path / "traces")}
    given = write_problems(tmp_path / "rows.jsonl", rows)
    phase("data", data=given, data_format="problems", tokenizer=spoken["model"], output_dir=fields["data"])
    make_traces(TracesArguments(model=spoken["model"], method="content", ratio=12.0, dtype="float32", **fields))
    tokens, tokenizer = tokens_of_codes(fields["output_dir"]), AutoTokenizer.from_pretrained(spoken["model"])
    records = [json.loads(line) for line in (tmp_path / "traces" / "traces.jsonl").read_text().splitlines()]
    texts = ["".join(tokenizer.decode(tokens[code]) for code in record["trace"]) for record in records]
    assert len(texts) == ROWS and not [text for text in texts if not re.fullmatch(r"(\+?(\d)\2|[=;])+", text)]


@pytest.mark.parametrize("m_max", [1, 2, 5, 99])
def test_a_full_trace_holds_the_best_words_whole(spoken, m_max):
    """Numbers of one to three digits, of their own influence each: the best ones that m_max has room for, in turn."""
    tokenizer, rng = AutoTokenizer.from_pretrained(spoken["model"]), np.random.default_rng(0)
    texts = token_texts(tokenizer)
    for _ in range(50):
        numbers = ["".join(rng.choice([*"01234"], size)) for size in rng.integers(1, 4, 12)]
        ids = tokenizer("=".join(numbers), add_special_tokens=False)["input_ids"]
        row, word = {"prompt_ids": [], "cot_ids": [*ids, 0], "step_ends": [len(ids)]}, words(ids, texts)
        told = rng.random(word.max() + 1)[word] * [texts[i] != "=" for i in ids]
        kept, room = [], m_max
        for one in dict.fromkeys(word[np.argsort(-told)]):
            places = np.flatnonzero(word == one)
            if told[places[0]] < 0.5 or (kept and len(places) > room):
                break
            kept += [*places[:room]]
            room -= len(places)
        assert chosen_at(row, told, torch.tensor(0.5), m_max).tolist() == sorted(kept)


def test_where_a_tokenizer_puts_spaces_between_tokens_each_is_a_word():
    """`so the cat` in three tokens without a space in any of them."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "so": 1, "the": 2, "cat": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert words(tokenizer("so the cat")["input_ids"], token_texts(tokenizer)).tolist() == [0, 1, 2]
    assert words([], token_texts(tokenizer)).tolist() == []


def test_traces_begun_by_single_tokens_are_not_gone_on_with(arguments):
    """Half of them would be of other codes."""
    make_traces(replace(arguments, shard="1/2"))
    settings = Path(arguments.output_dir + ".parts") / "settings.json"
    there = json.loads(settings.read_text())
    assert there.pop("takes") == "words"
    settings.write_text(json.dumps(there))
    with pytest.raises(Refused, match="begun with other settings"):
        make_traces(replace(arguments, shard="2/2"))


def test_influence_is_what_later_text_loses(spoken):
    """By hand: one row, one token, one forward at a time; nothing of its own step or before it counts."""
    model = AutoModelForCausalLM.from_pretrained(spoken["model"], dtype=torch.float32)
    rows = [load_prepared(spoken["data"])[0][i] for i in range(3)]
    at = [candidates(row)[i::7].tolist() for i, row in enumerate(rows)]
    with tqdm(disable=False, file=StringIO()) as bar:
        lost, states = influences(model, rows, at, 300, bar)
    assert bar.n == len(rows) + sum(map(len, at)) == len(rows) + len(states)
    by_row = [part.split([*map(len, at)]) for part in (lost, states)]
    for row, some, values, there in zip(rows, at, *by_row, strict=True):
        prompt, cot = row["prompt_ids"], row["cot_ids"]
        ids = prompt + cot + row["answer_ids"]

        def later(ids, k, prompt=prompt, row=row):
            step = next(n for n, end in enumerate(row["step_ends"]) if k - len(prompt) <= end)
            first = len(prompt) + row["step_ends"][step] + 1
            with torch.no_grad():
                logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            return sum(logps[n - 1, ids[n]].item() for n in range(first, len(ids)))

        with torch.no_grad():
            plain = model(torch.tensor([ids]), output_hidden_states=True)
        torch.testing.assert_close(there, plain.hidden_states[-1][0, some], atol=1e-4, rtol=0)
        for k, value in zip(some, values.tolist(), strict=True):
            order = plain.logits[0, k - 1].argsort(descending=True).tolist()
            other = next(token for token in order if token != ids[k])
            assert value == pytest.approx(later(ids, k) - later([*ids[:k], other, *ids[k + 1 :]], k), abs=1e-3)


def test_candidates_are_the_words_of_the_cot(spoken):
    row = load_prepared(spoken["data"])[0][0]
    ids, steps = steps_at(row)
    tokenizer = AutoTokenizer.from_pretrained(spoken["model"])
    assert "".join(tokenizer.decode(ids[k]) for k in candidates(row)) == row["cot"].replace("\n", "")
    assert [tokenizer.decode([t for t, s in zip(ids, steps, strict=True) if s == n]) for n in range(6)] == [
        line + "\n" for line in row["cot"].splitlines()
    ]
    assert (np.diff(steps) >= 0).all() and (steps == -1).sum() == len(row["prompt_ids"])


def test_codes_are_the_commonest_tokens_and_their_neighbours():
    embeddings = torch.tensor([[1.0, 0], [0, 1], [0.9, 0.1], [0.1, 2.0], [-1, 0.2]])
    tokens, codes = fit_codes([[1, 0, 1], [0, 1, 2]], embeddings, 2)
    assert tokens.tolist() == [1, 0] and codes.tolist() == [1, 0, 1, 0, 0]
    assert fit_codes([[4]], embeddings, 3)[0].tolist() == [4, -1, -1]


def test_killed_at_every_write_it_ends_in_the_same_file(arguments, whole, monkeypatch):
    """And measures the influence of no row again that was saved."""
    measured, measure = [], content.influences
    monkeypatch.setattr(
        content, "influences", lambda model, rows, *a: measured.append(rows) or measure(model, rows, *a)
    )
    kills = len(list(killed_at_every_write(monkeypatch, content, lambda: make_traces(arguments))))
    assert kills > 3 and files(arguments) == files(whole)
    parts = ROWS // content.SAVED_ROWS
    assert len(measured) == 2 * parts  # each once when the kill met its writing, and once more


def test_shards_make_the_same_file(arguments, whole):
    assert make_traces(replace(arguments, shard="2/2"))["parts_left_to_others"] > 0
    make_traces(replace(arguments, shard="1/2"))
    assert files(arguments) == files(whole)


def test_one_process_a_gpu(arguments, whole, monkeypatch):
    """Further machines' shards too."""
    ran = []

    def run(jobs, gpus):
        ran.append(gpus)
        for job in jobs:
            assert job["engine"] == {"data_parallel_size": 1}
            make_traces(TracesArguments(**job))
        raise Refused("1 process failed")  # one that came when the others had joined

    monkeypatch.setattr(make, "visible_gpus", lambda: ["4", "5", "6"])
    monkeypatch.setattr(make, "run_jobs", run)
    assert make_traces(arguments)["traces"] == ROWS
    assert files(arguments) == files(whole) and ran == [[["4"], ["5"], ["6"]]]
    two = replace(arguments, output_dir=arguments.output_dir + "2", engine={"data_parallel_size": 2})
    with pytest.raises(Refused, match="1 process failed"):  # before anything is joined
        make_traces(replace(two, shard="1/2"))
    assert make_traces(replace(two, shard="2/2"))["traces"] == ROWS
    assert ran[1:] == [[["4"], ["5"]]] * 2 and files(two) == files(whole)


def test_two_shards_that_join_without_a_lock(arguments, whole, monkeypatch):
    """As on a network disk without locks: the other shard's file is there before ours, and the parts are gone."""
    make_traces(replace(arguments, shard="1/1", output_dir=arguments.output_dir + "2"))
    write = make._write

    def overtaken(*args):
        summary = write(*args)
        Path(arguments.output_dir + "2").rename(arguments.output_dir)
        return summary

    monkeypatch.setattr(make, "_write", overtaken)
    assert make_traces(arguments)["traces"] == ROWS and files(arguments) == files(whole)


def test_a_damaged_part_is_named(arguments):
    make_traces(replace(arguments, shard="1/2"))
    parts = Path(arguments.output_dir + ".parts")
    (parts / "000000.jsonl").write_text("{}\n")
    fit, whole = parts / "content.safetensors", (parts / "content.safetensors").read_bytes()
    fit.write_bytes(whole[:-8])
    with pytest.raises(Refused, match="content.safetensors is damaged .*; remove it and run the same command"):
        make_traces(replace(arguments, shard="2/2"))
    fit.write_bytes(whole)
    with pytest.raises(Refused, match="000000.jsonl is damaged .row is missing.*; remove it and run the same command"):
        make_traces(replace(arguments, shard="2/2"))


@pytest.mark.slow
def test_sigkill_and_the_same_command_again(arguments, whole, tmp_path, monkeypatch):
    parts, flags = Path(arguments.output_dir + ".parts"), []
    for key in ("model", "data", "output_dir", "method", "ratio", "seed", "part_tokens", "dtype"):
        flags += [f"--{key}", str(getattr(arguments, key))]
    process = abscot(["traces", *flags], tmp_path / "log")
    while len(list(parts.glob("0*.jsonl"))) < 2:
        assert process.is_alive(), (tmp_path / "log").read_text()[-2000:]
        time.sleep(0.002)
    process.kill()
    process.join()
    kept = {path.name: path.stat().st_mtime_ns for path in parts.glob("0*.jsonl")}
    assert len(kept) >= 2 and not Path(arguments.output_dir).exists()
    remove, seen = storage.Parts.remove, {}

    def noting(self):
        seen.update({path.name: path.stat().st_mtime_ns for path in parts.glob("0*.jsonl")})
        remove(self)

    monkeypatch.setattr(storage.Parts, "remove", noting)
    make_traces(arguments)
    assert files(arguments) == files(whole) and kept.items() <= seen.items()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_all_gpus_make_the_file_of_one(arguments, tmp_path):
    """A process a GPU, without being asked; against one process that sees one GPU."""
    flags = ["--method", "content", "--ratio", "6", "--part_tokens", "600", "--dtype", "float32", "--seed", "3"]
    flags += ["--model", arguments.model, "--data", arguments.data]
    for name, visible in (("one", {"CUDA_VISIBLE_DEVICES": "0"}), ("all", {})):
        command = [sys.executable, "-m", "abscot_trl.scripts.traces", *flags, "--output_dir", str(tmp_path / name)]
        said = subprocess.run(command, env=os.environ | visible, check=True, capture_output=True, text=True).stderr
        assert ("traces 2/" in said) == (name == "all")
    found = [files(replace(arguments, output_dir=str(tmp_path / name))) for name in ("one", "all")]
    assert found[0] == found[1]


@pytest.mark.parametrize("tied", [True, False])
def test_codes_begin_as_the_tokens_they_stand_for(whole, spoken, tmp_path, tied):
    model = AutoModelForCausalLM.from_pretrained(spoken["model"], dtype=torch.float32)
    base = spoken["model"]
    if not tied:
        base = str(tmp_path / "untied")
        head = torch.nn.Parameter(model.lm_head.weight.detach() + 1.0)
        model.config.tie_word_embeddings, model.lm_head.weight = False, head
        model.save_pretrained(base)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "abstract_vocabulary.json"):
            (tmp_path / "untied" / name).write_bytes((Path(spoken["model"]) / name).read_bytes())
    phase("init", base_model=base, codes=whole.output_dir, output_dir=tmp_path / "codes")
    before, after = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (base, tmp_path / "codes")
    )
    vocabulary, tokenizer = AbstractVocabulary.load(base), AutoTokenizer.from_pretrained(base)
    tokens, ids = tokens_of_codes(whole.output_dir), vocabulary.ids(tokenizer)
    for matrix in ("get_input_embeddings", "get_output_embeddings"):
        old, new = (getattr(one, matrix)().weight for one in (before, after))
        named = {code: token for code, token in zip(ids, tokens, strict=True) if token >= 0}
        expected = [named.get(i, i) for i in range(len(old))]
        assert len(named) == 5 and torch.equal(new, old[expected])
    assert (after.config.tie_word_embeddings, after.lm_head.weight is after.model.embed_tokens.weight) == (tied, tied)


def test_codes_of_another_codebook_are_refused(whole, spoken, checkpoint, tmp_path):
    with pytest.raises(Refused, match="has 16 codes, .* 8; make the traces anew"):
        phase("init", base_model=checkpoint, codes=whole.output_dir, output_dir=tmp_path / "codes")
    with pytest.raises(
        Refused, match="holds no content.safetensors: it is no folder of `abscot traces --method content`"
    ):
        phase("init", base_model=spoken["model"], codes=tmp_path, output_dir=tmp_path / "codes")
    with pytest.raises(Refused, match="ratio must be at least 1, got 0.5"):
        TracesArguments(model="m", data="d", output_dir="o", method="content", ratio=0.5)


def test_steps_of_line_breaks_only_are_refused(arguments, monkeypatch):
    monkeypatch.setattr(content, "candidates", lambda row: np.array([], int))
    with pytest.raises(Refused, match="no CoT holds a token that a trace could take; use rows with longer steps"):
        make_traces(arguments)


@pytest.mark.slow
def test_phase_b_by_the_codes_of_phase_a(toy, tmp_path):
    """Each row of B has what the codes fitted on A's rows say of it; weights that nothing needs go."""
    fields = toy | recipes(tmp_path, str(tmp_path / "test.jsonl")) | {"initial": "content", "ratio": 4.0}
    args = WarmupArguments(**fields | {"rounds": 1, "distill_from": "content", "keep": "last"})
    warmup(args)
    manifest = Path(fields["run_dir"]) / "round1" / "codes" / "manifest.json"
    record = json.loads(manifest.read_text())
    assert {"base_model", "codes"} <= record["inputs"].keys()
    manifest.write_text(json.dumps(record | {"inputs": {}}))  # as a version noted it that took neither for an input
    warmup(args)  # all is done
    assert [path.parent.name for path in Path(fields["run_dir"]).rglob("model.safetensors")] == ["distill"]
    run, splits = Path(fields["run_dir"]) / "round1", json.loads((Path(fields["run_dir"]) / "splits.json").read_text())
    one, other = (run / f"{phase}-traces" for phase in ("bottleneck", "distill"))
    assert (one / "content.safetensors").read_bytes() == (other / "content.safetensors").read_bytes()
    records = [json.loads(line) for line in (other / "traces.jsonl").read_text().splitlines()]
    assert sorted(record["row"] for record in records) == sorted(splits["splits"]["1.distill"])
    everything = {"model": toy["model"], "data": toy["data"], "output_dir": str(tmp_path / "all"), "codes": str(one)}
    make_traces(TracesArguments(**everything, method="content"))
    told = [json.loads(line)["trace"] for line in (tmp_path / "all" / "traces.jsonl").read_text().splitlines()]
    assert all(record["trace"] == told[record["row"]] for record in records)


def test_codes_of_other_traces_are_refused(toy, arguments, tmp_path):
    with pytest.raises(Refused, match="distill_from: content goes with initial: content, not uniform"):
        WarmupArguments(**toy | {"initial": "uniform", "distill_from": "content"}, bottleneck="b", distill="d")
    with pytest.raises(Refused, match="codes somewhere are for method: content, not policy"):
        TracesArguments(model="m", data="d", output_dir="o", codes="somewhere")
    with pytest.raises(Refused, match="traces holds no content.safetensors"):
        make_traces(replace(arguments, output_dir=str(tmp_path / "b"), codes=str(tmp_path / "traces")))
    make_traces(arguments)
    file = Path(arguments.output_dir) / "content.safetensors"
    fit = load_file(file)
    file.write_bytes(save({**fit, "tokens": torch.arange(3)}))
    with pytest.raises(Refused, match="was made with 3 codes by a model of width 128 and .* has 16, 128 and"):
        make_traces(replace(arguments, output_dir=str(tmp_path / "b"), codes=arguments.output_dir))
    file.write_bytes(save({"least": fit.pop("least_word"), **fit}))  # as an earlier version names it
    with pytest.raises(Refused, match="made by an earlier version, of single tokens: end its run with that version"):
        make_traces(replace(arguments, output_dir=str(tmp_path / "b"), codes=arguments.output_dir))
    assert not (tmp_path / "b.parts").exists()


@pytest.mark.slow
def test_a_warm_up_begins_with_its_codes(toy, tmp_path):
    """Phase A trains the checkpoint whose codes stand for tokens; a second round has no such stage."""
    fields = toy | recipes(tmp_path, str(tmp_path / "test.jsonl")) | {"initial": "content", "ratio": 4.0}
    args = WarmupArguments(**fields)
    named = {stage.name: stage.settings for stage in stages(args)}
    assert list(named)[:3] == ["round1/bottleneck-traces", "round1/codes", "round1/bottleneck"]
    assert named["round1/bottleneck"]["model_name_or_path"] == named["round1/codes"]["output_dir"]
    every = stages(replace(args, distill_from="content"))
    methods = [stage.settings["method"] for stage in every if stage.phase == "traces"]
    assert methods == ["content"] * 4  # of two rounds: nothing is sampled
    assert "round2/codes" not in named and named["round1/bottleneck-traces"]["ratio"] == 4.0
    warmup(args)
    run = Path(fields["run_dir"])
    tokens = load_file(run / "round1" / "bottleneck-traces" / "content.safetensors")["tokens"]
    weights = load_file(run / "round1" / "codes" / "model.safetensors")["model.embed_tokens.weight"]
    vocabulary, tokenizer = AbstractVocabulary.load(toy["model"]), AutoTokenizer.from_pretrained(toy["model"])
    first = vocabulary.ids(tokenizer)[0]
    assert torch.equal(weights[first], weights[tokens[0]])
