"""
How long training and sampling take: what a GPU multiplies, attends to and moves, and what it was measured to reach.

The constants are fitted to steps of Qwen3-4B's and SmolLM2-135M's shapes on an H100 (`recipes/SPEED.md`), six of which
they give within 6 %; `make bench-plan` holds them against steps that they were not fitted to.
"""

import os
import re
from dataclasses import dataclass, replace

import torch

from abscot_trl.errors import Refused
from abscot_trl.loop.memory import GIB, Shape, layer_activations

MATMUL = 0.69  # of the peak, in products with weights
ATTENTION = 0.43  # of the peak, in flex attention
MOVED = 4.6  # times what a layer keeps for backward is read or written in each pass
LAUNCH = 0.0017  # seconds: the host starts a layer's kernels in one pass
LAUNCH_ZERO3 = 0.0105  # the same under ZeRO-3, which gathers and frees weights by hooks (FSDP: not measured)
READING = 0.47  # of the peak, vLLM reading prefixes: 58,000 tokens/s of Qwen3-4B's shape on an H100


@dataclass(frozen=True)
class Card:
    """A GPU: dense bf16 peak in FLOP/s and bytes/s of its memory (`None` where they are not known), and its GiB."""

    name: str
    peak: float | None
    bandwidth: float | None
    gib: float


GPUS = {  # by the data sheets; the longer name first
    "a100": Card("a100", 312e12, 1.9e12, 79),
    "h100-pcie": Card("h100-pcie", 756e12, 2.0e12, 79),
    "h100-nvl": Card("h100-nvl", 835e12, 3.9e12, 93),
    "h100": Card("h100", 989e12, 3.35e12, 79),
    "h200-nvl": Card("h200-nvl", 835e12, 4.8e12, 139),
    "h200": Card("h200", 989e12, 4.8e12, 139),
}


def card_of(gpu: str | None) -> Card:
    """
    The card of that name, or any of so much memory (`24gb`); without one the GPU that is here, else an h100.

    Raises:
        Refused: neither a name of `GPUS` nor a memory.
    """
    if gpu is None and torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        name = card.name.lower().replace(" ", "-")
        known = [one for kind, one in GPUS.items() if kind in name and "mig" not in name] or [Card("", None, None, 0)]
        return Card(f"{card.name} (found here)", known[0].peak, known[0].bandwidth, card.total_memory / GIB)
    if gpu is None:
        return replace(GPUS["h100"], name="h100 (no GPU is here; `gpu` names another)")
    if gpu in GPUS:
        return GPUS[gpu]
    if size := re.fullmatch(r"([1-9]\d*)gb", gpu.lower()):
        return Card(f"{size[1]} GB GPU", None, None, int(size[1]) - 1)  # drivers keep some
    raise Refused(f"gpu {gpu!r:.80} is none of {', '.join(GPUS)}, and no memory such as 24gb")


def this_cpu() -> Card:
    """This machine's CPU, whose memory alone is known."""
    return Card("CPU", None, None, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB)


def batch_seconds(
    shape: Shape, recipe: dict, tokens: float, length: float, card: Card, zero: int = 0, forward: bool = False
) -> float:
    """
    Seconds of forward and backward over `tokens` that stand in documents of mean `length`, by one GPU of a known peak;
    with `forward` of that alone, by the same constants, which no such pass was held against.

    2 operations a parameter and token forward, 2 for the gradient of activations, 2 for that of the weights (full), 2
    when layers are computed again; causal attention 2 L q a token and layer forward, 2.5 times that backward; what
    layers keep, moved in each pass; weights read once a pass, and written in 16 bits first where they have 32. Not
    less than the host takes to start it all.
    """
    lora, again = bool(recipe.get("use_peft")), int(recipe.get("gradient_checkpointing", True))
    body = sum(a * b for name, a, b in shape.linear if name != "lm_head")
    factors = (4 + 2 * (not lora) + 2 * again, 3.5 + again, 3 + again, 2 + again)
    operations, attended, moved, passes = (2, 1, 1, 1) if forward else factors
    products = tokens * body * operations
    attention = tokens * 2 * length * shape.queries * shape.layers * attended
    kept = shape.layers * layer_activations(shape, int(tokens)) * moved
    weights = body * (2 if lora or recipe.get("dtype") in ("bfloat16", "float16") else 12) * passes
    seconds = (products / MATMUL + attention / ATTENTION) / card.peak + (MOVED * kept + weights) / card.bandwidth
    return max(seconds, (LAUNCH_ZERO3 if zero == 3 else LAUNCH) * shape.layers * passes)


def reading_seconds(shape: Shape, tokens: float, card: Card) -> float:
    """Seconds of reading `tokens` of prefixes, by one GPU."""
    return 2 * shape.parameters * tokens / (READING * card.peak)
