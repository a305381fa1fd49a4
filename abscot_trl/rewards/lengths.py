"""
Optional shaping: what a completion's tokens cost. A completion is z (the trace), `<endabstract>`, y (the answer).

What the functions need to know comes first and by position: a column of the data is handed over by its name, and must
not take its place.
"""

from collections.abc import Sequence


def trace_length(end_id: int, budget: int, /, completion_ids: Sequence[list[int]], **_) -> list[float]:
    """From 0 down to -1: the share of `budget` that the tokens before `end_id` take, all of them where it is not."""
    return [_cost(_trace(ids, end_id), budget) for ids in completion_ids]


def answer_length(end_id: int, budget: int, /, completion_ids: Sequence[list[int]], **_) -> list[float | None]:
    """From 0 down to -1: the share of `budget` that the tokens after `end_id` take; `None` without that token."""
    answers = [len(ids) - _trace(ids, end_id) - 1 for ids in completion_ids]
    return [None if length < 0 else _cost(length, budget) for length in answers]


def _trace(ids: list[int], end_id: int) -> int:
    return ids.index(end_id) if end_id in ids else len(ids)


def _cost(length: int, budget: int) -> float:
    return -min(length / budget, 1.0)
