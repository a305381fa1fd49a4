"""
Does the answer depend on what precedes it? Answer again after it was swapped (section 5, permutations).

In abstract mode that is the trace, codebook indices 0..M-1. Every swap draws per row, and keeps the length unless it
says otherwise:

    own       the model's own trace
    random    as many codebook tokens, drawn uniformly
    shuffled  its own tokens, permuted row by row
    other     the trace of another problem (the results say how often the answer follows it: is that problem's)
    none      an empty trace
    cut:<k>   its own first k tokens

In verbal mode it is the chain of thought that the model wrote: `own`, `shuffled` (its lines, permuted row by row) and
`cut:<k>` (its first k tokens). The answer is then forced (`verbal_prefix`).
"""

import re

import numpy as np
from transformers import PreTrainedTokenizerBase

from abscot_trl.data.problems import HOTPOTQA, kind_of
from abscot_trl.errors import Refused
from abscot_trl.examples import PLAIN

SWAPS = {
    "verbal": ("own", "shuffled", "cut:<k>"),
    "direct": ("own",),
    "abstract": ("own", "random", "shuffled", "other", "none", "cut:<k>"),
}
THINK, THOUGHT = "<think>\n", "</think>"
_ANSWER_LINE = re.compile(r"^\W*Answer:", re.MULTILINE)


def check_swap(name: str) -> None:
    """
    Raises:
        Refused: `name` is no swap.
    """
    if not applies(name, "abstract"):
        raise Refused(f"swap {name!r} is not one of {', '.join(SWAPS['abstract'])}")


def applies(swap: str, mode: str) -> bool:
    """Whether `mode` knows `swap`."""
    return re.sub(r"^cut:[0-9]+$", "cut:<k>", swap) in SWAPS[mode] and swap != "cut:<k>"


def donors(n: int, seed: int | list[int] = 0) -> list[int]:
    """
    Whose trace the swap `other` gives each of `n` problems: never its own, and each trace once.

    Raises:
        Refused: a single problem.
    """
    if n < 2:
        raise Refused("swap 'other' needs at least two problems")
    order = np.random.default_rng(seed).permutation(n).tolist()
    following = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [following[problem] for problem in range(n)]


def swap_traces(
    traces: list[list[int]], swap: str, vocabulary_size: int, seed: int | list[int] = 0
) -> list[list[int]]:
    """
    The traces to answer after.

    Raises:
        Refused: an unknown swap, or `other` with a single row.
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
        return [list(traces[donor]) for donor in donors(len(traces), seed)]
    return [list(trace[: int(swap[4:])]) for trace in traces]


def answer_start(text: str) -> int | None:
    r"""
    Where the answer of a verbal response begins: after `</think>`, or at the line with the last `\boxed{}`, or
    at the last line that begins with "Answer:"; `None` where it states none.
    """
    if THOUGHT in text:
        return text.index(THOUGHT) + len(THOUGHT)
    if "\\boxed" in text:
        return text.rfind("\n", 0, text.rindex("\\boxed")) + 1
    lines = list(_ANSWER_LINE.finditer(text))
    return lines[-1].start() if lines else None


def swap_steps(responses: list[str], swap: str, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> list[list[int]]:
    """
    The chain of thought of each verbal response, swapped, as token ids. Its steps are its lines that are not blank;
    all of a response that states no answer is taken for its thought.
    """
    rng, swapped = np.random.default_rng(seed), []
    for response in responses:
        steps = own_steps(response)
        if swap == "shuffled":
            steps = [steps[i] for i in rng.permutation(len(steps))]
        ids = tokenizer("\n".join(steps), **PLAIN)["input_ids"]
        swapped.append(ids[: int(swap[4:])] if swap.startswith("cut:") else ids)
    return swapped


def own_steps(response: str) -> list[str]:
    """The lines of a verbal response that precede its answer, without the marks of a thought."""
    thought = response[: answer_start(response)].removeprefix(THINK).removesuffix(THOUGHT)
    return [line for line in thought.split("\n") if line.strip()]


def verbal_prefix(response: str, source: str, stub: str | None = None) -> tuple[str, str]:
    r"""
    What is written before and after a swapped chain of thought so that only the answer is left to write.

    Returns:
        The opening (`<think>` where the model had opened a thought, else nothing), and a newline, `</think>` where it
        had closed one, and `stub`: `\boxed{`, or for HotpotQA `Answer:`, unless another one is given.
    """
    if stub is None:
        stub = "Answer:" if kind_of(source) == HOTPOTQA else "\\boxed{"
    close = f"\n{THOUGHT}\n\n" if THOUGHT in response else "\n"
    return THINK if response.startswith(THINK) else "", close + stub
