"""What the benchmarks of sampling share: models of Qwen3's shapes with random weights, and prompts."""

import random
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from abscot_trl.data.toy import toy_tokenizer
from abscot_trl.vocabulary import AbstractVocabulary

SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {
    "4b": dict(zip(SHAPE, (2560, 9728, 36, 32, 8), strict=True)),
    "0.6b": dict(zip(SHAPE, (1024, 3072, 28, 16, 8), strict=True)),
    "tiny": dict(zip(SHAPE, (64, 96, 2, 2, 1), strict=True)),
}
ROWS = 151936  # of Qwen3's embedding; sampling costs by the row


def say(*words) -> None:
    print(time.strftime("%H:%M:%S"), *words, flush=True)


def make_model(folder: Path, shape: str, dtype: str = "bfloat16", m_max: int = 128) -> str:
    """
    An extended checkpoint, tied, with Qwen3's embedding rows and the toy tokenizer, unless it is there; some rows have
    no token, as there. It is made on a GPU if there is one.
    """
    if (folder / "abstract_vocabulary.json").is_file():
        return str(folder)
    tokenizer, vocabulary = toy_tokenizer(), AbstractVocabulary(m_max=m_max)
    vocabulary.extend(tokenizer)
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    rows = {"vocab_size": ROWS, "max_position_embeddings": 40960, "tie_word_embeddings": True}
    config = Qwen3Config(**SHAPES[shape], head_dim=32 if shape == "tiny" else 128, **special, **rows)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    torch.cuda.empty_cache()
    tokenizer.save_pretrained(folder)
    vocabulary.save(folder)
    return str(folder)


def random_prompts(model: str, lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Ordinary tokens, no two prompts with a common start."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    barred = {*AbstractVocabulary.load(model).all_ids(tokenizer), *tokenizer.all_special_ids}
    ordinary, rng = sorted(set(tokenizer.get_vocab().values()) - barred), random.Random(seed)
    return [rng.choices(ordinary, k=length) for length in lengths]
