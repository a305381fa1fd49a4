"""Swaps, token counts, results and plots, by hand and by property; and the files of an evaluation."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from abscot_trl.data.problems import load_problems
from abscot_trl.data.toy import chain_arithmetic, write_problems
from abscot_trl.errors import Refused
from abscot_trl.evaluation import answering
from abscot_trl.evaluation.answering import Answerer, verbal_reasoning_tokens
from abscot_trl.evaluation.arguments import EvaluateArguments
from abscot_trl.evaluation.evaluate import evaluate
from abscot_trl.evaluation.results import read_results
from abscot_trl.evaluation.statistics import mean_interval, wilson_interval
from abscot_trl.evaluation.swaps import swap_traces
from abscot_trl.report.make import ReportArguments, report
from abscot_trl.report.tables import results_table
from abscot_trl.storage import Parts
from abscot_trl.traces.constraint import Continuation
from abscot_trl.traces.hf import HFTraceSampler
from abscot_trl.vocabulary import AbstractVocabulary


def test_swaps():
    rng = np.random.default_rng(0)
    traces = [rng.integers(16, size=n).tolist() for n in rng.integers(1, 12, size=300)]
    assert swap_traces(traces, "own", 16) == traces
    assert swap_traces(traces, "none", 16) == [[]] * 300
    assert swap_traces(traces, "cut:3", 16) == [t[:3] for t in traces]
    shuffled = swap_traces(traces, "shuffled", 16)
    assert [sorted(t) for t in shuffled] == [sorted(t) for t in traces] and shuffled != traces
    same = [list(range(8))] * 50  # a permutation of its own for each row
    assert len({tuple(t) for t in swap_traces(same, "shuffled", 16)}) > 40
    labelled = [[i] for i in range(300)]
    other = swap_traces(labelled, "other", 300)
    assert sorted(other) == labelled and all(a != b for a, b in zip(other, labelled, strict=True))
    drawn = swap_traces(traces, "random", 16, seed=1)
    assert [len(t) for t in drawn] == [len(t) for t in traces]
    assert np.bincount(sum(drawn, []), minlength=16).min() > 60
    assert drawn == swap_traces(traces, "random", 16, seed=1) != swap_traces(traces, "random", 16, seed=2)
    for bad in ("cut:", "cut:x", "mine"):
        with pytest.raises(ValueError, match="is not one of own, random"):
            swap_traces(traces, bad, 16)
    with pytest.raises(ValueError, match="at least two"):
        swap_traces([[1]], "other", 16)


def test_verbal_tokens_before_the_answer(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def count(text: str) -> int:
        return verbal_reasoning_tokens(tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer)

    example = chain_arithmetic(1, 6, 5, seed=0)[0]
    assert count(example.cot + "\n" + example.answer) == 36
    assert count(example.answer) == 0 and count("1+2=3") == 0
    assert count("1=1\n\\boxed{1}\n2=2\n\\boxed{2}") == 3 + 1 + 3 + 1 + 3 + 1


@pytest.fixture(scope="module")
def evaluated(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    problems = write_problems(folder / "problems.jsonl", chain_arithmetic(40, 4, 5, seed=0))
    arguments = EvaluateArguments(
        model=str(checkpoint),
        problems=problems,
        output_dir=str(folder / "out"),
        name="tiny",
        task="chain",
        modes=["verbal", "direct", "abstract"],
        swaps=["own", "random", "shuffled", "other", "none", "cut:2"],
        instruction=False,
        max_new_tokens=10,
    )
    return folder, arguments, evaluate(arguments)


def test_results_follow_from_the_answers(evaluated):
    """Every figure of results.json recomputed from answers.jsonl."""
    folder, arguments, results = evaluated
    assert results == json.loads((folder / "out" / "results.json").read_text())
    answers = [json.loads(line) for line in (folder / "out" / "answers.jsonl").read_text().splitlines()]
    assert [(r["mode"], r["swap"]) for r in results] == [
        *(("verbal", s) for s in ("own", "shuffled", "cut:2")),
        ("direct", "own"),
        *(("abstract", s) for s in ("own", "random", "shuffled", "other", "none", "cut:2")),
    ]
    for row in results:
        mine = [a for a in answers if (a["mode"], a["swap"]) == (row["mode"], row["swap"])]
        assert len(mine) == row["n"] == 40 and row["model"] == "tiny" and row["task"] == "chain"
        assert row["accuracy"] == pytest.approx(100 * sum(a["score"] for a in mine) / 40)
        assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1]
        assert row["truncated"] == sum(a["truncated"] for a in mine)
        assert row["tokens"] == pytest.approx(row["trace_tokens"] + row["answer_tokens"])
        if row["mode"] == "abstract":
            assert row["trace_tokens"] == pytest.approx(np.mean([len(a["trace"]) for a in mine]))
        own = [a for a in answers if (a["mode"], a["swap"]) == (row["mode"], "own")]
        assert [a["id"] for a in own] == [a["id"] for a in mine]
        if row["swap"] != "own":
            pairs = list(zip(own, mine, strict=True))
            assert row["difference"] == pytest.approx(100 * np.mean([b["score"] - a["score"] for a, b in pairs]))
            assert row["difference_ci95"][0] <= row["difference"] <= row["difference_ci95"][1]
            changed = [(a["answer"] or "").replace(" ", "") != (b["answer"] or "").replace(" ", "") for a, b in pairs]
            assert row["changed"] == pytest.approx(np.mean(changed)) and row["changed"] > 0
        assert row["metric"] == "accuracy" and row["samples"] == 1 and "maj" not in row
        assert row["decoding"] == arguments.decoding() and row["decoding"]["seed"] == 0
    assert {(a["sample"], len(a["problem"]) > 3) for a in answers} == {(0, True)}
    own, cut = ([a["trace"] for a in answers if a["swap"] == s and a["mode"] == "abstract"] for s in ("own", "cut:2"))
    assert cut == [t[:2] for t in own] and all(1 <= len(t) <= 6 for t in own)


def test_grades_are_the_problems_own(checkpoint, evaluated, monkeypatch, tmp_path):
    """A decoder that answers some problems right and some wrong: the accuracy is exactly that share."""
    _, arguments, _ = evaluated
    tokenizer, problems = AutoTokenizer.from_pretrained(checkpoint), load_problems(arguments.problems)

    def oracle(self, prefixes, length, temperature, seed, rows, bar, **_):
        texts = [f"\\boxed{{{p.gold if i % 4 else (int(p.gold) + 1) % 5}}}" for i, p in enumerate(problems)]
        return [Continuation(tokenizer(texts[row], add_special_tokens=False)["input_ids"], False) for row in rows]

    monkeypatch.setattr(HFTraceSampler, "answer", oracle)
    results = evaluate(replace(arguments, output_dir=str(tmp_path / "out"), modes=["direct", "abstract"]))
    assert {row["accuracy"] for row in results} == {75.0} and {row["answer_tokens"] for row in results} == {3.0}
    assert {row["changed"] for row in results if row["swap"] != "own"} == {0.0}


def test_report(evaluated, tmp_path, capsys):
    folder, _, results = evaluated
    path = report(ReportArguments([str(folder / "out")], str(tmp_path)))
    text = path.read_text()
    assert results_table(results) in text and "abscot report --runs" in text
    lines = results_table(results).splitlines()
    assert len(lines) == 2 + len(results) and len({len(line) for line in lines}) == 1
    assert f"{results[2]['accuracy']:.1f}" in lines[4]
    for name in ("accuracy_over_tokens.png", "accuracy_by_swap.png"):
        image = Image.open(tmp_path / name)
        assert image.width > 600 and len(set(image.convert("L").tobytes())) > 20


def test_bad_evaluations_are_refused(checkpoint, evaluated, tmp_path):
    _, arguments, _ = evaluated
    fields = {"model": str(checkpoint), "problems": arguments.problems, "output_dir": str(tmp_path / "x")}
    with pytest.raises(ValueError, match="modes: 'aloud'"):
        EvaluateArguments(**fields, modes=["aloud"])
    for wrong, words in [
        ({"swaps": ["own", "mine"]}, "swap 'mine'"),
        ({"swaps": ["random"]}, "compared with 'own'; name it beside random"),
        ({"modes": ["verbal"], "swaps": ["own", "random"]}, "none of the modes verbal has a 'random'"),
        ({"modes": ["direct"], "swaps": ["own", "cut:3"]}, "none of the modes direct has a 'cut:3'"),
        ({"swaps": ["own", "none", "none"]}, "names one of them twice"),
        ({"samples": 4}, "4 answers .* are one and the same; raise trace_temperature or temperature"),
        (
            {"samples": 4, "trace_temperature": 0.7, "modes": ["verbal", "direct"]},
            "4 answers .* the same; raise temperature",
        ),
        ({"samples": 4, "trace_temperature": 0.7, "pause_tokens": 3, "swaps": ["own"]}, "one and the same"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"temperature": float("nan")}, "temperatures must be finite"),
        ({"trace_temperature": float("inf")}, "temperatures must be finite"),
        ({"pause_tokens": 3, "swaps": ["own", "random"]}, "pause_tokens takes the place of the trace"),
        ({"pause_tokens": 3, "modes": ["direct"]}, "pause_tokens takes the place of the trace"),
    ]:
        with pytest.raises(ValueError, match=words):
            EvaluateArguments(**fields | wrong)
    with pytest.raises(ValueError, match="pause_tokens 7 exceeds m_max 6"):
        evaluate(EvaluateArguments(**fields, pause_tokens=7))
    with pytest.raises(ValueError, match="abstract mode: a prompt of .* lower max_new_tokens"):
        evaluate(EvaluateArguments(**fields, instruction=False, max_new_tokens=500))
    twice = tmp_path / "twice.jsonl"
    twice.write_text(json.dumps({"problem": "1+1", "answer": "2", "id": "a"}) + "\n")
    twice.write_text(2 * twice.read_text())
    with pytest.raises(ValueError, match="twice.jsonl: id 'a' stands twice; give each problem its own"):
        evaluate(EvaluateArguments(**fields | {"problems": str(twice)}, modes=["direct"], swaps=["own"]))
    assert not list(tmp_path.glob("x*"))
    with pytest.raises(Refused):
        evaluate(EvaluateArguments(**{**fields, "output_dir": arguments.output_dir}, instruction=False))
    plain = tmp_path / "plain"
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(plain)
    with pytest.raises(Refused, match="abstract_vocabulary.json"):
        evaluate(EvaluateArguments(**{**fields, "model": str(plain)}))
    with pytest.raises(Refused, match="no results"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="no list of results"):
        read_results(tmp_path)


def test_hotpotqa_is_scored_by_f1_and_em(checkpoint, tmp_path, monkeypatch):
    """A HotpotQA row is graded as its instruction asked, whatever the task is called."""
    context = {"title": ["1"], "sentences": [["2"]]}
    rows = [{"question": "1", "answer": "1 2 3 4", "context": context, "id": str(i)} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = ["Answer: 1 2 3 4", "So.\nAnswer: 1 2", "5", "Answer: 1 2 3 4 5 6"]
    outputs = [Continuation([i], False) for i in range(4)]
    monkeypatch.setattr(HFTraceSampler, "answer", lambda *_, **__: outputs)
    monkeypatch.setattr(
        answering, "prompt_ids", lambda messages, _: [1, 2, 3]
    )  # the toy tokenizer has no words, neither for prompts nor for answers
    decode = type(AutoTokenizer.from_pretrained(checkpoint)).decode
    monkeypatch.setattr(
        type(AutoTokenizer.from_pretrained(checkpoint)),
        "decode",
        lambda self, ids, **kw: said[ids[0]] if isinstance(ids, list) and len(ids) == 1 else decode(self, ids, **kw),
    )
    fields = {"model": str(checkpoint), "problems": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / "out")}
    (row,) = evaluate(EvaluateArguments(**fields, modes=["direct"], max_new_tokens=64))
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    f1 = [1.0, 2 * 1.0 * 0.5 / 1.5, 0.0, 2 * (4 / 6) * 1.0 / (4 / 6 + 1.0)]
    assert [a["score"] for a in answers] == pytest.approx(f1)
    assert [a["answer"] for a in answers] == ["1 2 3 4", "1 2", "5", "1 2 3 4 5 6"]
    assert (row["metric"], row["em"], row["accuracy"]) == ("f1", 25.0, pytest.approx(100 * np.mean(f1)))
    assert row["ci95"] == pytest.approx(mean_interval(f1)) and row["em_ci95"] == pytest.approx(wilson_interval(1, 4))


def test_swaps_that_change_nothing_are_said(evaluated):
    """`swapped` is the share of traces that a swap changed."""
    folder, _, results = evaluated
    answers = [json.loads(line) for line in (folder / "out" / "answers.jsonl").read_text().splitlines()]
    own = [a["trace"] for a in answers if a["mode"] == "abstract" and a["swap"] == "own"]
    for row in (r for r in results if r["mode"] == "abstract"):
        mine = [a["trace"] for a in answers if a["mode"] == "abstract" and a["swap"] == row["swap"]]
        assert row["swapped"] == pytest.approx(np.mean([a != b for a, b in zip(own, mine, strict=True)]))
    assert [r["swapped"] for r in results if r["swap"] == "none"] == [1.0]


def test_spans_of_the_cache(checkpoint, evaluated, monkeypatch):
    """An engine with a small cache: the same answers, and each span is answered right after its traces."""
    _, arguments, _ = evaluated
    tokenizer, problems = AutoTokenizer.from_pretrained(checkpoint), load_problems(arguments.problems)
    vocabulary = AbstractVocabulary.load(checkpoint)

    def run(cache_tokens):
        sampler = HFTraceSampler(AutoModelForCausalLM.from_pretrained(checkpoint), tokenizer, vocabulary)
        sampler.cache_tokens, calls = cache_tokens, []
        for name in ("sample", "answer"):
            method = getattr(sampler, name)

            def noting(given, *a, name=name, f=method, **kw):
                calls.append((name, given))
                return f(given, *a, **kw)

            monkeypatch.setattr(sampler, name, noting)
        answerer = Answerer(sampler, tokenizer, problems, arguments, vocabulary, own=lambda mode: pytest.fail("asked"))
        return answerer.answer("abstract", "own", range(len(problems))), calls

    whole, calls = run(None)
    assert [name for name, _ in calls] == ["sample", "answer"]
    spans, calls = run(200)
    assert spans == whole
    samples = [i for i, (name, _) in enumerate(calls) if name == "sample"]
    assert len(samples) > 3
    for i in samples:
        given, answered = calls[i][1], calls[i + 1][1]
        assert calls[i + 1][0] == "answer" and [a[: len(p)] for a, p in zip(answered, given, strict=True)] == given
        assert sum(len(p) + 8 + arguments.max_new_tokens for p in given) <= 200


def test_an_unmerged_adapter_is_refused_in_every_mode(checkpoint, evaluated, tmp_path):
    _, arguments, _ = evaluated
    (tmp_path / "adapter_config.json").write_text("{}")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path)
    fields = {"model": str(tmp_path), "problems": arguments.problems, "output_dir": str(tmp_path / "x")}
    for mode in ("verbal", "direct", "abstract"):
        with pytest.raises(ValueError, match="is an adapter; run `abscot merge"):
            evaluate(EvaluateArguments(**fields, modes=[mode], instruction=False))


def test_damaged_parts_are_named(checkpoint, evaluated, tmp_path, monkeypatch):
    """Cut within a line, at a line's end, or without the settings they were made with: never joined."""
    _, arguments, _ = evaluated
    fields = {"model": str(checkpoint), "problems": arguments.problems, "output_dir": str(tmp_path / "out")}
    args = EvaluateArguments(**fields, instruction=False, limit=4, part_answers=2, swaps=["own"], max_new_tokens=4)
    write = Parts.write

    def killed(self, number, records):
        write(self, number, records)
        raise KeyboardInterrupt

    monkeypatch.setattr(Parts, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(args)
    monkeypatch.undo()
    part, settings = (tmp_path / "out.parts" / name for name in ("000000.jsonl", "settings.json"))
    text, begun = part.read_text(), settings.read_text()
    for damaged in (text[:-20], text.splitlines(keepends=True)[0], ""):
        part.write_text(damaged)
        with pytest.raises(ValueError, match="000000.jsonl is damaged .* remove it"):
            evaluate(args)
    part.write_text(text)
    settings.write_text("[1]")
    with pytest.raises(ValueError, match="settings.json is damaged .* remove"):
        evaluate(args)
    settings.unlink()
    with pytest.raises(ValueError, match="holds finished work, but not the settings"):
        evaluate(replace(args, seed=5))
    settings.write_text(begun)
    assert evaluate(args)[0]["n"] == 4
