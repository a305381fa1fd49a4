"""
The first round's traces that are drawn by length only (section 3.2); those of what later text reads are in `content`.

Traces are codebook indices 0..M-1 here, delimiters left out.
"""

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

RANDOM_METHODS = ("uniform", "cycle", "power_law")


def cot_steps(cot: str) -> list[str]:
    """The steps of a verbal CoT: its non-blank lines."""
    return [line for line in cot.split("\n") if line.strip()]


def random_trace(method: str, step_lengths: list[int], vocabulary_size: int, m_max: int, rng: Any) -> list[int]:
    """
    As many abstract tokens as the sum of rand(1, l/2) over steps of l tokens, cut at `m_max`.

    Args:
        method (`str`): `uniform`; `cycle`, through the codebook from its first token; or `power_law`, token k with
            probability proportional to 1 / (k + 1).
        rng: anything with `random() -> float` in [0, 1): `random.Random` or `numpy.random.Generator`.

    Returns:
        `list[int]`: codebook indices 0..`vocabulary_size` - 1.
    """
    length = min(sum(1 + int(rng.random() * max(1, tokens // 2)) for tokens in step_lengths), m_max)
    if method == "uniform":
        return [int(rng.random() * vocabulary_size) for _ in range(length)]
    if method == "cycle":
        return [i % vocabulary_size for i in range(length)]
    cumulative = np.cumsum(1.0 / np.arange(1, vocabulary_size + 1))
    return [int(np.searchsorted(cumulative, rng.random() * cumulative[-1])) for _ in range(length)]


def uniform_trace(
    cot: str, vocabulary_size: int, m_max: int, rng: Any, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """`random_trace` of a text, each of its steps tokenised alone; a prepared row has the lengths of its steps."""
    lengths = [len(tokenizer(step, add_special_tokens=False)["input_ids"]) for step in cot_steps(cot)]
    return random_trace("uniform", lengths, vocabulary_size, m_max, rng)
