"""What a machine can train a model by: LoRA or all weights, and how many rows at once, by the plan's arithmetic."""

import re
from dataclasses import dataclass
from typing import Any

import torch

from abscot_trl.cli import accelerate_config_path
from abscot_trl.errors import Refused
from abscot_trl.loop.duration import GPUS, batch_seconds, card_of, this_cpu
from abscot_trl.loop.memory import GIB, Shape, trained_parameters, training_memory
from abscot_trl.loop.new_rows import Rows
from abscot_trl.phases import read_yaml
from abscot_trl.units import size_words

CODEBOOK, RANK = 64, 32
FULL = 0.5  # of a GPU's memory: full fine-tuning that takes no more leaves room for longer rows
MOST = 0.75  # of it: what a step may take, for allocators leave gaps
FUSED = ("llama", "qwen3")  # families whose compiled layers and Liger kernels were run


@dataclass(frozen=True)
class Hardware:
    """`gpus` of `gib` GiB each (0: a CPU and its memory), in words."""

    gpus: int
    gib: float
    words: str


def hardware_of(text: str) -> Hardware:
    """
    Raises:
        Refused: neither cpu, auto nor a number of GPUs and their GB.
    """
    if text == "auto" and torch.cuda.is_available():
        n, card = torch.cuda.device_count(), torch.cuda.get_device_properties(0)
        return Hardware(n, card.total_memory / GIB, f"{n} x {card.name}" if n > 1 else f"one {card.name}")
    if text in ("auto", "cpu"):
        return Hardware(0, this_cpu().gib, "a CPU")
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)gb", text.lower())
    if not found:
        raise Refused(
            f"hardware {text!r:.80} is none of cpu, auto and GPUs with their memory, such as 1x80gb or 8x80gb"
        )
    n, size = map(int, found.groups())
    return Hardware(n, card_of(f"{size}gb").gib, f"{n} x {size} GB" if n > 1 else f"one {size} GB GPU")


@dataclass(frozen=True)
class Form:
    """
    A tuning on a machine: accelerate's configuration, the recipe's fields, bytes a GPU, and the fewest it could take.
    """

    tuning: str
    hardware: Hardware
    accelerate: str
    recipe: dict[str, Any]
    memory: int
    least: int
    other: tuple[int, float] | None  # with gradient checkpointing the other way: bytes, time

    @property
    def processes(self) -> int | None:
        """`num_processes`, where it is not the configuration's own."""
        gpus = max(self.hardware.gpus, 1)
        return None if read_yaml(accelerate_config_path(self.accelerate)).get("num_processes") == gpus else gpus


def form_of(tuning: str, shape: Shape, family: str, hardware: Hardware, rows: Rows) -> Form:
    """The fastest settings of `tuning` that fit, by the plan's arithmetic; the smallest where none does."""
    gpus, cpu, lora = max(hardware.gpus, 1), not hardware.gpus, tuning == "lora"
    leaves = dict.fromkeys(name.rpartition(".")[2] for name, *_ in shape.linear if name != "lm_head")
    fixed = {"use_peft": lora, "dtype": "bfloat16" if lora and not cpu else "float32", "max_length": rows.longest}
    fixed |= {"lora_r": RANK, "lora_target_modules": list(leaves)} if lora else {}
    batch = min(8, rows.batch) if cpu else rows.batch
    fixed["global_batch_size"] = -(-batch // gpus) * gpus
    least = 1
    if cpu:  # 4096 tokens at once, or a row
        least = min(batch, 1 << (4096 // rows.longest or 1).bit_length() - 1)

    def option(checkpointing: bool, micro: int, stage: int) -> dict:
        compiles = family in FUSED and stage < 3 and not cpu  # ZeRO-3 gathers weights inside of a layer
        return fixed | {
            "gradient_checkpointing": checkpointing,
            "per_device_train_batch_size": micro,
            "compile_layers": compiles,
        }

    def memory(recipe: dict, stage: int) -> int:
        at_once = rows.longest * recipe["per_device_train_batch_size"]
        return training_memory(shape, recipe, trained_parameters(shape, recipe, CODEBOOK), at_once, stage, gpus)

    def seconds(recipe: dict) -> float:  # a token
        length = min(rows.row, rows.longest)
        at_once = (rows.longest if rows.packed else length) * recipe["per_device_train_batch_size"]
        return batch_seconds(shape, recipe, at_once, length, GPUS["h100"]) / at_once

    stage = 3 if not lora and gpus > 1 and memory(option(True, 1, 0), 0) > FULL * hardware.gib * GIB else 0
    name = "cpu" if cpu else "zero3" if stage else "ddp" if gpus > 1 else "single"
    if stage:  # one row at once and layers computed again: the same file serves two nodes, and few GPUs with offload
        recipe = option(True, 1, stage)
        took = memory(recipe, stage)
        return Form(tuning, hardware, name, recipe, took, took, None)
    micros = [least] if cpu else [m for m in (1, 2, 4, 8) if fixed["global_batch_size"] % (m * gpus) == 0]
    options = [option(again, micro, stage) for micro in micros for again in (False, True)]
    fitting = [recipe for recipe in options if memory(recipe, 0) <= MOST * hardware.gib * GIB] or [options[1]]
    best = min(map(seconds, fitting))
    recipe = next(recipe for recipe in fitting if seconds(recipe) <= 1.02 * best)
    turned = recipe | {"gradient_checkpointing": not recipe["gradient_checkpointing"]}
    other = memory(turned, 0), seconds(turned) / seconds(recipe)
    return Form(tuning, hardware, name, recipe, memory(recipe, 0), memory(options[1], 0), other)


def choose(shape: Shape, family: str, hardware: Hardware, rows: Rows) -> tuple[dict[str, Form], str, str]:
    """
    The forms of both tunings, which of them this machine takes, and why: full fine-tuning within half of its memory.

    Raises:
        Refused: not even LoRA fits.
    """
    forms = {tuning: form_of(tuning, shape, family, hardware, rows) for tuning in ("lora", "full")}
    lora, full = forms["lora"], forms["full"]
    of = f"of {hardware.gib:.0f} GiB{' a GPU' if hardware.gpus else ''}"
    least = size_words(full.least)
    if full.least <= FULL * hardware.gib * GIB:
        why = f"full fine-tuning, {_again(full)}: {size_words(full.memory)} {of}; it can do with {least}"
        return forms, "full", f"{why}, within half of it"
    if lora.memory > MOST * hardware.gib * GIB:
        raise Refused(
            f"{shape.parameters / 1e9:.1f}B parameters and rows of {rows.longest} tokens take "
            f"{lora.memory / GIB:.0f} GiB with LoRA and gradient checkpointing, {hardware.words} has "
            f"{hardware.gib:.0f}, a quarter of which stays free; take a larger GPU or a smaller model"
        )
    why = f"LoRA, {_again(lora)}: {size_words(lora.memory)} {of}; full fine-tuning takes {least} at least"
    if 0 < hardware.gpus < 8:  # full fine-tuning stands beside it, for accelerate_configs/zero3.yaml's 8 GPUs
        size = hardware.words.rpartition(" x ")[2].removeprefix("one ").removesuffix(" GPU")
        forms["full"] = form_of("full", shape, family, Hardware(8, hardware.gib, f"8 x {size}"), rows)
    return forms, "lora", f"{why}, over half of it"


def _again(form: Form) -> str:
    return f"with{'' if form.recipe['gradient_checkpointing'] else 'out'} gradient checkpointing"
