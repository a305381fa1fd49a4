"""
What training takes: parameters, steps, GPU memory, disk. From its config, without weights.

The terms are what torch holds at its peak; two constants were measured (tests/test_plan.py holds the table).
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from abscot_trl.checkpoint import empty_model
from abscot_trl.errors import Refused
from abscot_trl.training.steps import accumulation_of
from abscot_trl.vocabulary import AbstractVocabulary

GIB = 2**30
HEAD_COPIES = 4.1  # token rows: the head with its rows in place, its gradient, and that in 32 bits, in 2-byte copies
REST = 0.065 * GIB  # what no term explains
LIVE, BUCKET = 10**9, 5 * 10**8  # DeepSpeed's stage3_max_live_parameters and sub_group_size; reduce_bucket_size


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder: width d, query and key/value widths, MLP width; `linear` are its (name, in, out)."""

    parameters: int
    vocabulary: int
    width: int
    layers: int
    queries: int
    keys: int
    mlp: int
    tied: bool
    linear: tuple[tuple[str, int, int], ...]


@cache
def shape_of(path: str) -> Shape:
    """
    The shape of the model at `path` (a folder with config.json, or such a file), built on the meta device.

    Raises:
        Refused: no config.json there, or not one of a decoder.
    """
    file = Path(path) if Path(path).is_file() else Path(path) / "config.json"
    if not file.is_file():
        raise Refused(f"{file} is not there; run `abscot init` first, or give model_config")
    try:
        return shape_of_model(empty_model(file.parent if file.name == "config.json" else file))
    except (ValueError, OSError, AttributeError, KeyError, TypeError) as error:
        raise Refused(f"{file} is no configuration of a decoder ({error}); give that of another model") from error


def shape_of_model(model: PreTrainedModel) -> Shape:
    """
    Of a model that may be on the meta device.

    Raises:
        Refused: its config has other names for its sizes than Llama's, so that nothing can be reckoned.
    """
    try:
        return _shape(model.config, model)
    except AttributeError as error:
        raise Refused(f"{model.config.model_type}: its sizes are not named as a Llama's are ({error})") from error


def _shape(config: PretrainedConfig, model: PreTrainedModel) -> Shape:
    modules = model.named_modules()
    linear = [(n, m.in_features, m.out_features) for n, m in modules if isinstance(m, torch.nn.Linear)]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocabulary=config.vocab_size,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        queries=config.num_attention_heads * head_dim,
        keys=config.num_key_value_heads * head_dim,
        mlp=getattr(config, "shared_intermediate_size", None) or config.intermediate_size,
        tied=bool(config.tie_word_embeddings),
        linear=tuple(linear),
    )


def trained_parameters(shape: Shape, recipe: dict, codebook_size: int) -> int:
    """r (in + out) of each matrix LoRA adapts, and the token rows (M + 2) d, of head and embedding if untied."""
    if not recipe.get("use_peft"):
        return shape.parameters
    targets = recipe.get("lora_target_modules") or []
    every = targets in ("all-linear", ["all-linear"])
    matrices = [
        sizes for name, *sizes in shape.linear if (every and name != "lm_head") or name.rpartition(".")[2] in targets
    ]
    rows = (codebook_size + 2) * shape.width * (1 if shape.tied else 2)
    return recipe.get("lora_r", 16) * sum(map(sum, matrices)) + rows


def layer_activations(shape: Shape, tokens: int) -> int:
    """Bytes that one layer keeps for backward, with Liger's kernels and flex attention, in 16 bits."""
    return tokens * (4 * shape.width + 3 * shape.queries + 3 * shape.keys + 3 * shape.mlp) * 2


def layer_backward(shape: Shape, recipe: dict, tokens: int) -> int:
    """
    Bytes of one layer computed again, and the gradients of its hidden states and its MLP. Liger writes those of the
    MLP over its activations, a compiled layer does not: measured in one run, of 32,768 tokens.
    """
    mlp = (1 + 3.7 * bool(recipe.get("compile_layers"))) * shape.mlp
    return layer_activations(shape, tokens) + int(tokens * (2 * shape.width + mlp) * 2)


def lora_memory(shape: Shape, recipe: dict, trained: int, tokens: int, share: list[int], accumulates: bool) -> float:
    """
    2 bytes a frozen parameter, 12 a trained one (weight and moments in 32 bits), 4 for its gradient when they add up;
    what forward keeps; then the head's copies or, in longer rows, a layer's backward.
    """
    states = 2 * shape.parameters + (4 / share[0] + 4 * accumulates / share[1] + 8 / share[2]) * trained
    head = HEAD_COPIES * shape.vocabulary * shape.width * 2
    if not recipe.get("gradient_checkpointing", True):
        return states + shape.layers * layer_activations(shape, tokens) + head
    return states + shape.layers * tokens * shape.width * 2 + max(head, layer_backward(shape, recipe, tokens))


def full_memory(shape: Shape, recipe: dict, tokens: int, share: list[int], accumulates: bool) -> float:
    """
    16 bytes a parameter (weight, gradient, moments in 32 bits; 8 where a recipe's `dtype` has 16 bits, without ZeRO),
    and the larger of two: what backward begins with (all that forward kept, the hidden states in that dtype, the
    head's gradient in 32 bits and in 16) or ends with (the embedding's gradient before it is added to the head's).
    """
    size = 2 if recipe.get("dtype") in ("bfloat16", "float16") and max(share) == 1 else 4  # ZeRO keeps 32 bits
    sizes = (size, size, 2 * size)
    weights, gradients, moments = (n * shape.parameters / s for n, s in zip(sizes, share, strict=True))
    if share[0] > 1:
        return weights + gradients + moments + zero3_memory(shape, recipe, tokens, share[0])
    stream, head = tokens * shape.width * size, shape.vocabulary * shape.width * size
    if recipe.get("gradient_checkpointing", True):
        kept = shape.layers * stream + layer_backward(shape, recipe, tokens)
    else:
        kept = shape.layers * layer_activations(shape, tokens)
        if size == 4:  # and autocast's 16-bit weights
            kept += shape.layers * stream + 2 * sum(a * b for name, a, b in shape.linear if name != "lm_head")
    begin = gradients * accumulates + kept + 6 * shape.vocabulary * shape.width
    end = gradients + head + 2 * stream
    return weights + moments + max(begin, end)


def zero3_memory(shape: Shape, recipe: dict, tokens: int, gpus: int) -> float:
    """
    What DeepSpeed's ZeRO-3 takes beside its 16 bytes a parameter, which all GPUs share (weight and gradient in 16
    bits, weight and moments in 32). The model computes in 16 bits: a bucket of gradients, and the larger of what
    backward begins with (gathered weights, what forward kept, the head's gradient) and what the optimizer's step
    takes (gradients of a group of weights in 32 bits). FSDP gathers a layer at a time, and takes less.
    """
    kept = shape.layers * layer_activations(shape, tokens)
    if recipe.get("gradient_checkpointing", True):
        kept = shape.layers * tokens * shape.width * 2 + layer_backward(shape, recipe, tokens)
    begin = 2 * min(LIVE, shape.parameters) + kept + 2 * shape.vocabulary * shape.width
    return 2 * BUCKET + max(begin, 4 * min(LIVE, shape.parameters / gpus))


def training_memory(shape: Shape, recipe: dict, trained: int, tokens: int, stage: int = 0, gpus: int = 1) -> int:
    """
    Peak bytes on one GPU of a step of `tokens` positions at once (micro-batch x row length), AdamW, 16-bit compute.

    ZeRO `stage` 1 divides the moments by `gpus`, 2 the gradients too, 3 all (arXiv:1910.02054, section 5).
    """
    share = [gpus if stage >= level else 1 for level in (3, 2, 1)]  # of weights, gradients, moments
    accumulates = accumulation_of(recipe, gpus) > 1
    if recipe.get("use_peft"):
        return int(lora_memory(shape, recipe, trained, tokens, share, accumulates) + REST)
    return int(full_memory(shape, recipe, tokens, share, accumulates) + REST)


def saved_bytes(recipe: dict, launcher: dict) -> tuple[int, int]:
    """
    Bytes a trained parameter of a phase's result and of a training checkpoint, by the accelerate configuration.

    A weight and AdamW's two moments of its width; FSDP writes the weight once more, to go on from. DeepSpeed saves a
    16-bit model if it computes in 16 bits, and beside it 32-bit weights with their moments (12 bytes); below ZeRO-3 it
    writes the model twice.
    """
    if "deepspeed_config" in launcher:
        weight = 2 if recipe.get("bf16", True) or recipe.get("fp16") else 4
        return weight, weight * (1 if launcher["deepspeed_config"].get("zero_stage", 2) == 3 else 2) + 12
    weight = 2 if recipe.get("dtype") in ("bfloat16", "float16") and not recipe.get("use_peft") else 4
    return weight, weight * (4 if launcher.get("fsdp_config") else 3)


def training_disk(shape: Shape, recipe: dict, trained: int, launcher: dict) -> int:
    """Bytes of a phase's result and its checkpoints: one more than `save_total_limit` at the moment of writing."""
    result, checkpoint = saved_bytes(recipe, launcher)
    kept = 0 if recipe.get("save_strategy", "steps") == "no" else (recipe.get("save_total_limit") or 2) + 1
    return (result + kept * checkpoint) * (trained if recipe.get("use_peft") else shape.parameters)


def stage_disk(phase: str, settings: dict, launcher: dict | None = None) -> int:
    """
    Bytes that a stage of the warm-up will write at most, as far as its settings say.

    Training: `training_disk` by the accelerate configuration `launcher`; a merge, or a start of codes: the weights
    again; traces: their lines, twice while parts are joined.
    """
    if phase in ("merge", "init"):
        base = settings.get("base_model")
        if phase == "merge":
            adapter = json.loads((Path(settings["adapter"]) / "adapter_config.json").read_text())
            base = adapter["base_model_name_or_path"]
        return sum(file.stat().st_size for file in Path(base).glob("*.safetensors"))
    if phase == "traces" and settings.get("splits"):
        splits = json.loads(Path(settings["splits"]).read_text())["splits"]
        m_max = AbstractVocabulary.load(settings["model"]).m_max
        return 2 * len(splits[settings["part"]]) * (4 * m_max + 150)
    if phase not in ("bottleneck", "distill", "baseline", "grpo"):
        return 0
    path = settings["model_name_or_path"]
    shape, size = shape_of(str(path)), AbstractVocabulary.load(path).size
    trained = trained_parameters(shape, settings, size)
    return training_disk(shape, settings, trained, launcher or {})
