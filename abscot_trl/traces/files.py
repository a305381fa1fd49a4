"""Trace files: one JSON object a line, with the row of the prepared data it belongs to."""

import json
from collections import Counter
from pathlib import Path

import numpy as np

from abscot_trl.vocabulary import AbstractVocabulary

TRACE_FILE = "traces.jsonl"


def write_traces(folder: str | Path, records: list[dict]) -> None:
    """Write records with `row` (index in the prepared data), `id`, `trace` (codebook indices) and more."""
    with open(Path(folder) / TRACE_FILE, "w") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


def read_traces(folder: str | Path, ids: list[str], vocabulary: AbstractVocabulary) -> list[dict]:
    """
    Read a trace file and check it against the prepared data and the codebook it is to be used with.

    Raises:
        FileNotFoundError: no trace file in `folder`.
        ValueError: a line that is no record, a row of other data or twice, or a trace that the codebook or m_max
            does not allow.
    """
    path = Path(folder) / TRACE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run `abscot traces` first")
    records, seen = [], set()
    with open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                row, trace, id = record["row"], record["trace"], record["id"]
                if type(row) is not int or not all(type(index) is int for index in trace):
                    raise TypeError("row and trace must be integers")
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path} line {number} is no trace record ({error}); make the traces again"
                ) from error
            if not 0 <= row < len(ids) or ids[row] != id:
                raise ValueError(
                    f"{path} line {number}: row {row} is {id!r} here and "
                    f"{ids[row] if 0 <= row < len(ids) else 'missing'!r} in the data; the traces belong to other data"
                )
            if not all(0 <= index < vocabulary.size for index in trace):
                raise ValueError(f"{path} line {number}: {trace} leaves the codebook of {vocabulary.size} tokens")
            if len(trace) > vocabulary.m_max or row in seen:
                wrong = "stands twice" if row in seen else f"has {len(trace)} tokens, m_max is {vocabulary.m_max}"
                raise ValueError(f"{path} line {number}: row {row} {wrong}; make the traces again")
            seen.add(row)
            records.append(record)
    if not records:
        raise ValueError(f"{path} is empty; make the traces again")
    return records


def summarise_traces(traces: list[list[int]], vocabulary_size: int) -> dict:
    """
    What a set of traces looks like: count, lengths, distinct traces and the entropy of their tokens (nats; the most
    it could be is ln M, given as `token_entropy_uniform`).
    """
    if not traces:
        raise ValueError("no traces to summarise")
    lengths = [len(trace) for trace in traces]
    counts = np.bincount([index for trace in traces for index in trace] or [0], minlength=vocabulary_size)
    shares = counts[counts > 0] / counts.sum()
    return {
        "traces": len(traces),
        "distinct": len({tuple(trace) for trace in traces}),
        "empty": lengths.count(0),
        "length_mean": float(np.mean(lengths)),
        "lengths": {str(length): n for length, n in sorted(Counter(lengths).items())},
        "tokens_used": int((counts > 0).sum()),
        "token_entropy": float(-(shares * np.log(shares)).sum()),
        "token_entropy_uniform": float(np.log(vocabulary_size)),
    }
