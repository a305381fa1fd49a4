"""Trainers and training phases of a tiny model in this process, and what lies in their folders."""

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import ModelConfig

from abscot_trl.data.toy import chain_arithmetic
from abscot_trl.examples import answer_ids, cot_columns, prompt_ids
from abscot_trl.training.adapters import lora_config
from abscot_trl.training.baselines import BaselineTrainer
from abscot_trl.training.bottleneck import BottleneckSFTTrainer
from abscot_trl.training.configs import BaselineConfig, BottleneckConfig, DistillationConfig
from abscot_trl.training.distillation import SelfDistillationTrainer
from abscot_trl.training.phase import TrainArguments, train_bottleneck
from abscot_trl.vocabulary import AbstractVocabulary

LAST = {"max_steps": 7, "save_strategy": "steps", "save_steps": 3}  # 4 steps an epoch: the end lies within one


def rows(checkpoint, n: int = 16, trace: bool = True) -> Dataset:
    tokenizer, rng = AutoTokenizer.from_pretrained(checkpoint), np.random.default_rng(0)
    examples = [chain_arithmetic(1, 2 + i % 3, 5, seed=i)[0] for i in range(n)]
    return Dataset.from_dict(
        {
            "prompt_ids": [prompt_ids(e.prompt, tokenizer) for e in examples],
            "cot_ids": [cot_columns(e.cot, tokenizer)["cot_ids"] for e in examples],
            "answer_ids": [answer_ids(e.answer, tokenizer) for e in examples],
            "trace": [rng.integers(8, size=1 + i % 6).tolist() if trace else None for i in range(n)],
        }
    )


def settings(folder, **fields) -> dict:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 1.0e-2,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "pad_to_multiple_of": 8,
        "max_length": 128,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return {**defaults, **fields}


def token_ids(checkpoint) -> list[int]:
    vocabulary, tokenizer = AbstractVocabulary.load(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    return vocabulary.all_ids(tokenizer)


def lora(checkpoint):
    arguments = ModelConfig(
        model_name_or_path=str(checkpoint),
        use_peft=True,
        lora_r=4,
        lora_dropout=0.0,
        lora_target_modules=["q_proj", "down_proj"],
    )
    return lora_config(arguments, token_ids(checkpoint))


def run(checkpoint, folder, trainer=BottleneckSFTTrainer, data=None, peft_config=None, **fields):
    config = DistillationConfig if trainer is SelfDistillationTrainer else BottleneckConfig
    built = trainer(
        str(checkpoint),
        config(**settings(folder, **fields)),
        rows(checkpoint) if data is None else data,
        peft_config=peft_config,
    )
    built.train()
    return built


def build(checkpoint, folder, baseline, data=None, callbacks=None, **fields) -> BaselineTrainer:
    config = BaselineConfig(**settings(folder, baseline=baseline, **fields))
    return BaselineTrainer(
        str(checkpoint), config, rows(checkpoint, trace=False) if data is None else data, callbacks=callbacks
    )


def weights(trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def phase(checkpoint, inputs: dict, output, **changes) -> dict:
    given = inputs | {key: changes.pop(key) for key in ("data", "traces") if key in changes}
    model = ModelConfig(model_name_or_path=str(changes.pop("model", checkpoint)), dtype="float32")
    config = BottleneckConfig(**settings(output, **{"per_device_train_batch_size": 4} | changes))
    return train_bottleneck(TrainArguments(**given), config, model)


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def foreign(folder: Path) -> dict[str, bytes | None]:
    """A folder of somebody's: a note, another trainer's checkpoint, a hidden file."""
    (folder / "checkpoint-5").mkdir(parents=True)
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"weeks of work")
    (folder / "notes.txt").write_text("mine")
    (folder / ".hidden").write_text("mine")
    return contents(folder)
