"""
`abscot plan` against truth: the peak memory it predicts and what a step of phase A takes on this GPU.

    python tests/benchmarks/bench_plan.py

Settings that its constants were not fitted to: other lengths, another rank, another size. Random weights.
"""

import argparse
import tempfile

import bench_train
import torch
from bench_train import MODULES, bench_ours
from transformers import Qwen3Config

from abscot_trl.memory import GIB, shape_of, trained_parameters, training_memory

SIZES = {  # d, layers, heads, d_ff
    "0.6b": (1024, 28, 16, 3072),
    "1.7b": (2048, 28, 16, 6144),
    "4b": (2560, 36, 32, 9728),
}
SETTINGS = [  # size, LoRA rank (0: full fine-tuning), gradient checkpointing, tokens of a row
    ("0.6b", 32, True, 4096),
    ("0.6b", 64, False, 4096),
    ("0.6b", 0, True, 12288),
    ("1.7b", 16, True, 12288),
    ("1.7b", 0, True, 4096),
    ("4b", 16, True, 4096),
    ("4b", 64, True, 12288),
    ("4b", 0, True, 4096),
]


def main() -> None:
    print(f"{torch.cuda.get_device_name()}\n")
    print("| model | tuning | checkpointing | tokens | s a step | measured GiB | planned GiB | ratio |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    args = argparse.Namespace(device="cuda", steps=4, tiny=False)
    for size, rank, checkpointing, tokens in SETTINGS:
        width, layers, heads, mlp = SIZES[size]
        fields = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": 128}
        fields |= {"num_key_value_heads": 8, "intermediate_size": mlp, "vocab_size": 151936}
        fields |= {"tie_word_embeddings": True, "max_position_embeddings": 40960}
        with tempfile.TemporaryDirectory() as folder:
            Qwen3Config(**fields, architectures=["Qwen3ForCausalLM"]).save_pretrained(folder)
            shape = shape_of(folder)
        recipe = {"use_peft": rank > 0, "lora_r": rank, "lora_target_modules": MODULES}
        recipe["gradient_checkpointing"] = checkpointing
        planned = training_memory(shape, recipe, trained_parameters(shape, recipe, 64), tokens) / GIB
        bench_train.RANK = rank
        lengths = {"prompt": 200, "trace": 126, "answer": 466, "cot": tokens - 794}
        options = {"gradient_checkpointing": checkpointing, "peft": rank > 0}
        found = bench_ours(args, fields, lengths, options)
        tuning = f"LoRA r={rank}" if rank else "full"
        cells = [f"Qwen3-{size}", tuning, "yes" if checkpointing else "no", tokens, f"{found['step_s']:.3f}"]
        cells += [f"{found['peak_gib']:.2f}", f"{planned:.2f}", f"{planned / found['peak_gib']:.3f}"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
