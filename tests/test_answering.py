"""What answers follow: truncated softmaxes, samples, pauses, and the model's own chain of thought, swapped."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sampling import truncated_softmax
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, AutoTokenizer

from abscot_trl.data.problems import load_problems
from abscot_trl.data.toy import chain_arithmetic, write_problems
from abscot_trl.evaluation.arguments import EvaluateArguments
from abscot_trl.evaluation.evaluate import evaluate
from abscot_trl.evaluation.statistics import mean_interval
from abscot_trl.evaluation.swaps import own_steps, swap_steps, verbal_prefix
from abscot_trl.examples import prompt_ids
from abscot_trl.traces.hf import HFTraceSampler
from abscot_trl.vocabulary import AbstractVocabulary


@pytest.fixture
def arguments(checkpoint, tmp_path):
    problems = write_problems(tmp_path / "problems.jsonl", chain_arithmetic(40, 4, 5, seed=0))
    fields = {"model": str(checkpoint), "problems": problems, "output_dir": str(tmp_path / "out")}
    return EvaluateArguments(**fields, instruction=False, max_new_tokens=10)


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


@pytest.fixture(scope="module")
def sampler(checkpoint):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    return HFTraceSampler(model, tokenizer, AbstractVocabulary.load(checkpoint))


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.8, 0), (1.0, 5), (0.8, 20), (0.7, 4)])
def test_answers_follow_the_truncated_softmax(sampler, top_p, top_k):
    """3000 first tokens against probabilities by hand: chi-square, none from outside, and no reserved one."""
    prefix = [3, 6, 31, 15, 4]
    with torch.no_grad():
        logits = sampler.model(torch.tensor([prefix])).logits[0, -1].double().numpy()
    assert top_k or truncated_softmax(logits, 2.5, top_p, top_k)[sampler.reserved].any()  # the ban is met
    expected = 3000 * truncated_softmax(logits, 2.5, top_p, top_k, sampler.reserved)
    found = sampler.answer([prefix] * 3000, 1, 2.5, seed=5, top_p=top_p, top_k=top_k)
    drawn = np.bincount([(o.token_ids or [1])[0] for o in found], minlength=len(expected))
    assert not drawn[expected == 0].any() and (expected > 0).sum() > 1
    often = expected >= 5
    observed = [*drawn[often], *([drawn[~often].sum()] if expected[~often].sum() > 0 else [])]
    wanted = [*expected[often], *([expected[~often].sum()] if expected[~often].sum() > 0 else [])]
    assert chisquare(observed, wanted).pvalue > 1e-3


def test_an_answer_s_draw_does_not_depend_on_the_others(sampler):
    """Alone, in other batches, in another order: the row's number and the seed fix it; traces are drawn apart."""
    tokenizer = AutoTokenizer.from_pretrained(sampler.model.name_or_path)
    prefixes = [prompt_ids(e.prompt, tokenizer) for s in (2, 4, 8) for e in chain_arithmetic(20, s, 5, seed=0)]
    whole = sampler.answer(prefixes, 12, 1.0, seed=3, top_p=0.9)
    small = HFTraceSampler(
        sampler.model, tokenizer, AbstractVocabulary.load(sampler.model.name_or_path), batch_tokens=60
    )
    assert small.answer(prefixes, 12, 1.0, seed=3, top_p=0.9) == whole
    some = [50, 3, 17]
    assert sampler.answer([prefixes[i] for i in some], 12, 1.0, 3, some, top_p=0.9) == [whole[i] for i in some]
    assert sum(a != b for a, b in zip(sampler.answer(prefixes, 12, 1.0, seed=4, top_p=0.9), whole, strict=True)) > 50
    same = sampler.answer([prefixes[0]] * 60, 12, 1.0, seed=3)
    assert len({tuple(answer.token_ids) for answer in same}) > 50
    for wrong in ({"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}):
        with pytest.raises(ValueError, match="0 < top_p <= 1 and top_k >= 0"):
            sampler.answer(prefixes[:1], 4, 1.0, **wrong)


def answers_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_samples(arguments, tmp_path):
    """Each a draw of its own that its number fixes, not how many there are, nor how the work was cut."""
    sampling = {"temperature": 1.0, "trace_temperature": 1.0, "top_p": 0.95, "max_new_tokens": 6, "samples": 3}
    arguments = replace(arguments, modes=["abstract"], swaps=["own", "other"], limit=10, **sampling)
    (row, *_) = evaluate(replace(arguments, output_dir=str(tmp_path / "a"), part_answers=7))
    first = answers_of(tmp_path / "a")
    assert [(a["id"], a["sample"]) for a in first if a["swap"] == "own"] == [
        (p.id, s) for p in load_problems(arguments.problems, limit=10) for s in range(3)
    ]
    evaluate(replace(arguments, output_dir=str(tmp_path / "b"), batch_tokens=100, limit=12, samples=4, swaps=["own"]))
    wanted = {(a["id"], a["sample"]) for a in first}
    again = [a for a in answers_of(tmp_path / "b") if a["swap"] == "own" and (a["id"], a["sample"]) in wanted]
    assert again == [a for a in first if a["swap"] == "own"]
    own = [first[start : start + 3] for start in range(0, 30, 3)]
    assert sum(len({tuple(a["trace"]) for a in group}) == 3 for group in own) >= 7
    other = [a for a in first if a["swap"] == "other"]
    for sample in range(3):  # the traces of one sample move among the problems; none stays with its own
        mine = [a["trace"] for a in first if (a["swap"], a["sample"]) == ("own", sample)]
        theirs = [a["trace"] for a in other if a["sample"] == sample]
        assert sorted(mine) == sorted(theirs)
    scores = [[a["score"] for a in group] for group in own]
    assert row["accuracy"] == pytest.approx(100 * np.mean(scores)) and row["n"] == 10 and row["samples"] == 3
    assert row["pass"] == pytest.approx(100 * np.mean([max(group) for group in scores]))
    assert row["maj"] <= row["pass"] and row["ci95"] == pytest.approx(mean_interval(np.mean(scores, axis=1)))
    greedy = replace(arguments, output_dir=str(tmp_path / "c"), trace_temperature=0.0, swaps=["own"])
    evaluate(greedy)
    answers = answers_of(tmp_path / "c")
    groups = [answers[start : start + 3] for start in range(0, 30, 3)]
    assert all(len({tuple(a["trace"]) for a in group}) == 1 for group in groups)
    assert sum(len({a["response"] for a in group}) > 1 for group in groups) >= 7


def test_greedy_answers_after_sampled_traces(arguments, tmp_path):
    """Each answer comes after a trace of its own; a mode in which nothing is drawn answers once."""
    arguments = replace(arguments, modes=["verbal", "abstract"], swaps=["own", "shuffled"], limit=10)
    arguments = replace(arguments, trace_temperature=1.0, part_answers=7)
    one = evaluate(replace(arguments, output_dir=str(tmp_path / "one")))
    found = evaluate(replace(arguments, output_dir=str(tmp_path / "four"), samples=4))
    assert [(row["mode"], row["swap"], row["n"], row["samples"]) for row in found] == [
        (mode, swap, 10, k) for mode, k in (("verbal", 1), ("abstract", 4)) for swap in ("own", "shuffled")
    ]
    assert found[:2] == one[:2] and "maj" not in found[0]
    answers = answers_of(tmp_path / "four")
    first = [answer for answer in answers if answer["sample"] == 0]
    assert first == answers_of(tmp_path / "one") and len(answers) == 10 * (1 + 1 + 4 + 4)
    own = [answer for answer in answers if (answer["mode"], answer["swap"]) == ("abstract", "own")]
    said = {}
    for answer in own:  # greedy: what follows a trace is fixed by it
        said.setdefault((answer["id"], *answer["trace"]), set()).add(answer["response"])
    assert len(said) > 25 and all(len(responses) == 1 for responses in said.values())
    scores = np.reshape([answer["score"] for answer in own], (10, 4))
    assert found[2]["accuracy"] == pytest.approx(100 * scores.mean())
    assert found[2]["ci95"] == pytest.approx(mean_interval(scores.mean(axis=1)))
    assert found[2]["pass"] == pytest.approx(100 * scores.max(axis=1).mean())


def test_pause_tokens(checkpoint, arguments, monkeypatch):
    """The baseline's prefix: so many first codebook tokens between the delimiters, and no trace is sampled."""
    given, answer = [], HFTraceSampler.answer
    monkeypatch.setattr(HFTraceSampler, "sample", lambda *_, **__: pytest.fail("a trace was sampled"))
    monkeypatch.setattr(
        HFTraceSampler,
        "answer",
        lambda self, prefixes, *a, **kw: given.extend(prefixes) or answer(self, prefixes, *a, **kw),
    )
    (row,) = evaluate(replace(arguments, swaps=["own"], pause_tokens=4))
    tokenizer, vocabulary = AutoTokenizer.from_pretrained(checkpoint), AbstractVocabulary.load(checkpoint)
    begin, end = vocabulary.begin_id(tokenizer), vocabulary.end_id(tokenizer)
    assert all(prefix[-6:] == [begin, *[vocabulary.ids(tokenizer)[0]] * 4, end] for prefix in given)
    assert row["trace_tokens"] == 4.0 and len(given) == 40


class Words:
    """A tokenizer of characters, for texts that the toy one has no words for."""

    def __call__(self, text, **_):
        return {"input_ids": [ord(character) for character in text]}

    def decode(self, ids, **_):
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("response", "source", "steps", "opening", "closing"),
    [
        ("One.\n\nTwo.\nSo \\boxed{3}.", "math", ["One.", "Two."], "", "\n\\boxed{"),
        (
            "<think>\nOne.\nTwo.\n</think>\n\n\\boxed{3}",
            "math",
            ["One.", "Two."],
            "<think>\n",
            "\n</think>\n\n\\boxed{",
        ),
        ("One.\nTwo.\nAnswer: three\nyes", "hotpotqa", ["One.", "Two."], "", "\nAnswer:"),
        ("One.\nTwo and then", "math", ["One.", "Two and then"], "", "\n\\boxed{"),  # cut off: all of it is thought
        ("\\boxed{3}", "math", [], "", "\n\\boxed{"),
    ],
)
def test_steps_of_a_verbal_chain_of_thought(response, source, steps, opening, closing):
    assert own_steps(response) == steps and verbal_prefix(response, source) == (opening, closing)
    assert verbal_prefix(response, source, "So")[1] == closing.rpartition("\n")[0] + "\nSo"
    (own,), (cut,) = (swap_steps([response], swap, Words()) for swap in ("own", "cut:6"))
    assert Words().decode(own) == "\n".join(steps) and cut == own[:6]


def test_steps_are_shuffled_row_by_row():
    response = "".join(f"Step {i}.\n" for i in range(8)) + "\\boxed{1}"
    found = [Words().decode(ids).split("\n") for ids in swap_steps([response] * 40, "shuffled", Words(), seed=2)]
    assert all(sorted(lines) == own_steps(response) for lines in found)
    assert len({tuple(lines) for lines in found}) > 35


def test_a_swapped_chain_of_thought_decides_the_answer(tmp_path):
    """The demo's base speaks its steps and is right; after shuffled or cut ones it answers at once, and worse."""
    base = Path(__file__).resolve().parents[1] / "recipes" / "demo" / "base"
    problems = write_problems(tmp_path / "problems.jsonl", chain_arithmetic(60, 6, 5, seed=7))
    fields = {"model": str(base), "problems": problems, "output_dir": str(tmp_path / "out"), "instruction": False}
    fields |= {"modes": ["verbal"], "swaps": ["own", "shuffled", "cut:12", "cut:99"], "max_new_tokens": 64}
    own, shuffled, cut, whole = evaluate(EvaluateArguments(**fields))
    assert own["accuracy"] == whole["accuracy"] == 100.0 and (own["trace_tokens"], own["answer_tokens"]) == (36.0, 3.0)
    assert shuffled["accuracy"] < 60 and shuffled["difference_ci95"][1] < 0 and shuffled["swapped"] > 0.95
    assert cut["accuracy"] < 60 and cut["trace_tokens"] == 12.0 and cut["swapped"] == 1.0
    assert (whole["swapped"], whole["changed"], whole["difference"]) == (0.0, 0.0, 0.0)
    answers = [a for a in answers_of(tmp_path / "out") if a["swap"] == "cut:12"]
    assert all(a["response"].startswith("\\boxed{") for a in answers) and len(answers) == 60
    assert all("\n" not in a["response"] and a["answer_tokens"] <= 4 for a in answers)  # it would have gone on
