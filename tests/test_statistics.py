"""Intervals by simulation and by scipy, votes by hand, and rows that may not be written."""

import json
from copy import deepcopy
from itertools import permutations

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap

from abscot_trl.evaluation import statistics
from abscot_trl.evaluation.results import DECODING, FIGURES, ROW, read_results, write_results
from abscot_trl.evaluation.statistics import (
    majority_score,
    mean_interval,
    own_scores,
    paired_difference,
    summarise,
    wilson_interval,
)

RUNS = 1000


def coverage(draw, truth: float) -> float:
    found = [mean_interval(draw()) for _ in range(RUNS)]
    return float(np.mean([low <= 100 * truth <= high for low, high in found]))


@pytest.mark.parametrize(
    ("n", "k", "alpha", "beta"),
    [(200, 4, 2.0, 1.0), (200, 4, 0.3, 0.2), (200, 4, 30.0, 1.0), (30, 16, 0.5, 1.0), (500, 1, 8.0, 2.0)],
)
def test_coverage_with_variance_between_problems(n, k, alpha, beta):
    """Problems of their own difficulty, k answers each: about 95 of 100 intervals hold the mean."""
    rng = np.random.default_rng(0)
    covered = coverage(lambda: rng.binomial(k, rng.beta(alpha, beta, size=n)) / k, alpha / (alpha + beta))
    assert 0.92 < covered < 0.98
    naive = 0  # k answers taken for independent ones: this is what the problem as the unit avoids
    for _ in range(RUNS if (k, alpha) == (4, 0.3) else 0):
        correct = rng.binomial(k, rng.beta(alpha, beta, size=n)).sum()
        low, high = wilson_interval(int(correct), n * k)
        naive += low <= 100 * alpha / (alpha + beta) <= high
    assert naive < 0.8 * RUNS


@pytest.mark.parametrize("n", [30, 200])
def test_coverage_of_f1(n):
    """Many ones and zeros, the rest between."""
    rng = np.random.default_rng(1)

    def draw():
        u = rng.random(n)
        return np.where(u < 0.45, 1.0, np.where(u < 0.75, 0.0, rng.beta(2, 2, size=n)))

    assert 0.92 < coverage(draw, 0.45 + 0.25 / 2) < 0.98


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (10, 10), (404, 500), (1, 30)])
def test_of_one_right_or_wrong_answer_it_is_wilsons(correct, n):
    scores = [1.0] * correct + [0.0] * (n - correct)
    assert mean_interval(scores) == pytest.approx(wilson_interval(correct, n))
    # k answers that always agree are one answer.
    assert mean_interval([np.mean([score] * 7) for score in scores]) == pytest.approx(wilson_interval(correct, n))


def correlated(rng, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong after two traces: the same problems are hard for both; the second is 8 points worse."""
    hard = rng.beta(0.5, 0.5, size=n)
    return (rng.random(n) < np.clip(hard - 0.08, 0, 1)).astype(float), (rng.random(n) < hard).astype(float)


def test_paired_bootstrap_covers_and_is_narrower_than_unpaired(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    rng = np.random.default_rng(7)
    hard = rng.beta(0.5, 0.5, size=2_000_000)
    truth = 100 * (np.clip(hard - 0.08, 0, 1) - hard).mean()
    hits, width, unpaired = 0, [], []
    for run in range(800):
        a, b = correlated(rng, 200)
        _, (low, high) = paired_difference(a, b, seed=run)
        hits += low <= truth <= high
        width.append(high - low)
        unpaired.append(2 * 196 * (a.var(ddof=1) / 200 + b.var(ddof=1) / 200) ** 0.5)
    assert 0.925 < hits / 800 < 0.975
    assert np.mean(width) < 0.85 * np.mean(unpaired)


def test_paired_bootstrap_is_scipys():
    a, b = correlated(np.random.default_rng(3), 200)
    difference, (low, high) = paired_difference(a, b, seed=0)
    other = bootstrap(
        (a - b,), np.mean, n_resamples=20000, method="percentile", rng=np.random.default_rng(4)
    ).confidence_interval
    assert difference == pytest.approx(100 * (a.mean() - b.mean()))
    assert (low, high) == pytest.approx((100 * other.low, 100 * other.high), abs=0.6)
    assert paired_difference(a, b, seed=0) == (difference, (low, high))
    with pytest.raises(ValueError, match="200 and 199 problems"):
        paired_difference(a, b[1:])


def test_few_changed_answers_are_no_evidence():
    """Never an interval of one point; 0 left out of it only where McNemar's exact test comes near 5 % too."""
    for n, worse in ((2, 0), (2, 2), (4, 4), (100, 0), (500, 3), (500, 5), (8, 8), (500, 8)):
        _, (low, high) = paired_difference([0.0] * worse + [1.0] * (n - worse), [1.0] * n)
        assert low < high and (high < 0) == (binomtest(0, worse).pvalue < 0.05 if worse else False)
    averages = [0.5 + 0.125 * (i % 2) for i in range(30)]  # of 8 samples: what differs little weighs little
    _, (low, high) = paired_difference(averages, [0.5] * 30)
    assert 0 < low and high < 10


def test_majority():
    assert majority_score(["3", "3", "4"], [1.0, 1.0, 0.0]) == 1.0
    assert majority_score(["4", "4", "3"], [0.0, 0.0, 1.0]) == 0.0
    assert majority_score(["3", "4"], [1.0, 0.0]) == 0.5  # a tie counts for its share
    assert majority_score(["3", "4", "5", "3", "4"], [1.0, 0.0, 0.0, 1.0, 0.0]) == 0.5
    assert majority_score(["", "", "3"], [0.0, 0.0, 1.0]) == 1.0  # who states no answer does not vote
    assert majority_score(["", ""], [0.0, 0.0]) == 0.0
    for order in permutations(range(4)):  # ties do not depend on the order
        answers, scores = ["a", "a", "b", "b"], [1.0, 1.0, 0.0, 0.0]
        assert majority_score([answers[i] for i in order], [scores[i] for i in order]) == 0.5


DECODED = {"backend": "hf", "trace_temperature": 0.0, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
DECODED |= {"max_new_tokens": 9, "seed": 0}


OTHER = {"donor": "0"}


def records(swap: str, given: list[tuple[str, float]], gold: str = "3") -> list[dict]:
    """Two answers a problem."""
    common = {"model": "m", "task": "t", "mode": "abstract", "swap": swap, "gold": gold, "truncated": False}
    return [
        common
        | {"id": str(i // 2), "sample": i % 2, "answer": answer, "score": score}
        | {"trace_tokens": 4, "answer_tokens": 2 + i, "swapped": swap != "own"}
        | (OTHER | {"follows": i > 0, "follows_chance": None if i else False} if swap == "other" else {})
        for i, (answer, score) in enumerate(given)
    ]


def test_a_row_by_hand():
    own = records("own", [("3", 1.0), ("3", 1.0), ("3", 1.0), ("4", 0.0), ("5", 0.0), (None, 0.0)])
    swapped = records("random", [("\\text{3}", 1.0), ("4", 0.0), ("3", 1.0), ("4", 0.0), ("6", 0.0), (None, 0.0)])
    row = summarise(own, own, 2, "math", DECODED)
    assert (row["n"], row["samples"], row["metric"]) == (3, 2, "accuracy") and "difference" not in row
    assert (row["accuracy"], row["maj"], row["pass"]) == pytest.approx((50.0, 50.0, 200 / 3))
    assert (row["trace_tokens"], row["answer_tokens"], row["tokens"]) == (4, 4.5, 8.5)
    row = summarise(swapped, own, 2, "math", DECODED)
    assert row["difference"] == pytest.approx(100 * (1 / 3 - 1 / 2)) and row["changed"] == pytest.approx(2 / 6)
    hotpot = records("own", [("the Red Fox", 1.0), ("fox", 2 / 3)], gold="red fox")
    row = summarise(hotpot, hotpot, 2, "hotpotqa", DECODED)
    assert (row["metric"], row["em"], row["accuracy"]) == ("f1", 50.0, pytest.approx(100 * 5 / 6))


def test_a_figure_without_its_circumstances_is_not_written(tmp_path):
    own = records("own", [("3", 1.0), ("3", 1.0), ("3", 1.0), ("4", 0.0)])
    row = summarise(records("other", [("4", 0.0)] * 4), own, 2, "hotpotqa", DECODED)
    assert (row["follows"], row["follows_n"], row["follows_chance"]) == (75.0, 2, 0.0)
    assert row["repeats"] == 0.0  # all came after the traces of problem 0, whose own answers are 3
    cut = [record | {"truncated": record["id"] == "0"} for record in own]  # as far as they came
    assert "repeats" not in summarise(records("other", [("4", 0.0)] * 4), cut, 2, "hotpotqa", DECODED)
    path = tmp_path / "results.json"
    write_results(path, [row])
    assert read_results(path) == [row] and set(FIGURES) - set(row) == {"win_rate"}
    intervals = [interval for figure, interval in FIGURES.items() if figure in row]
    for name in (*ROW, *intervals, "difference", "changed", "follows_n", *(f"decoding.{key}" for key in DECODING)):
        lacking = deepcopy(row)
        del (lacking["decoding"] if name.startswith("decoding.") else lacking)[name.removeprefix("decoding.")]
        with pytest.raises(ValueError, match=rf"row '.*' lacks .*{name.replace('.', '[.]')}"):
            write_results(path, [row, lacking])
    with pytest.raises(ValueError, match="row 'm t abstract other': ci95 .* is no interval"):
        write_results(path, [row | {"ci95": [3.0, 1.0]}])
    with pytest.raises(ValueError, match="lacks decoding.backend, .*decoding.seed"):
        write_results(path, [{**row, "decoding": None}])
    lacking = {key: value for key, value in row.items() if key not in ("follows_n", "follows_ci95")}
    (tmp_path / "old.json").write_text(json.dumps([lacking]))
    with pytest.raises(ValueError, match="row 1: follows_ci95, follows_n missing"):
        read_results(tmp_path / "old.json")
    (tmp_path / "old.json").unlink()
    assert json.loads(path.read_text()) == [row] and list(tmp_path.iterdir()) == [path]


def test_own_scores(tmp_path):
    lines = records("own", [("3", 1.0), ("4", 0.0), ("3", 1.0), ("3", 1.0)]) + records("random", [("4", 0.0)] * 4)
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert own_scores(tmp_path / "answers.jsonl") == {"0": 0.5, "1": 1.0}
