"""Swaps, token counts, results and plots, by hand and by property; and the files of an evaluation."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from abscot_trl.data.problems import load_problems
from abscot_trl.data.toy import chain_arithmetic
from abscot_trl.evaluation.answering import Answerer, verbal_reasoning_tokens
from abscot_trl.evaluation.arguments import EvaluateArguments
from abscot_trl.evaluation.evaluate import evaluate
from abscot_trl.evaluation.report import ReportArguments, read_results, report, results_table
from abscot_trl.evaluation.swaps import swap_traces
from abscot_trl.examples import prompt_ids
from abscot_trl.scripts.demo import write_problems
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


def test_continuations_equal_plain_greedy_steps(checkpoint):
    """Batched, left-padded decoding against one row at a time with argmax and no cache."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    prefixes = [prompt_ids(e.prompt, tokenizer) for s in (2, 4) for e in chain_arithmetic(10, s, 5, seed=0)]
    found = HFTraceSampler(model, tokenizer, None, batch_tokens=100).answer(prefixes, max_new_tokens=12)
    for prefix, continuation in zip(prefixes, found, strict=True):
        ids, expected = list(prefix), []
        while len(expected) < 12:
            with torch.no_grad():
                token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            expected.append(token)
            ids.append(token)
        assert continuation.token_ids == expected
        assert continuation.truncated == (len(expected) == 12)


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
    folder, _, results = evaluated
    assert results == json.loads((folder / "out" / "results.json").read_text())
    answers = [json.loads(line) for line in (folder / "out" / "answers.jsonl").read_text().splitlines()]
    assert [(r["mode"], r["swap"]) for r in results] == [
        ("verbal", "own"),
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
    own, cut = ([a["trace"] for a in answers if a["swap"] == s and a["mode"] == "abstract"] for s in ("own", "cut:2"))
    assert cut == [t[:2] for t in own] and all(1 <= len(t) <= 6 for t in own)


def test_grades_are_the_problems_own(checkpoint, evaluated, monkeypatch):
    """A decoder that answers some problems right and some wrong: the accuracy is exactly that share."""
    _, arguments, _ = evaluated
    tokenizer, problems = AutoTokenizer.from_pretrained(checkpoint), load_problems(arguments.problems)

    def oracle(self, prefixes, *args, **kwargs):
        texts = [f"\\boxed{{{p.gold if i % 4 else (int(p.gold) + 1) % 5}}}" for i, p in enumerate(problems)]
        return [Continuation(tokenizer(t, add_special_tokens=False)["input_ids"], False) for t in texts]

    monkeypatch.setattr(HFTraceSampler, "answer", oracle)
    vocabulary = AbstractVocabulary.load(checkpoint)
    sampler = HFTraceSampler(AutoModelForCausalLM.from_pretrained(checkpoint), tokenizer, vocabulary)
    results, _ = evaluate_model(sampler, tokenizer, problems, arguments, vocabulary)
    assert {row["accuracy"] for row in results} == {75.0} and {row["answer_tokens"] for row in results} == {3.0}


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
    with pytest.raises(ValueError, match="swap 'mine'"):
        EvaluateArguments(**fields, swaps=["mine"])
    with pytest.raises(FileExistsError):
        evaluate(EvaluateArguments(**{**fields, "output_dir": arguments.output_dir}, instruction=False))
    plain = tmp_path / "plain"
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(plain)
    with pytest.raises(FileNotFoundError, match="abstract_vocabulary.json"):
        evaluate(EvaluateArguments(**{**fields, "model": str(plain)}))
    with pytest.raises(FileNotFoundError, match="no results"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="no list of results"):
        read_results(tmp_path)


def test_hotpotqa_is_scored_by_f1(checkpoint, tmp_path, monkeypatch):
    """A HotpotQA row is graded as its instruction asked, whatever the task is called."""
    from abscot_trl.evaluation import evaluate as module
    from abscot_trl.examples import Example

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    row = {"prompt": [{"role": "user", "content": "1"}], "cot": "", "answer": "", "source": "hotpotqa"}
    problems = [Example(**row, gold="1 2 3 4", id=str(i)) for i in range(4)]
    said = ["1;2;3;4", "1;2", "5", "1;2;3;4;5;6"]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in said]
    monkeypatch.setattr(HFTraceSampler, "answer", lambda *_, **__: [Continuation(i, False) for i in ids])
    monkeypatch.setattr(module, "short_answer", lambda response: response.replace(";", " "))
    arguments = EvaluateArguments(str(checkpoint), "p", str(tmp_path), modes=["direct"], instruction=False)
    sampler = HFTraceSampler(AutoModelForCausalLM.from_pretrained(checkpoint), tokenizer, None)
    results, answers = evaluate_model(sampler, tokenizer, problems, arguments)
    f1 = [1.0, 2 * 1.0 * 0.5 / 1.5, 0.0, 2 * (4 / 6) * 1.0 / (4 / 6 + 1.0)]
    assert [a["score"] for a in answers] == pytest.approx(f1)
    half = 196 * np.std(f1, ddof=1) / 2
    assert results[0]["ci95"] == pytest.approx([max(0, 100 * np.mean(f1) - half), min(100, 100 * np.mean(f1) + half)])


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
    prompts = [prompt_ids(problem.prompt, tokenizer) for problem in problems]

    def run(cache_tokens):
        sampler = HFTraceSampler(AutoModelForCausalLM.from_pretrained(checkpoint), tokenizer, vocabulary)
        sampler.cache_tokens, calls = cache_tokens, []
        for name in ("sample", "answer"):
            method = getattr(sampler, name)
            monkeypatch.setattr(
                sampler, name, lambda given, *a, name=name, f=method: calls.append((name, given)) or f(given, *a)
            )
        return answer_after_traces(sampler, prompts, arguments, vocabulary, vocabulary.ids(tokenizer)), calls

    whole, calls = run(None)
    assert [name for name, _ in calls] == ["sample"] + ["answer"] * 6
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
