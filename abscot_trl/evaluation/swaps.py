"""
Does the answer depend on the trace? Answer again after it was swapped for another one (section 5, permutations).

Traces are codebook indices 0..M-1. Every swap draws per row, and keeps the length unless it says otherwise:

    own       the model's own trace
    random    as many codebook tokens, drawn uniformly
    shuffled  its own tokens, permuted row by row
    other     the trace of another problem
    none      an empty trace
    cut:<k>   its own first k tokens
"""

import numpy as np

SWAPS = ("own", "random", "shuffled", "other", "none")


def check_swap(name: str) -> None:
    """
    Raises:
        ValueError: `name` is no swap.
    """
    if name in SWAPS or (name.startswith("cut:") and name[4:].isdecimal()):
        return
    raise ValueError(f"swap {name!r} is not one of {', '.join(SWAPS)} or cut:<k>")


def swap_traces(traces: list[list[int]], swap: str, vocabulary_size: int, seed: int = 0) -> list[list[int]]:
    """
    The traces to answer after.

    Raises:
        ValueError: an unknown swap, or `other` with a single row.
    """
    check_swap(swap)
    rng = np.random.default_rng(seed)
    if swap == "own":
        return [list(trace) for trace in traces]
    if swap == "none":
        return [[] for _ in traces]
    if swap == "random":
        return [rng.integers(vocabulary_size, size=len(trace)).tolist() for trace in traces]
    if swap == "shuffled":
        return [rng.permutation(trace).tolist() for trace in traces]
    if swap == "other":
        if len(traces) < 2:
            raise ValueError("swap 'other' needs at least two problems")
        order = rng.permutation(len(traces))
        return [list(traces[order[(position + 1) % len(order)]]) for position in np.argsort(order)]
    return [list(trace[: int(swap[4:])]) for trace in traces]
