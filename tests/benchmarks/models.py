"""Models of real shapes with random weights, rows of random ids, and a trainer on them: what the benchmarks share."""

import os
import random
from contextlib import contextmanager

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tempfile
from collections.abc import Iterator

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    TrainerCallback,
)
from trl import ModelConfig

from abscot_trl.data.toy import toy_tokenizer
from abscot_trl.training.adapters import lora_config
from abscot_trl.training.bottleneck import BottleneckSFTTrainer
from abscot_trl.training.configs import BottleneckConfig
from abscot_trl.vocabulary import AbstractVocabulary

GIB = 2**30
RANK, ALPHA = 32, 64
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
SHAPE += ("num_attention_heads", "num_key_value_heads")


def qwen3(*sizes: int) -> dict:
    return dict(zip(SHAPE, sizes, strict=True)) | {"head_dim": 128}


QWEN3_06B = qwen3(151936, 1024, 3072, 28, 16, 8)
QWEN3_17B = qwen3(151936, 2048, 6144, 28, 16, 8)
QWEN3_4B = qwen3(151936, 2560, 9728, 36, 32, 8)
SMOLLM2_135M = dict(zip(SHAPE, (49280, 576, 1536, 30, 9, 3), strict=True)) | {"head_dim": 64, "llama": True}
SMALL = qwen3(512, 512, 1024, 3, 8, 2)
TINY = qwen3(512, 64, 96, 2, 2, 1)


def config_of(shape: dict) -> PretrainedConfig:
    kind = LlamaConfig if shape.get("llama") else Qwen3Config
    sizes = {key: value for key, value in shape.items() if key != "llama"}
    return kind(tie_word_embeddings=True, use_cache=False, pad_token_id=0, max_position_embeddings=65536, **sizes)


def build_model(shape: dict, device: str, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """A random tied model, made on the device itself; the same weights at every call."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config_of(shape), dtype=dtype, attn_implementation=attention)
    return model.train()


def extended_tokenizer() -> tuple[PreTrainedTokenizerBase, AbstractVocabulary]:
    """A tokenizer with the 66 abstract tokens; its ids lie below 128."""
    tokenizer, vocabulary = toy_tokenizer(), AbstractVocabulary()
    vocabulary.extend(tokenizer)
    return tokenizer, vocabulary


def training_row(lengths: dict[str, int], vocab_size: int, rng: random.Random | None = None) -> dict[str, list[int]]:
    """Random ids; without `rng` the same at every call."""
    rng = rng or random.Random(0)
    row = {f"{part}_ids": rng.choices(range(128, vocab_size), k=lengths[part]) for part in ("prompt", "cot", "answer")}
    return row | {"trace": rng.choices(range(64), k=lengths["trace"])}


def long_lengths(total: int) -> dict[str, int]:
    """One row of `total` tokens, nine tenths of them CoT."""
    parts = {"prompt": max(total // 27, 4), "trace": max(total // 64, 4), "answer": max(total // 23, 4)}
    return parts | {"cot": total - 2 - sum(parts.values())}  # 2: the trace's delimiters


def short_lengths(rng: random.Random) -> dict[str, int]:
    """A row of some 190 tokens, as GSM-Symbolic's in SmolLM2's tokenizer."""
    bounds = {"prompt": (40, 90), "cot": (40, 140), "answer": (4, 20), "trace": (3, 14)}
    return {part: rng.randint(*bound) for part, bound in bounds.items()}


@contextmanager
def trainer_on(
    model: PreTrainedModel, rows: list[dict], fields: dict, lora: int | None, callback: TrainerCallback | None = None
) -> Iterator[BottleneckSFTTrainer]:
    """`BottleneckSFTTrainer` as the recipes run it; with LoRA of rank `lora`."""
    tokenizer, vocabulary = extended_tokenizer()
    peft = {"use_peft": lora is not None, "lora_r": lora or 1, "lora_alpha": ALPHA, "lora_dropout": 0.0}
    fixed = {"bf16": True, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    fixed["gauge_rows"] = 0  # no step is longer than the others
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        model.config._name_or_path = folder
        model_args = ModelConfig(model_name_or_path=folder, lora_target_modules=MODULES, **peft)
        yield BottleneckSFTTrainer(
            model=model,
            args=BottleneckConfig(folder, **fixed | fields),
            train_dataset=Dataset.from_list(rows),
            vocabulary=vocabulary,
            processing_class=tokenizer,
            peft_config=lora_config(model_args, vocabulary.all_ids(tokenizer)),
            callbacks=[callback] if callback else None,
        )
