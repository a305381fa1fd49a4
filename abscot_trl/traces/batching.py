"""Batches of like length under a token budget, for everything that reads many prefixes."""

from collections.abc import Iterator


def batches(lengths: list[int], batch_tokens: int) -> Iterator[list[int]]:
    """
    Indices grouped so that rows x longest stays within `batch_tokens`, longest first (memory trouble shows at once).

    A single row longer than the budget makes a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def cut(lengths: list[int], limit: int | None) -> list[range]:
    """Consecutive rows in parts of at most `limit` tokens (a longer row makes a part of its own); `None`: one part."""
    parts, start, tokens = [], 0, 0
    for row, length in enumerate(lengths):
        if limit is not None and row > start and tokens + length > limit:
            parts.append(range(start, row))
            start, tokens = row, 0
        tokens += length
    return [*parts, range(start, len(lengths))] if len(lengths) > start else parts


def left_pad(rows: list[list[int]], pad_token_id: int) -> tuple[list[list[int]], list[list[int]]]:
    """Rows padded on the left to the longest, and their 0/1 attention mask, both (B, L) as lists."""
    longest = max(map(len, rows))
    ids = [[pad_token_id] * (longest - len(row)) + list(row) for row in rows]
    return ids, [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
