"""
What the codebook says: how often each token is used, and how much a trace tells about the answer.

Pure functions of traces (codebook indices) and gold answers; entropies and information in nats.
"""

import numpy as np

from abscot_trl.errors import Refused
from abscot_trl.traces.files import entropy, summarise_traces
from abscot_trl.vocabulary import AbstractVocabulary


def mean_log_rank(counts: np.ndarray) -> np.ndarray:
    """T = sum_r c_r ln r / n over the last axis, ranks by falling count: what a finite Zipf's likelihood sees."""
    ranked = -np.sort(-counts, axis=-1)
    return ranked @ np.log(np.arange(1, counts.shape[-1] + 1)) / ranked.sum(axis=-1)


def design_effect(traces: list[list[int]], counts: np.ndarray) -> float:
    """
    By how much T varies more between samples of traces than between samples of as many independent tokens; at least 1.

    Kish's ratio: the variance of T with a trace as the unit over the one with a token as the unit, ranks held.
    """
    log_rank = np.empty(len(counts))
    log_rank[np.argsort(-counts, kind="stable")] = np.log(np.arange(1, len(counts) + 1))
    off = log_rank - counts @ log_rank / counts.sum()
    by_trace = sum(off[trace].sum() ** 2 for trace in traces if trace)
    return float(max(1.0, by_trace / max(counts @ off**2, 1e-12)))


def fit_zipf(counts: np.ndarray, effect: float = 1.0, draws: int = 200, seed: int = 0) -> dict | None:
    """
    Exponent s of p(r) proportional to r**-s over ranks r = 1..M, and its 95 % interval.

    Maximum likelihood sets the mean log rank T equal to its expectation under s. Ranks come from the counts
    themselves, and sorted noise looks steep (uniform tokens too): so the expectation, and the interval, which inverts
    T's test (mean +- 1.96 standard deviations), are those of simulated counts that were ranked again. s >= 0.

    Args:
        counts (`np.ndarray`): uses of each token, shape (M,), zeros included.
        effect (`float`): `design_effect` of the traces; the interval is that of n / effect independent tokens.

    Returns:
        `exponent`, `interval` (lo, hi), `uncorrected` (plain maximum likelihood), `distance` (largest gap between the
        cumulated shares and the fit's: how far from a power law), `tokens`; `None` with fewer than two tokens in use.
    """
    counts = np.asarray(counts, float)
    if (counts > 0).sum() < 2:
        return None
    log_rank = np.log(np.arange(1, len(counts) + 1))
    observed, independent = float(mean_log_rank(counts)), max(2, round(counts.sum() / effect))

    def shares(s: np.ndarray) -> np.ndarray:
        weights = np.exp(-np.multiply.outer(s, log_rank))
        return weights / weights.sum(axis=-1, keepdims=True)

    grid = np.linspace(0.0, 20.0, 4001)  # T falls as s grows
    plain = float(np.interp(-observed, -(shares(grid) @ log_rank), grid))
    p = shares(np.array(plain))
    spread = 6 / np.sqrt(independent * max(p @ log_rank**2 - (p @ log_rank) ** 2, 1e-9))
    rng, near = np.random.default_rng(seed), np.linspace(0.0, min(20.0, plain + spread), 81)
    simulated = [mean_log_rank(rng.multinomial(independent, q, size=draws)) for q in shares(near)]
    mean, deviation = (np.array([getattr(t, kind)() for t in simulated]) for kind in ("mean", "std"))

    def crossing(curve: np.ndarray) -> float:
        return float(np.interp(-observed, -np.minimum.accumulate(curve), near))

    exponent = crossing(mean)
    ranked = -np.sort(-counts) / counts.sum()
    return {
        "exponent": exponent,
        "interval": [crossing(mean - 1.96 * deviation), crossing(mean + 1.96 * deviation)],
        "uncorrected": plain,
        "distance": float(np.abs(np.cumsum(ranked) - np.cumsum(shares(np.array(exponent)))).max()),
        "tokens": int(counts.sum()),
    }


def _codes(values: list) -> np.ndarray:
    index: dict = {}
    return np.array([index.setdefault(value, len(index)) for value in values])


def mutual_information(first: list, second: list, permutations: int = 100, seed: int = 0) -> dict:
    """
    Plug-in I(first; second) = H(first) + H(second) - H(both), beside what it is when nothing is shared.

    The plug-in is biased upwards, the more so the more values either takes; `baseline` is its mean over permutations
    of `second`, which keep both distributions and share nothing, `baseline_high` their 95 % quantile, `p` the share of
    permutations (the data's own order counted in) with at least as much.

    Raises:
        Refused: no pairs, or lists of unequal length.
    """
    if not first or len(first) != len(second):
        raise Refused(f"information needs pairs, got {len(first)} and {len(second)} values")
    a, b = _codes(first), _codes(second)
    size = int(b.max()) + 1
    apart = entropy(np.bincount(a)) + entropy(np.bincount(b))

    def information(order: np.ndarray) -> float:
        pairs = a * size + order
        few = size * (int(a.max()) + 1) < 10 * len(a) + 10_000
        return apart - entropy(np.bincount(pairs) if few else np.unique(pairs, return_counts=True)[1])

    rng, observed = np.random.default_rng(seed), information(b)
    shuffled = np.array([information(rng.permutation(b)) for _ in range(permutations)])
    return {
        "information": max(0.0, observed),
        "baseline": float(shuffled.mean()),
        "baseline_high": float(np.quantile(shuffled, 0.95)),
        "p": float((1 + (shuffled >= observed - 1e-12).sum()) / (1 + permutations)),
        "n": len(first),
    }


def analyse(traces: list[list[int]], golds: list[str], vocabulary: AbstractVocabulary) -> dict:
    """
    A model's own traces, one a problem, in problem order.

    Returns:
        `summarise_traces`, with `zipf` (`fit_zipf`), `gold_entropy`, `golds` (distinct ones), `positions`
        (`mutual_information` of token and gold at each position, among the traces that reach it) and `whole` (of trace
        and gold; `None` where no trace stands twice: it would equal H(gold) whatever the traces say).
    """
    summary, codes = summarise_traces(traces, vocabulary), _codes(golds)
    counts = np.array(summary["token_counts"])
    reach = [
        [i for i, trace in enumerate(traces) if len(trace) > position] for position in range(max(map(len, traces)))
    ]
    return summary | {
        "zipf": fit_zipf(counts, design_effect(traces, counts)),
        "gold_entropy": entropy(np.bincount(codes)),
        "golds": int(codes.max()) + 1,
        "positions": [
            mutual_information([traces[i][position] for i in rows], [golds[i] for i in rows])
            for position, rows in enumerate(reach)
        ],
        "whole": mutual_information([tuple(trace) for trace in traces], golds)
        if summary["distinct"] < len(traces)
        else None,
    }
