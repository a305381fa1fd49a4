"""After another problem's trace, how often is the answer that problem's? Models that read it and that do not."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

from abscot_trl.data.toy import chain_arithmetic, write_problems
from abscot_trl.errors import Refused
from abscot_trl.evaluation.answering import SAMPLE, Answerer
from abscot_trl.evaluation.arguments import EvaluateArguments
from abscot_trl.evaluation.evaluate import evaluate
from abscot_trl.evaluation.grading import RIGHT, score, stated
from abscot_trl.evaluation.statistics import mean_interval, wilson_interval
from abscot_trl.evaluation.swaps import donors, swap_traces
from abscot_trl.examples import Example
from abscot_trl.storage import Parts
from abscot_trl.traces.constraint import Continuation, Trace
from abscot_trl.traces.hf import HFTraceSampler

N = 40
VALUES = [int(row.gold) for row in chain_arithmetic(N, 4, 5, seed=0)]
DONORS = donors(N)
UNSEEN = [DONORS[d] for d in DONORS]  # the donors' own donors
SAME = {"0": "0", "1": "3/3", "2": "4/2", "3": "3", "4": "\\text{4}"}  # what a problem's file calls its gold


def test_donors_are_those_of_the_swap():
    """As the swap has drawn them from the first: a cycle through all problems in random order."""
    for n, seed in ((2, 0), (7, 3), (300, [5, 2])):
        order = np.random.default_rng(seed).permutation(n)
        found = [int(order[(place + 1) % n]) for place in np.argsort(order)]
        assert donors(n, seed) == found and swap_traces([[i] for i in range(n)], "other", n, seed) == [
            [i] for i in found
        ]
    with pytest.raises(Refused, match="at least two problems"):
        donors(1)


@pytest.mark.parametrize(
    ("source", "golds"),
    [
        ("math", ["\\frac{1}{2}", "3", "x^2", "\\{1, 2\\}"]),
        ("gpqa", list("ABCD")),
        ("hotpotqa", ["Paris", "the Seine"]),
    ],
)
def test_a_stated_gold_is_right_for_it_alone(source, golds):
    for a in golds:
        assert [score(stated(a, source), b, source) >= RIGHT for b in golds] == [a == b for b in golds]


def test_hotpotqa_s_answer_is_the_donor_s_by_f1():
    """At least half of its words; a donor whose answer would do here as well is left out."""
    golds = ["the river Seine", "Paris", "Seine river"]
    problems = [Example([], "", "", gold, gold, "hotpotqa") for gold in golds]
    answerer = SimpleNamespace(problems=problems, donors=lambda sample: [1, 2, 0], grade=score)
    for response, follows in (("Answer: in Paris", True), ("Answer: perhaps somewhere in Paris", False)):
        found = Answerer._following(answerer, (0, 0), response)
        assert found == {"donor": "Paris", "follows": follows, "follows_chance": None}


@pytest.fixture
def arguments(checkpoint, tmp_path):
    """Problems whose golds come in two spellings, the second of which only the grader knows to be the same."""
    rows = chain_arithmetic(N, 4, 5, seed=0)
    rows = [replace(row, gold=SAME[row.gold]) if i % 3 == 0 else row for i, row in enumerate(rows)]
    problems = write_problems(tmp_path / "problems.jsonl", rows)
    fields = {"model": str(checkpoint), "problems": problems, "output_dir": str(tmp_path / "out")}
    return EvaluateArguments(**fields, swaps=["own", "other", "none"], instruction=False, max_new_tokens=10)


@pytest.fixture
def scripted(checkpoint, monkeypatch):
    """A model whose trace is its problem's value as a code, and whose answer is `answer(code, problem)`."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def script(answer):
        def sample(self, prefixes, m_max, m_min, temperature, seed, rows, *_):
            return [Trace([self.codebook[VALUES[row % SAMPLE]]]) for row in rows]

        def say(self, prefixes, length, temperature, seed, rows, *_, **__):
            codes = [self.codebook.index(p[-2]) if p[-2] != self.begin else None for p in prefixes]
            said = [f"\\boxed{{{answer(code, row % SAMPLE)}}}" for code, row in zip(codes, rows, strict=True)]
            return [Continuation(tokenizer(text, add_special_tokens=False)["input_ids"], False) for text in said]

        monkeypatch.setattr(HFTraceSampler, "sample", sample)
        monkeypatch.setattr(HFTraceSampler, "answer", say)

    return script


def answers_of(folder, swap="other"):
    lines = (folder / "answers.jsonl").read_text().splitlines()
    return [answer for answer in map(json.loads, lines) if answer["swap"] == swap]


def by_hand(said, donors):
    """Each problem: whether its answer is its donor's value; `None` where donor and problem have one value."""
    return [None if VALUES[i] == VALUES[d] else said[i] == VALUES[d] for i, d in enumerate(donors)]


def check(row, said):
    for name, others in (("follows", DONORS), ("follows_chance", UNSEEN)):
        found = [value for value in by_hand(said, others) if value is not None]
        assert 0 < len(found) < N and row[name] == pytest.approx(100 * np.mean(found))
        assert row[f"{name}_ci95"] == pytest.approx(wilson_interval(sum(found), len(found)))
        assert row["follows_n"] == len(found) or name != "follows"


def test_an_answer_read_off_the_trace_follows(arguments, scripted, tmp_path):
    scripted(lambda code, problem: code or 0)
    own, other, none = evaluate(arguments)
    assert own["accuracy"] == 100.0 and other["follows"] == 100.0 and other["accuracy"] < 40
    assert not {"follows", "follows_chance", "follows_n"} & (own.keys() | none.keys())
    said = [VALUES[d] for d in DONORS]
    check(other, said)
    answers, ids = answers_of(tmp_path / "out"), [a["id"] for a in answers_of(tmp_path / "out", "own")]
    assert [answer["donor"] for answer in answers] == [ids[d] for d in DONORS]
    assert [answer["follows"] for answer in answers] == by_hand(said, DONORS)
    assert not any("donor" in answer for answer in answers_of(tmp_path / "out", "own"))


def test_an_answer_may_repeat_what_its_trace_led_to_and_follow_no_gold(arguments, scripted):
    """A model that reads its traces wrongly: the answer of the donor itself, never the donor's gold."""
    scripted(lambda code, problem: ((code or 0) + 1) % 5 if problem % 3 else VALUES[problem])
    own, other, _ = evaluate(arguments)
    led_to = [(VALUES[i] + 1) % 5 if i % 3 else VALUES[i] for i in range(N)]
    said = [(VALUES[d] + 1) % 5 if i % 3 else VALUES[i] for i, d in enumerate(DONORS)]
    same = [said[i] == led_to[d] for i, d in enumerate(DONORS) if VALUES[i] != VALUES[d] and led_to[i] != led_to[d]]
    assert other["repeats"] == pytest.approx(100 * np.mean(same)) and 20 < other["repeats"] < 80 > other["follows"]
    assert other["repeats_ci95"] == pytest.approx(wilson_interval(sum(same), len(same))) and "repeats" not in own
    check(other, said)


def guess(problem):
    return int(np.random.default_rng(problem).integers(5))


@pytest.mark.parametrize(
    "answer",
    [
        lambda code, problem: 3,
        lambda code, problem: VALUES[problem],
        lambda code, problem: guess(problem),
        lambda code, problem: VALUES[problem] if code == VALUES[problem] else guess(problem),
    ],
    ids=["always the same", "knows without", "guesses", "guesses where its trace is odd"],
)
def test_a_model_that_does_not_follow_its_trace_does_so_by_chance(arguments, scripted, answer):
    scripted(answer)
    _, other, _ = evaluate(arguments)
    check(other, [answer(VALUES[d], i) for i, d in enumerate(DONORS)])
    assert other.get("repeats", 0) < 30  # always the same: there is no case to tell
    low, high = other["follows_chance_ci95"]
    assert low <= other["follows"] < high


def test_samples_have_donors_of_their_own(arguments, scripted, tmp_path):
    """The problem is the unit: the mean over its samples whose donor has another answer."""
    scripted(lambda code, problem: code if problem % 2 else 0)
    _, other = evaluate(replace(arguments, swaps=["own", "other"], samples=3, trace_temperature=1.0))
    drawn = [donors(N, seed) for seed in (0, [0, 1], [0, 2])]
    each = list(
        zip(*(by_hand([VALUES[d] if i % 2 else 0 for i, d in enumerate(by)], by) for by in drawn), strict=True)
    )
    means = [np.mean(counted) for group in each if (counted := [value for value in group if value is not None])]
    assert other["follows"] == pytest.approx(100 * np.mean(means)) and other["follows_n"] == len(means)
    assert other["follows_ci95"] == pytest.approx(mean_interval(means))
    assert [answer["follows"] for answer in answers_of(tmp_path / "out")] == [
        value for group in each for value in group
    ]


def test_one_gold_for_all_leaves_it_out(arguments, scripted, tmp_path):
    rows = [replace(row, gold="2") for row in chain_arithmetic(N, 4, 5, seed=0)]
    scripted(lambda code, problem: 2)
    _, other, _ = evaluate(replace(arguments, problems=write_problems(tmp_path / "one.jsonl", rows)))
    assert other["accuracy"] == 100.0 and not [name for name in other if name.startswith("follows")]
    assert {answer["follows"] for answer in answers_of(tmp_path / "out")} == {None}


def test_killed_anywhere_it_ends_in_the_same_files(arguments, scripted, tmp_path, monkeypatch):
    scripted(lambda code, problem: code if problem % 2 else 0)
    evaluate(replace(arguments, part_answers=7))
    write = Parts.write

    def killed(self, number, records):
        write(self, number, records)
        raise KeyboardInterrupt

    again = replace(arguments, part_answers=7, output_dir=str(tmp_path / "again"))
    monkeypatch.setattr(Parts, "write", killed)
    for _ in range(3 * 6):
        with pytest.raises(KeyboardInterrupt):
            evaluate(again)
    (part,) = [path for path in (tmp_path / "again.parts").glob("*.jsonl") if '"other"' in path.read_text()][:1]
    whole = part.read_text()  # of an earlier version: it would count for nothing
    part.write_text("".join(json.dumps({**json.loads(line), "follows": 0}) + "\n" for line in whole.splitlines()))
    with pytest.raises(Refused, match=f"{part} is damaged .follows is missing"):
        evaluate(again)
    part.write_text(whole)
    evaluate(again)
    for name in ("answers.jsonl", "results.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
