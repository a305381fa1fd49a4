"""
Phase A on one GPU: flex gradients against sdpa's, then speed and memory of a training step against the earlier way.

    python tests/benchmarks/bench_train.py                 # one H200 or H100-80GB, about 5 minutes; `make bench-train`
    python tests/benchmarks/bench_train.py --tiny          # every code path on CPU: no flex backward, nothing enforced

Gradients: random layouts (hidden and discrete, packed or not, padded to 128), a small Qwen3, against sdpa in float32.
Speed: Qwen3-4B's shape with random weights in bf16, one row of 8192 tokens, 7400 of them CoT, forward, backward and
optimiser step. `seed` is the earlier production way as a bare loop; the others are this package's trainer. Each
section has a process of its own (Liger patches transformers for good, and a failure must not cost the rest). Exit
code 1 when a section fails or a bound is missed.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # Trainer would otherwise use all through DataParallel

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config, TrainerCallback
from trl import ModelConfig

from abscot_trl.attention import additive_mask, use_bottleneck_mask
from abscot_trl.data.toy import toy_tokenizer
from abscot_trl.examples import IGNORE, Collator, Encoder, pack
from abscot_trl.training.adapters import lora_config
from abscot_trl.training.bottleneck import BottleneckSFTTrainer
from abscot_trl.training.configs import BottleneckConfig
from abscot_trl.vocabulary import AbstractVocabulary

GIB = 2**30
WARMUP = 3  # steps left out: compilation, optimiser state, allocator
RANK, ALPHA = 32, 64
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
SHAPE += ("num_attention_heads", "num_key_value_heads")
QWEN3_4B = dict(zip(SHAPE, (151936, 2560, 9728, 36, 32, 8), strict=True))
SMALL = dict(zip(SHAPE, (512, 512, 1024, 3, 8, 2), strict=True))
TINY = dict(zip(SHAPE, (512, 64, 96, 2, 2, 1), strict=True))
LENGTHS = {"prompt": 300, "cot": 7400, "trace": 128, "answer": 362}  # 8192 with the two delimiters
TINY_LENGTHS = {"prompt": 8, "cot": 80, "trace": 6, "answer": 32}  # 128

FP32_BOUND = 1e-4  # flex against sdpa, relative, the largest over the parameters
BF16_RATIO, BF16_SLACK, BF16_BOUND = 1.5, 1e-3, 2e-2  # flex's bf16 error against sdpa's; of the whole gradient
CONTROL = 1e-2  # the gradient of a plain causal mask must differ by more: the check can fail

# This package's trainer, as overrides of BottleneckConfig; `peft: False` is full fine-tuning of float32 weights.
VARIANTS = {
    "ours": {},
    "ours-no-checkpointing": {"gradient_checkpointing": False},
    "ours-every-2": {"gradient_checkpointing_kwargs": {"every_n_layers": 2}},
    "ours-no-liger": {"use_liger_kernel": False},
    "ours-full": {"peft": False, "learning_rate": 1e-5},
}
REQUIRED = ["gradients", "seed", "ours", "ours-no-checkpointing"]
# At least, as multiples: of the seed's speed, and of this package's memory in the seed's.
BOUNDS = {"ours": {"speed": 1.7, "memory_saving": 2.0}, "ours-no-checkpointing": {"speed": 2.4}}


def build_model(shape: dict, device: str, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """A random tied Qwen3 of head width 128, made on the device itself; the same weights at every call."""
    config = Qwen3Config(head_dim=128, tie_word_embeddings=True, use_cache=False, pad_token_id=0, **shape)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).train()


def random_layout(channel: str, packed: bool, length: int, rng: random.Random) -> dict[str, torch.Tensor]:
    """A batch of one or two rows of random segments, (B, `length`) at most, padded to a multiple of 128."""
    encoder = Encoder(list(range(440, 504)), 504, 505, channel=channel)

    def document(total: int) -> dict[str, list]:
        trace, prompt = rng.randint(1, max(1, min(64, total // 6))), rng.randint(1, total // 6)
        answer = rng.randint(1, total // 4)
        cot = total - prompt - answer - (trace + 2) * (2 if channel == "discrete" else 1)
        x, c, y = ([rng.randrange(2, 440) for _ in range(n)] for n in (prompt, cot, answer))
        return encoder(x, c, [rng.randrange(64) for _ in range(trace)], y)

    if packed:
        rows = pack([document(rng.randint(length // 8, length // 2)) for _ in range(7)], length)[:2]
    else:
        rows = [document(length - rng.randint(1, min(127, length // 4))), document(length // 2)][: 1 + (length > 1000)]
    return Collator(0, 128)(rows)


def gradients(model: PreTrainedModel, batch: dict[str, torch.Tensor], masked: bool = True) -> dict[str, torch.Tensor]:
    """Gradients of the mean negative log-likelihood, in float32 by parameter; `masked=False`: plain causal."""
    drop = {"labels", "loss_weights"} | (set() if masked else {"segment_ids", "document_ids"})
    model.zero_grad()
    logits = model(**{key: value for key, value in batch.items() if key not in drop}).logits.float()
    labels = batch["labels"][:, 1:].flatten()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=IGNORE).backward()
    return {name: parameter.grad.float().clone() for name, parameter in model.named_parameters()}


def error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> tuple[float, float]:
    """|found - wanted| / |wanted|: the largest over the parameters, and that of the whole gradient."""
    difference = torch.stack([(found[name] - wanted[name]).norm() for name in wanted])
    norm = torch.stack([wanted[name].norm() for name in wanted])
    return (difference / norm).max().item(), (difference.norm() / norm.norm()).item()


def layout_errors(models: dict, candidate: str, batch: dict[str, torch.Tensor]) -> dict[str, float | bool]:
    """Errors of flex in float32, of flex and sdpa in bf16, and of a plain causal mask, all against float32 sdpa."""
    with sdpa_kernel(SDPBackend.MATH):  # exact float32, no tf32 inside a fused kernel
        wanted = gradients(models["sdpa", torch.float32], batch)
        control = error(gradients(models["sdpa", torch.float32], batch, masked=False), wanted)[1]
    fp32 = error(gradients(models[candidate, torch.float32], batch), wanted)[0]
    sdpa_max, sdpa_all = error(gradients(models["sdpa", torch.bfloat16], batch), wanted)
    flex_max, flex_all = error(gradients(models[candidate, torch.bfloat16], batch), wanted)
    good = fp32 <= FP32_BOUND and control >= CONTROL  # False for NaN too
    good = good and flex_all <= BF16_BOUND and flex_max <= BF16_RATIO * sdpa_max + BF16_SLACK
    errors = {"fp32_max": fp32, "bf16_max": flex_max, "bf16_max_sdpa": sdpa_max}
    return errors | {"bf16_all": flex_all, "bf16_all_sdpa": sdpa_all, "causal": control, "ok": good}


def check_gradients(args: argparse.Namespace) -> dict:
    """Section 1: the errors of every layout, also after one of them failed."""
    torch.set_float32_matmul_precision("highest")  # flex's float32 would otherwise be tf32
    torch._dynamo.config.recompile_limit = 64  # two dtypes at many shapes: flex must not fall back to eager
    candidate, shape = ("eager", TINY) if args.tiny else ("flex_attention", SMALL)
    rounded = build_model(shape, args.device, torch.float32, "sdpa").bfloat16().state_dict()
    models = {}
    for dtype in (torch.float32, torch.bfloat16):
        for attention in ("sdpa", candidate):
            models[attention, dtype] = use_bottleneck_mask(build_model(shape, args.device, dtype, attention))
            models[attention, dtype].load_state_dict(rounded)  # the same weights in both dtypes
    rng, rows = random.Random(0), []
    lengths = (128, 256) if args.tiny else (512, 1024, 1920, 640, 2048)
    for number, length in enumerate(lengths):  # changing lengths, as in training: the kernels of dynamic shapes too
        for channel in ("hidden", "discrete"):
            packed = bool((number + (channel == "discrete")) % 2)
            batch = random_layout(channel, packed, length, rng)
            row = {"layout": f"{channel}{' packed' if packed else ''} {tuple(batch['input_ids'].shape)}", "ok": False}
            try:
                row |= layout_errors(models, candidate, {key: value.to(args.device) for key, value in batch.items()})
            except Exception as failure:  # a kernel that does not compile: report it, try the others
                row["error"] = f"{type(failure).__name__}: {failure}"[:2000]
            rows.append(row)
            print(" ", *(f"{key} {v:.1e}" if isinstance(v, float) else v for key, v in row.items()))
    return {"layouts": rows, "ok": all(row["ok"] for row in rows)}


class Meter(TrainerCallback):
    """Seconds and peak memory of the steps after the warm-up; a Trainer callback, or ticked by a bare loop."""

    def __init__(self, device: str):
        self.cuda, self.seconds, self.last = device.startswith("cuda"), [], time.perf_counter()

    def tick(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        peak = torch.cuda.max_memory_allocated() / GIB if self.cuda else 0.0
        print(f"  step {len(self.seconds)}: {self.seconds[-1]:.3f} s, peak so far {peak:.1f} GiB")
        if self.cuda and len(self.seconds) == WARMUP:
            torch.cuda.reset_peak_memory_stats()
        self.last = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.tick()

    def result(self, model: torch.nn.Module, losses: list[float], tokens: int) -> dict:
        seconds = sorted(self.seconds[WARMUP:])[len(self.seconds[WARMUP:]) // 2]
        return {
            "step_s": seconds,
            "tokens_per_s": tokens / seconds,
            "peak_gib": torch.cuda.max_memory_allocated() / GIB if self.cuda else 0.0,
            "trainable_m": sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6,
            "first_loss": losses[0],
            "last_loss": losses[-1],
        }


def extended_tokenizer() -> tuple[PreTrainedTokenizerBase, AbstractVocabulary]:
    """A tokenizer with the 66 abstract tokens; its ids lie below 128."""
    tokenizer, vocabulary = toy_tokenizer(), AbstractVocabulary()
    vocabulary.extend(tokenizer)
    return tokenizer, vocabulary


def training_row(lengths: dict[str, int], vocab_size: int) -> dict[str, list[int]]:
    """Random ids; the same row for every section."""
    rng = random.Random(0)
    row = {f"{part}_ids": rng.choices(range(128, vocab_size), k=lengths[part]) for part in ("prompt", "cot", "answer")}
    return row | {"trace": rng.choices(range(64), k=lengths["trace"])}


def bench_seed(args: argparse.Namespace, shape: dict, lengths: dict[str, int]) -> dict:
    """The earlier way: dense additive mask in sdpa, whole embedding and head trained, all logits, checkpointing."""
    model = build_model(shape, args.device, torch.bfloat16, "sdpa")
    whole = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=MODULES, modules_to_save=["embed_tokens", "lm_head"])
    model = get_peft_model(model, whole)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    tokenizer, vocabulary = extended_tokenizer()
    row = training_row(lengths, shape["vocab_size"])
    pieces = [row[key] for key in ("prompt_ids", "cot_ids", "trace", "answer_ids")]
    encoded = Encoder.from_tokenizer(vocabulary, tokenizer)(*pieces)
    meter, losses = Meter(args.device), []
    for _ in range(args.steps):
        batch = {key: value.to(args.device) for key, value in Collator(0, 128)([dict(encoded)]).items()}
        mask = additive_mask(batch["segment_ids"], batch["document_ids"], torch.bfloat16)
        inputs = {key: batch[key] for key in ("input_ids", "position_ids", "labels")}
        with torch.autocast(args.device.split(":")[0], torch.bfloat16):
            loss = model(**inputs, attention_mask=mask, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        meter.tick()
    return meter.result(model, losses, sum(lengths.values()) + 2)


def bench_ours(args: argparse.Namespace, shape: dict, lengths: dict[str, int], overrides: dict) -> dict:
    """`BottleneckSFTTrainer` as recipes/qwen3-4b runs it: weights and bf16 autocast, flex, fused head; with Liger."""
    peft, overrides = overrides.get("peft", True), {key: v for key, v in overrides.items() if key != "peft"}
    liger = overrides.get("use_liger_kernel", not args.tiny)
    tokenizer, vocabulary = extended_tokenizer()
    token_ids = [*vocabulary.ids(tokenizer), vocabulary.begin_id(tokenizer), vocabulary.end_id(tokenizer)]
    dtype, attention = torch.bfloat16 if peft else torch.float32, "sdpa" if args.tiny else "flex_attention"
    model = build_model(shape, args.device, dtype, attention)
    total = sum(lengths.values()) + 2
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        lora = {"lora_r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "lora_target_modules": MODULES}
        model_args = ModelConfig(model_name_or_path=folder, use_peft=peft, **lora)
        fields = {"learning_rate": 1e-4, "bf16": True, "gradient_checkpointing": True, "use_liger_kernel": liger}
        fields |= {"per_device_train_batch_size": 1, "max_steps": args.steps, "max_length": total}
        fields |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        fields |= {"use_cpu": args.device == "cpu", **overrides}
        meter = Meter(args.device)
        trainer = BottleneckSFTTrainer(
            model=model,
            args=BottleneckConfig(folder, **fields),
            train_dataset=Dataset.from_list([training_row(lengths, shape["vocab_size"])] * args.steps),
            vocabulary=vocabulary,
            processing_class=tokenizer,
            peft_config=lora_config(model_args, token_ids),
            callbacks=[meter],
        )
        meter.last = time.perf_counter()
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = meter.result(trainer.model, losses, total)
    if not peft:  # 6 N a token and the causal half of attention; the head runs on the few supervised positions only
        body = sum(parameter.numel() for parameter in model.model.layers.parameters())
        attention = 6 * shape["num_hidden_layers"] * shape["num_attention_heads"] * 128 * total**2
        result["tflop_per_s"] = (6 * body * total + attention) / result["step_s"] / 1e12
    return result


def checks(results: dict[str, dict], enforced: bool) -> dict[str, bool]:
    """What must hold, and whether it does; adds `speed` and `memory_saving` to the results."""
    found, seed = {}, results.get("seed", {})
    for name, result in results.items():
        if "error" in result:
            found[f"{name} runs"] = False
        elif name == "gradients":
            found["gradients: flex's equal sdpa's on every layout"] = result["ok"]
        elif "step_s" in seed:
            result["speed"] = seed["step_s"] / result["step_s"]
            result["memory_saving"] = seed["peak_gib"] / max(result["peak_gib"], 1e-9)
            if name != "seed":
                same = abs(result["first_loss"] / seed["first_loss"] - 1) < 0.01
                found[f"{name}: first loss {result['first_loss']:.3f} is the seed's {seed['first_loss']:.3f}"] = same
            for quantity, bound in BOUNDS.get(name, {}).items() if enforced else ():
                found[f"{name}: {quantity} {result[quantity]:.2f} >= {bound}"] = result[quantity] >= bound
    return found


def table(results: dict[str, dict]) -> str:
    lines = [f"{'':30} {'step s':>8} {'tokens/s':>9} {'peak GiB':>9} {'speed':>6} {'saving':>7} {'trained M':>10}"]
    for name, r in results.items():
        if "step_s" in r:
            ratios = f"{r.get('speed', 0):6.2f} {r.get('memory_saving', 0):7.2f} {r['trainable_m']:10.1f}"
            flops = f"  {r['tflop_per_s']:.0f} model TFLOP/s" if "tflop_per_s" in r else ""
            lines.append(f"{name:30} {r['step_s']:8.3f} {r['tokens_per_s']:9.0f} {r['peak_gib']:9.1f} {ratios}{flops}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=None, help="cuda unless --tiny")
    parser.add_argument("--sections", nargs="+", default=REQUIRED, choices=["gradients", "seed", *VARIANTS])
    parser.add_argument("--full", action="store_true", help="also full fine-tuning, in model TFLOP/s")
    parser.add_argument("--steps", type=int, default=8, help=f"the first {WARMUP} are left out")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, no flex, no Liger, bounds not enforced")
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything; later sections are cut")
    parser.add_argument("--output", type=Path, default=Path("bench_train.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.device = args.device or ("cpu" if args.tiny else "cuda")
    if args.steps <= WARMUP:
        parser.error(f"--steps must exceed the {WARMUP} warm-up steps, got {args.steps}")
    if args.child:
        settings = (args, TINY, TINY_LENGTHS) if args.tiny else (args, QWEN3_4B, LENGTHS)
        if args.child == "gradients":
            result = check_gradients(args)
        elif args.child == "seed":
            result = bench_seed(*settings)
        else:
            result = bench_ours(*settings, VARIANTS[args.child])
        result["device"] = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
        args.output.write_text(json.dumps(result))
        return 0

    start, results = time.monotonic(), {}
    for name in [*args.sections, *(["ours-full"] if args.full else [])]:
        print(f"== {name}", flush=True)
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "result.json"
            command = [sys.executable, "-u", __file__, *sys.argv[1:], "--child", name, "--output", str(path)]
            try:
                left = max(1.0, args.budget - (time.monotonic() - start))
                subprocess.run(command, check=True, timeout=left)
                results[name] = json.loads(path.read_text())
            except (subprocess.SubprocessError, OSError) as failure:
                results[name] = {"error": str(failure)}
        results[name]["section_s"] = round(time.monotonic() - began, 1)
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in results[name].items() if k != "layouts"}
        print(f"  {shown}", flush=True)
        outcome = checks(results, enforced=not args.tiny)
        report = {"torch": torch.__version__, "tiny": args.tiny, "sections": results, "checks": outcome}
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    print("\n" + table(results) + "\n")
    for check, holds in outcome.items():
        print(f"{'ok    ' if holds else 'FAILED'} {check}")
    return int(not all(outcome.values()))


if __name__ == "__main__":
    sys.exit(main())
