"""
Rows of `results.json` from graded answers: means, their intervals, votes over samples, and paired differences.

The problem is the unit everywhere: the k answers of one problem are no k independent trials. All intervals are 95 %.
"""

import json
import math
from pathlib import Path
from statistics import fmean

import numpy as np

from abscot_trl.data.problems import GYM, HOTPOTQA, kind_of
from abscot_trl.errors import Refused
from abscot_trl.evaluation.grading import hotpot_scores, normal_form
from abscot_trl.evaluation.results import is_number

RESAMPLES = 5000  # of a bootstrap


def wilson_interval(correct: float, n: float) -> tuple[float, float]:
    """
    Wilson's 95 % interval of the accuracy `correct / n`, in points 0..100.

    Raises:
        Refused: `n` under 1, or `correct` outside 0..n.
    """
    if n < 1 or not 0 <= correct <= n:
        raise Refused(f"an interval needs 0 <= correct <= n and n >= 1, got correct={correct}, n={n}")
    z = 1.959963984540054  # the normal's 97.5 % quantile
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def mean_interval(scores: list[float]) -> tuple[float, float]:
    """
    Interval of the mean of per-problem scores in 0..1, in points.

    Wilson's, for as many right-or-wrong answers as would leave the mean as uncertain as these scores do:
    p (1 - p) / (variance / n). Of one right-or-wrong answer a problem that is n, and the interval is Wilson's own;
    answers to a problem that agree count once, those that vary count for more. Unlike a bootstrap or the plain normal
    it stays within 0..100 and never shrinks to a point (without any spread it takes n).
    """
    n, p, variance = len(scores), float(np.clip(fmean(scores), 0, 1)), float(np.var(scores))
    effective = max(float(n), p * (1 - p) * n / variance) if variance > 1e-12 else float(n)
    return wilson_interval(p * effective, effective)


def paired_difference(scores: list[float], reference: list[float], seed: int = 0) -> tuple[float, tuple[float, float]]:
    """
    The mean of `scores` less that of `reference`, two scores of each problem, and its percentile-bootstrap interval
    over the problems, in points.

    Two more problems are drawn from, one better and one worse by a typical difference (Agresti and Min,
    doi:10.1002/sim.1781): two or three problems that agree, or none that differ, would else seem to be certain.

    Raises:
        Refused: not as many scores on both sides.
    """
    if len(scores) != len(reference):
        raise Refused(f"paired scores of {len(scores)} and {len(reference)} problems: they must be the same ones")
    differences = 100 * (np.asarray(scores, float) - np.asarray(reference, float))
    changed = differences[differences != 0]
    typical = np.sqrt(np.mean(changed**2)) if len(changed) else 100.0
    drawn = np.append(differences, [typical, -typical])
    n, rng, means = len(drawn), np.random.default_rng(seed), []
    chunk = max(1, 2**20 // n)  # resamples at a time
    for start in range(0, RESAMPLES, chunk):
        draws = rng.integers(n, size=(min(chunk, RESAMPLES - start), n))
        means.append(drawn[draws].mean(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(differences.mean()), (float(low), float(high))


def majority_score(answers: list[str], scores: list[float]) -> float:
    """
    What the answer given most often scores: answers in normal form, one without an answer ("") does not vote. Of
    several that are given equally often each counts for its share, as if one were drawn; 0 when nobody votes.
    """
    votes: dict[str, list[float]] = {}
    for answer, score in zip(answers, scores, strict=True):
        if answer:
            votes.setdefault(answer, []).append(score)
    most = max(map(len, votes.values()), default=0)
    return fmean([fmean(given) for given in votes.values() if len(given) == most] or [0.0])


def by_problem(values: list, samples: int) -> list[list]:
    """What belongs to the `samples` answers of each problem, which stand together."""
    return [values[start : start + samples] for start in range(0, len(values), samples)]


def scores_by_problem(records: list[dict], samples: int) -> list[float]:
    """Each problem's mean score over its samples."""
    return list(map(fmean, by_problem([record["score"] for record in records], samples)))


def own_scores(path: Path) -> dict[str, float]:
    """
    Each problem's mean score after its own trace, from an `answers.jsonl`; none where a judge is to grade.

    Raises:
        Refused: a line that is no answer; names the file.
    """
    scores: dict[str, list[float]] = {}
    try:
        for record in map(json.loads, path.read_text().splitlines()):
            if (record["mode"], record["swap"]) == ("abstract", "own") and record["score"] is not None:
                if not is_number(record["score"], 0, 1):
                    raise Refused(f"score {record['score']!r:.20}")
                scores.setdefault(record["id"], []).append(record["score"])
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise Refused(f"{path} is damaged ({error!r:.300}); remove {path.parent} and evaluate again") from error
    return {problem: fmean(values) for problem, values in scores.items()}


def describe_answers(records: list[dict], samples: int, decoding: dict) -> dict:
    """What needs no grades: which answers, how many, their mean tokens, how they were decoded."""
    trace, answer = (fmean(record[key] for record in records) for key in ("trace_tokens", "answer_tokens"))
    return {
        **{key: records[0][key] for key in ("model", "task", "mode", "swap")},
        "n": len(records) // samples,
        "samples": samples,
        "trace_tokens": trace,
        "answer_tokens": answer,
        "tokens": trace + answer,
        "truncated": sum(record["truncated"] for record in records),
        "swapped": fmean(record["swapped"] for record in records),
        "decoding": decoding,
    }


def means_of(name: str, values: list[bool | None], samples: int) -> dict[str, list[float]]:
    """Problems' means of what could be told; nothing where it could be told of none."""
    groups = by_problem(values, samples)
    counted = [each for group in groups if (each := [value for value in group if value is not None])]
    return {name: list(map(fmean, counted))} if counted else {}


def summarise(records: list[dict], own: list[dict], samples: int, source: str, decoding: dict) -> dict:
    """
    One row of `results.json`.

    Args:
        records (`list[dict]`): the answers of one model, mode and swap, problem by problem.
        own (`list[dict]`): the same problems' answers without a swap; `records` itself for those.
        source (`str`): the problems' source: of HotpotQA `accuracy` is F1, and `em` is there too; of
            reasoning-gym it is the mean score, of which a task may give a part (`metric: score`).

    Returns:
        `dict`: with k samples a problem `accuracy` is avg@k; `maj` and `pass` (of F1: the best answer's) from k = 2.
        `changed`, `difference` and its interval compare a swap with `own`. Of swap `other`, `follows`: the share of
        answers that are those of the donor, the problem whose trace they came after, over the `follows_n` problems
        of which the donor has another answer; and `follows_chance`: the share that are those of a problem drawn
        likewise, whose trace they have not seen (what a model that does not read its trace comes to in `follows`).
        `repeats`: over those of them whose own trace led to another answer than the donor's did there, if that one
        was not cut off, the share of answers that are the donor's, right or wrong; `follows` cannot pass the share
        of traces that are right.
        A figure's interval is `<figure>_ci95`, `accuracy`'s is `ci95`.
    """
    figures = {"accuracy": scores_by_problem(records, samples)}
    kind = kind_of(source)
    forms = [normal_form(record["answer"], source) for record in records]
    if kind == HOTPOTQA:
        exact = [float(hotpot_scores(r["answer"] or "", r["gold"])[0]) for r in records]
        figures["em"] = list(map(fmean, by_problem(exact, samples)))
    if samples > 1:
        scores = by_problem([record["score"] for record in records], samples)
        figures["maj"] = list(map(majority_score, by_problem(forms, samples), scores))
        figures["pass"] = list(map(max, scores))
    for name in ("follows", "follows_chance") if records[0]["swap"] == "other" else ():
        figures |= means_of(name, [record[name] for record in records], samples)
    if "follows" in figures:
        ended = [r for r in own if r["answer"] is not None and not r["truncated"]]
        led_to = {(r["id"], r["sample"]): normal_form(r["answer"], source) for r in ended}
        same = []
        for record, form in zip(records, forms, strict=True):
            here, there = (led_to.get((record[name], record["sample"])) for name in ("id", "donor"))
            told = record["follows"] is not None and there is not None and here != there
            same.append(form == there if told else None)  # who always answers alike repeats nothing
        figures |= means_of("repeats", same, samples)
    metric = {HOTPOTQA: "f1", GYM: "score"}.get(kind, "accuracy")
    row = describe_answers(records, samples, decoding) | {"metric": metric}
    for name, values in figures.items():
        row[name] = 100 * fmean(values)
        row["ci95" if name == "accuracy" else f"{name}_ci95"] = list(mean_interval(values))
    if "follows" in figures:
        row["follows_n"] = len(figures["follows"])
    if own is not records:
        given = [normal_form(record["answer"], source) for record in own]
        row["changed"] = fmean(a != b for a, b in zip(forms, given, strict=True))
        row["difference"], interval = paired_difference(
            figures["accuracy"], scores_by_problem(own, samples), decoding["seed"]
        )
        row["difference_ci95"] = list(interval)
    return row
