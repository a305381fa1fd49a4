"""Trace files: one JSON object a line, with the row of the prepared data it belongs to."""

import json
from collections import Counter
from pathlib import Path

import numpy as np

TRACE_FILE = "traces.jsonl"


def write_traces(folder: str | Path, records: list[dict]) -> None:
    """Write records with `row` (index in the prepared data), `id`, `trace` (codebook indices) and more."""
    with open(Path(folder) / TRACE_FILE, "w") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


def read_traces(folder: str | Path, ids: list[str], vocabulary_size: int) -> list[dict]:
    """
    Read a trace file and check it against the prepared data and the codebook it is to be used with.

    Raises:
        FileNotFoundError: no trace file in `folder`.
        ValueError: a line that is no record, a row of other data, or an index outside the codebook.
    """
    path = Path(folder) / TRACE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run `abscot traces` first")
    records = []
    with open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                row, trace = record["row"], record["trace"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path} line {number} is no trace record ({error}); make the traces again"
                ) from error
            if not 0 <= row < len(ids) or ids[row] != record["id"]:
                raise ValueError(
                    f"{path} line {number}: row {row} is {record['id']!r} here and "
                    f"{ids[row] if 0 <= row < len(ids) else 'missing'!r} in the data; the traces belong to other data"
                )
            if not all(0 <= index < vocabulary_size for index in trace):
                raise ValueError(
                    f"{path} line {number}: trace {trace} leaves the codebook of {vocabulary_size} tokens"
                )
            records.append(record)
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
