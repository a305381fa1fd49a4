"""Tiny models, a checkpoint and rows, made here: no test touches the network."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers import (
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from abscot_trl.checkpoint import extend_model, save_checkpoint
from abscot_trl.data.toy import toy_tokenizer
from abscot_trl.vocabulary import AbstractVocabulary


def tiny_model(family: str = "qwen3", layers: int = 2, vocabulary: int = 64, tied: bool = True, **kwargs):
    """A random model of `family`, width 64, in float32."""
    common = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        **kwargs,
    }
    torch.manual_seed(0)
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(head_dim=32, **common)).eval()
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**common)).eval()
    return GraniteMoeHybridForCausalLM(
        GraniteMoeHybridConfig(
            **common,
            layer_types=["full_attention"] * layers,
            num_local_experts=0,
            shared_intermediate_size=96,
            position_embedding_type="rope",
        )
    ).eval()


def make_checkpoint(folder, family: str = "qwen3", tied: bool = True) -> None:
    """An extended checkpoint: tiny model (a tied Qwen3), toy tokenizer, codebook of 8, traces of 1 to 6 tokens."""
    folder.mkdir(exist_ok=True)
    tokenizer, vocabulary = toy_tokenizer(), AbstractVocabulary(size=8, m_min=1, m_max=6)
    model = tiny_model(family, vocabulary=40, tied=tied)
    vocabulary.extend(tokenizer)
    extend_model(model, vocabulary.all_ids(tokenizer))
    save_checkpoint(model, tokenizer, vocabulary, folder)


def row(content="<think>\n1+1=2\n</think>\n\n2", earlier=(("user", "12="),), **kwargs):
    turns = [*earlier, ("assistant", content)]
    messages = [{"content": content, "role": role} for role, content in turns]
    return {"messages": messages, "dataset_source": "sums", "id": "a", **kwargs}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)
