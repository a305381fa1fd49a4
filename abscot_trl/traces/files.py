"""Trace files: one JSON object a line, with the row of the prepared data it belongs to."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from abscot_trl.errors import Refused
from abscot_trl.vocabulary import AbstractVocabulary

TRACE_FILE = "traces.jsonl"


def write_traces(folder: str | Path, records: Iterable[dict]) -> list[list[int]]:
    """
    Write records with `row` (index in the prepared data), `id`, `trace` (codebook indices) and more.

    Returns:
        The traces among them.
    """
    traces = []
    with open(Path(folder) / TRACE_FILE, "w") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
            traces.append(record["trace"])
    return traces


def read_traces(folder: str | Path, ids: list[str], vocabulary: AbstractVocabulary) -> list[dict]:
    """
    Read a trace file and check it against the prepared data and the codebook it is to be used with.

    Raises:
        Refused: no trace file in `folder`;
            a line that is no record, a row of other data or twice, or a trace that the codebook or m_max
            does not allow.
    """
    path = Path(folder) / TRACE_FILE
    if not path.is_file():
        raise Refused(f"{path} is missing; run `abscot traces` first")
    records, seen = [], set()
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                row, trace, id = record["row"], record["trace"], record["id"]
                if type(row) is not int or type(trace) is not list or not all(type(index) is int for index in trace):
                    raise TypeError("row and trace must be integers")
            except (ValueError, RecursionError, KeyError, TypeError) as error:
                raise Refused(f"{path} line {number} is no trace record ({error}); make the traces again") from error
            if not 0 <= row < len(ids) or ids[row] != id:
                raise Refused(
                    f"{path} line {number}: row {row} is {id!r:.80} here and "
                    f"{ids[row] if 0 <= row < len(ids) else 'missing'!r} in the data; the traces belong to other data"
                )
            if not all(0 <= index < vocabulary.size for index in trace):
                raise Refused(f"{path} line {number}: {trace!s:.200} leaves the codebook of {vocabulary.size} tokens")
            if len(trace) > vocabulary.m_max or row in seen:
                wrong = "stands twice" if row in seen else f"has {len(trace)} tokens, m_max is {vocabulary.m_max}"
                raise Refused(f"{path} line {number}: row {row} {wrong}; make the traces again")
            seen.add(row)
            records.append(record)
    if not records:
        raise Refused(f"{path} is empty; make the traces again")
    return records


def entropy(counts: np.ndarray) -> float:
    """In nats, of the distribution that `counts` (M,) are proportional to."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def summarise_traces(traces: list[list[int]], vocabulary: AbstractVocabulary) -> dict:
    """
    What a set of traces looks like.

    Returns:
        `dict`: how many, how many distinct and empty; lengths: mean, histogram, shares at m_min and m_max; tokens:
        how often each is used, how many are, their entropy in nats over all positions (`token_entropy`, at most ln M,
        `token_entropy_uniform`) and at each position, among the traces that reach it (`entropy_by_position`).

    Raises:
        Refused: no traces.
    """
    if not traces:
        raise Refused("no traces to summarise")
    lengths = np.array([len(trace) for trace in traces])
    counts = np.zeros((max(lengths.max(), 1), vocabulary.size), int)  # (position, token)
    for trace in traces:
        counts[np.arange(len(trace)), trace] += 1
    used = counts.sum(axis=0)
    return {
        "traces": len(traces),
        "distinct": len({tuple(trace) for trace in traces}),
        "empty": int((lengths == 0).sum()),
        "length_mean": float(lengths.mean()),
        "m_min": vocabulary.m_min,
        "m_max": vocabulary.m_max,
        "share_at_m_min": float((lengths == vocabulary.m_min).mean()),
        "share_at_m_max": float((lengths == vocabulary.m_max).mean()),
        "lengths": {str(length): n for length, n in sorted(Counter(lengths.tolist()).items())},
        "tokens_used": int((used > 0).sum()),
        "token_counts": used.tolist(),
        "token_entropy": entropy(used),
        "token_entropy_uniform": float(np.log(vocabulary.size)),
        "entropy_by_position": [entropy(row) for row in counts if row.sum()],
    }


def _bars(title: str, labels: Iterable, values: list[float], unit: str = "") -> list[str]:
    width = max(map(len, map(str, labels)))
    top = max(values) or 1
    return [title] + [
        f"  {label!s:>{width}} {'█' * round(40 * value / top):<40} {value:.10g}{unit}"
        for label, value in zip(labels, values, strict=True)
    ]


def describe_traces(summary: dict) -> str:
    """The summary for a terminal: what to look at first, then lengths, tokens and positions as bars."""
    if "lengths" not in summary:  # of a shard that is not the last
        return json.dumps(summary, indent=2)
    s, n = summary, summary["traces"]
    lines = [
        f"{n} traces, {s['distinct']} distinct, {s['empty']} empty, {s['dropped_too_long']} rows dropped (too long)",
        f"length {s['length_mean']:.1f} on average, {100 * s['share_at_m_min']:.1f} % at m_min {s['m_min']}, "
        f"{100 * s['share_at_m_max']:.1f} % at m_max {s['m_max']}",
        f"{s['tokens_used']} of {len(s['token_counts'])} tokens used, entropy {s['token_entropy']:.2f} of "
        f"{s['token_entropy_uniform']:.2f} nats",
    ]
    lines += _bars("traces by length", list(s["lengths"]), list(s["lengths"].values()))
    lines += _bars(
        "entropy by position (nats)",
        range(1, 1 + len(s["entropy_by_position"])),
        [round(value, 3) for value in s["entropy_by_position"]],
    )
    used = sorted(enumerate(s["token_counts"]), key=lambda item: -item[1])
    tokens = AbstractVocabulary(len(used)).tokens
    used = [(tokens[i], count) for i, count in used if count]
    lines += _bars("use of each token", *map(list, zip(*used, strict=True))) if used else []
    return "\n".join(lines)
