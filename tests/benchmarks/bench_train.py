"""
A training step on one GPU: against the earlier way, against a plain causal step, packed, and against a bare loop.

    python tests/benchmarks/bench_train.py                 # one H100-80GB or larger, 10 minutes; `make bench-train`
    python tests/benchmarks/bench_train.py --cases smol    # those whose names begin so
    python tests/benchmarks/bench_train.py --tiny          # every code path on CPU

Random weights in real shapes, `BottleneckSFTTrainer` as the recipes run it: bf16 autocast, flex attention, the head on
supervised positions only, compiled layers. A case has a process of its own (a failure must not cost the rest); the
step is the median of those after the first, each ended by a synchronisation. TFLOP/s are those of the model: 6 N a
token for the N parameters of the layers (the head runs on few positions), and the causal half of attention; what is
computed again is not counted. `lora-4b-seed` is the earlier production way, a bare loop.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from figures import RESULTS, record
from models import (
    ALPHA,
    GIB,
    MODULES,
    QWEN3_06B,
    QWEN3_4B,
    QWEN3_17B,
    RANK,
    SMOLLM2_135M,
    TINY,
    build_model,
    extended_tokenizer,
    long_lengths,
    short_lengths,
    trainer_on,
    training_row,
)
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from abscot_trl.attention import additive_mask
from abscot_trl.examples import Collator, Encoder

WORLD = int(os.environ.get("WORLD_SIZE", "1"))  # several processes: bench_gpus.py starts them
LEFT_OUT = 3  # first steps: compilation, optimiser state, allocator


@dataclass
class Case:
    """
    A run of `steps` steps.

    Args:
        rows (`str`): `long`, rows of `tokens` tokens; `short`, rows of some 190.
        way (`str`): `trainer`; `causal`, the same with the model's own causal sdpa in the mask's place; `bare`, the
            same model in a loop without Trainer; `seed`, the earlier way.
    """

    shape: dict = field(default_factory=lambda: QWEN3_4B)
    lora: int | None = RANK
    dtype: str = "bfloat16"
    rows: str = "long"
    tokens: int = 8192
    batch: int = 1
    accumulation: int = 1
    way: str = "trainer"
    steps: int = 8
    fields: dict = field(default_factory=dict)


NONE, ALL = {"gradient_checkpointing": False}, {"gradient_checkpointing": True}
FLASH = {"flex_kernels": "flash"}
EAGER = {"use_liger_kernel": True, "compile_layers": False}
SMOL = {"shape": SMOLLM2_135M, "lora": None, "dtype": "float32", "rows": "short", "steps": 24, "fields": NONE}
CASES = {
    "lora-4b-seed": Case(way="seed"),
    "lora-4b": Case(fields=NONE),
    "lora-4b-checkpointing": Case(fields=ALL),
    "lora-4b-every-2": Case(fields=ALL | {"gradient_checkpointing_kwargs": {"every_n_layers": 2}}),
    "lora-4b-liger": Case(fields=ALL | EAGER),
    "lora-4b-bare": Case(fields=NONE, way="bare"),
    "full-4b-bf16": Case(lora=None, accumulation=8, steps=8, fields=NONE),
    "full-4b-float32": Case(lora=None, dtype="float32", accumulation=8, steps=5, fields=ALL),
    **{f"causal-{n}": Case(tokens=n, way="causal", fields=ALL) for n in (2048, 8192, 32768)},
    **{f"masked-{n}": Case(tokens=n, fields=ALL) for n in (2048, 8192, 32768)},
    "flash-lora-4b": Case(fields=NONE | FLASH),
    "flash-lora-4b-checkpointing": Case(fields=ALL | FLASH),
    "flash-full-4b-bf16": Case(lora=None, accumulation=8, steps=8, fields=NONE | FLASH),
    **{f"flash-masked-{n}": Case(tokens=n, fields=ALL | FLASH) for n in (2048, 8192, 32768)},
    # Of bench_plan.py.
    "plan-1.7b-lora": Case(shape=QWEN3_17B, lora=16, tokens=16384, fields=NONE),
    "plan-4b-lora": Case(tokens=24576, fields=ALL),
    "plan-0.6b-full": Case(shape=QWEN3_06B, lora=None, dtype="float32", batch=2, fields=ALL | EAGER),
    "plan-1.7b-full": Case(shape=QWEN3_17B, lora=None, tokens=4096, accumulation=4, fields=NONE),
    "full-1.7b": Case(shape=QWEN3_17B, lora=None, dtype="float32", fields=ALL | EAGER),
    "full-4b-zero3": Case(lora=None, dtype="float32", fields=ALL | EAGER),
    "smol-packed": Case(batch=4, **SMOL),
    "smol-packed-2": Case(batch=2, **SMOL),
    "smol-bare": Case(batch=4, way="bare", **SMOL),
    "smol-eager": Case(batch=4, **SMOL | {"fields": NONE | {"compile_layers": False, "dataloader_num_workers": 0}}),
    "smol-single": Case(**SMOL | {"fields": NONE | {"packing": False}, "steps": 64}),
}


class Meter(TrainerCallback):
    """Seconds and peak memory of the steps after the first; a Trainer callback, or ticked by a bare loop."""

    def __init__(self, device: str):
        self.cuda, self.seconds, self.last = device == "cuda", [], time.perf_counter()

    def tick(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now
        if self.cuda and len(self.seconds) == LEFT_OUT:
            torch.cuda.reset_peak_memory_stats()

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.tick()

    def result(self, losses: list[float], tokens: float) -> dict:
        seconds = sorted(self.seconds[LEFT_OUT:])
        return {
            "step_s": seconds[len(seconds) // 2],
            "spread_s": [seconds[0], seconds[-1]],
            "first_s": self.seconds[0],
            "tokens_per_s": tokens / seconds[len(seconds) // 2],
            "peak_gib": torch.cuda.max_memory_allocated() / GIB if self.cuda else 0.0,
            "losses": losses[:3],
        }


def take_step(loss: torch.Tensor, trained: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> float:
    """The rest of a bare loop's step; the loss, which waits for the GPU."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def seed(case: Case, device: str) -> dict:
    """The earlier way: dense additive mask in sdpa, whole embedding and head trained, all logits, checkpointing."""
    model = build_model(case.shape, device, torch.bfloat16, "sdpa")
    whole = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=MODULES, modules_to_save=["embed_tokens", "lm_head"])
    model = get_peft_model(model, whole)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    tokenizer, vocabulary = extended_tokenizer()
    row = training_row(long_lengths(case.tokens), case.shape["vocab_size"])
    pieces = [row[key] for key in ("prompt_ids", "cot_ids", "trace", "answer_ids")]
    encoded = Encoder.from_tokenizer(vocabulary, tokenizer)(*pieces)
    meter, losses = Meter(device), []
    for _ in range(case.steps):
        batch = {key: value.to(device) for key, value in Collator(0, 128)([dict(encoded)]).items()}
        mask = additive_mask(batch["segment_ids"], batch["document_ids"], torch.bfloat16)
        inputs = {key: batch[key] for key in ("input_ids", "position_ids", "labels")}
        with torch.autocast(device, torch.bfloat16):
            loss = model(**inputs, attention_mask=mask, use_cache=False).loss
        losses.append(take_step(loss, trained, optimizer))
        meter.tick()
    return meter.result(losses, case.tokens)


def bare(case: Case, trainer, device: str) -> dict:
    """The trainer's model in a plain loop: batches made beforehand, no metrics, no callbacks."""
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in trainer.get_train_dataloader()]
    model = trainer.model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=device == "cuda")
    meter, losses = Meter(device), []
    for batch in batches[: case.steps]:
        weights = batch.pop("loss_weights")[:, 1:]
        with torch.autocast(device, torch.bfloat16):
            outputs = model(**batch, use_cache=False, fused_lm_head=True)
        loss = -(outputs.log_probs * weights).sum() / outputs.label_mask.sum()
        losses.append(take_step(loss, trained, optimizer))
        meter.tick()
    return meter.result(losses, sum(batch["attention_mask"].sum().item() for batch in batches) / len(batches))


def plain_causal(backbone, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """In the mask's place: no mask, which sdpa runs by its causal flash kernel."""
    kwargs.pop("segment_ids"), kwargs.pop("document_ids")
    return args, kwargs | {"attention_mask": None}


def run(case: Case, tiny: bool, device: str) -> dict:
    if case.way == "seed":
        return seed(case, device)
    attention = "sdpa" if tiny or case.way == "causal" else "flex_attention"
    model = build_model(case.shape, device, getattr(torch, case.dtype), attention)
    rng, vocab, per_step = random.Random(0), case.shape["vocab_size"], case.batch * case.accumulation * WORLD
    if case.rows == "long":
        rows = [training_row(long_lengths(case.tokens), vocab)] * (case.steps * per_step)
    else:
        count = case.steps * per_step * (1 if case.fields.get("packing") is False else case.tokens // 190) + 100
        rows = [training_row(short_lengths(rng), vocab, rng) for _ in range(count)]
    fields = {"max_steps": case.steps, "max_length": case.tokens, "packing": True, "compile_layers": not tiny}
    fields |= {"per_device_train_batch_size": case.batch, "gradient_accumulation_steps": case.accumulation}
    fields |= {"learning_rate": 1e-5, "use_cpu": device == "cpu", "dataloader_num_workers": 0 if tiny else 4}
    meter = Meter(device)
    with trainer_on(model, rows, fields | case.fields, case.lora, meter) as trainer:
        backbone = model.base_model
        if case.way == "causal":
            backbone._bottleneck_mask.remove()
            backbone.register_forward_pre_hook(plain_causal, with_kwargs=True)
        if case.way == "bare":
            return bare(case, trainer, device)
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = meter.result([entry["loss"] for entry in log], log[-1]["num_tokens"] / case.steps)
    body = sum(p.numel() for name, p in trainer.model.named_parameters() if ".layers." in name and "lora_" not in name)
    heads = case.shape["num_hidden_layers"] * case.shape["num_attention_heads"] * case.shape["head_dim"]
    if case.rows == "long":
        for name, factor in (("tflop_per_s", 6), ("tflop_per_s_4n", 4)):
            one = factor * (body * case.tokens + heads * case.tokens**2)
            result[name] = one * per_step / result["step_s"] / 1e12
    from torch._dynamo.utils import counters

    return result | {"graphs": counters["stats"]["unique_graphs"]}


def figures(found: dict[str, dict]) -> list[dict]:
    """The rows of `results/train.json` that the cases at hand give."""
    rows = []

    def add(name: str, case: str, value, unit: str, baseline: str | None = None) -> None:
        """`value` of a case's result, or of it and its baseline's, where both have run."""
        one, other = found.get(case, {}), found.get(baseline, {}) if baseline else None
        if "step_s" in one and (other is None or "step_s" in other):
            number = value(one) if other is None else value(one, other)
            rows.append({"name": name, "value": round(number, 4), "unit": unit, "case": case, "baseline": baseline})

    def faster(one: dict, other: dict) -> float:
        return one["tokens_per_s"] / other["tokens_per_s"]

    for case in found:
        add(f"{case}-step", case, lambda r: r["step_s"], "s")
        add(f"{case}-memory", case, lambda r: r["peak_gib"], "GiB")
        add(f"{case}-tokens", case, lambda r: r["tokens_per_s"], "tokens/s")
    for kernels, suffix in product(("", "-triton"), ("", "-checkpointing", "-every-2")):
        case, seed = f"{'' if kernels else 'flash-'}lora-4b{suffix}", "lora-4b-seed"
        suffix += kernels
        add(f"lora-4b-8192-speedup{suffix}", case, faster, "x", seed)
        add(f"lora-4b-8192-memory-ratio{suffix}", case, lambda r, s: r["peak_gib"] / s["peak_gib"], "x", seed)
        add(f"lora-4b-8192-tflops{suffix}", case, lambda r: r["tflop_per_s"], "model TFLOP/s (6N)")
        add(f"lora-4b-8192-tflops-4n{suffix}", case, lambda r: r["tflop_per_s_4n"], "model TFLOP/s (4N)")
    for name, case in (("", "flash-full-4b-bf16"), ("-triton", "full-4b-bf16")):
        add(f"full-4b-8192-tflops{name}", case, lambda r: r["tflop_per_s"], "model TFLOP/s (6N), bf16 weights")
    add("full-4b-8192-tflops-float32", "full-4b-float32", lambda r: r["tflop_per_s"], "model TFLOP/s (6N), float32")
    for n in (2048, 8192, 32768):
        ratio = lambda m, c: m["step_s"] / c["step_s"]  # noqa: E731
        add(f"masked-over-causal-{n}", f"flash-masked-{n}", ratio, "x", f"causal-{n}")
        add(f"masked-over-causal-{n}-triton", f"masked-{n}", ratio, "x", f"causal-{n}")
    add("packing-speedup", "smol-packed", faster, "x", "smol-single")
    add("smollm2-135m-tokens-per-second", "smol-packed", lambda r: r["tokens_per_s"], "tokens/s")
    add("smollm2-135m-speedup", "smol-packed", faster, "x", "smol-eager")
    for size, case, loop in (("4b", "lora-4b", "lora-4b-bare"), ("smol", "smol-packed", "smol-bare")):
        loss = lambda t, b: 100 * (1 - t["tokens_per_s"] / b["tokens_per_s"])  # noqa: E731
        add(f"trainer-cost-percent-{size}", case, loss, "% of a bare loop's tokens/s", loop)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[""], help="names, or beginnings of some: " + ", ".join(CASES))
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on CPU, sdpa, nothing compiled")
    parser.add_argument("--budget", type=float, default=580, help="seconds for everything; later cases are cut")
    parser.add_argument("--output", type=Path, default=None, help="tests/benchmarks/results/train.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = "cpu" if args.tiny else "cuda"
    if args.child:
        case = CASES[args.child]
        if args.tiny:
            case.shape, case.tokens, case.batch, case.accumulation, case.steps = TINY, 384, 1, 2, LEFT_OUT + 2
        elif WORLD > 1:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        result = run(case, args.tiny, device)
        if os.environ.get("RANK", "0") == "0":
            args.output.write_text(json.dumps(result))
        return 0

    start, found = time.monotonic(), {}
    output = args.output or RESULTS / "train.json"
    chosen = [
        name for case in args.cases for name in CASES if name == case or case not in CASES and name.startswith(case)
    ]
    for name in dict.fromkeys(chosen):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "result.json"
            command = [sys.executable, __file__, "--child", name, "--output", str(path), *["--tiny"] * args.tiny]
            left = args.budget - (time.monotonic() - start)
            if left < 20:
                found[name] = {"error": "out of time"}
                continue
            try:
                done = subprocess.run(command, timeout=left, capture_output=True, text=True)
                words = done.stderr.strip().splitlines()[-1:] if done.returncode else []
                found[name] = json.loads(path.read_text()) if not words else {"error": words[0][:300]}
            except (subprocess.TimeoutExpired, OSError) as failure:
                found[name] = {"error": str(failure)[:300]}
        shown = {key: round(v, 3) if isinstance(v, float) else v for key, v in found[name].items()}
        print(f"{name}: {shown}", flush=True)
        if not args.tiny:
            record(output, figures(found), "make bench-train")
    return int(any("error" in result for result in found.values()))


if __name__ == "__main__":
    sys.exit(main())
