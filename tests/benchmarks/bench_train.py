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
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, TrainerCallback
from transformers.utils import is_liger_kernel_available
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
LORA = {"r": 32, "lora_alpha": 64}
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 1e6,
}
SMALL = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
LENGTHS = {"prompt": 300, "cot": 7400, "trace": 128, "answer": 362}  # 8192 with the two delimiters
TINY_LENGTHS = {"prompt": 8, "cot": 80, "trace": 6, "answer": 32}  # 128

FP32_BOUND = 1e-4  # flex against sdpa, relative, largest over the parameters
BF16_RATIO, BF16_SLACK, BF16_BOUND = 1.5, 1e-3, 2e-2  # flex's bf16 error against sdpa's; of the whole gradient
CONTROL = 1e-2  # a plain causal mask must differ by more: the check can fail

# Sections of the package's trainer, as overrides of BottleneckConfig; `peft` and `narrow` are this script's.
VARIANTS = {
    "ours": {},
    "ours-no-checkpointing": {"gradient_checkpointing": False},
    "ours-no-cast": {"narrow": True},  # LoRA inputs stay bf16 under autocast
    "ours-no-cast-no-checkpointing": {"narrow": True, "gradient_checkpointing": False},
    "ours-selective": {"gradient_checkpointing_kwargs": {"selective": True}},
    "ours-no-liger": {"use_liger_kernel": False},
    "ours-full": {"peft": False, "learning_rate": 1e-5},  # full fine-tuning
}
REQUIRED = ["gradients", "seed", "ours", "ours-no-checkpointing"]
BOUNDS = {"ours": {"speed": 1.7, "memory": 0.5}, "ours-no-checkpointing": {"speed": 2.4}}  # against `seed`


def build_model(shape: dict, device: str, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """A random tied Qwen3 of head width 128, made on the device itself."""
    config = Qwen3Config(
        head_dim=128, tie_word_embeddings=True, max_position_embeddings=40960, use_cache=False, pad_token_id=0, **shape
    )
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
        rows = [document(length - rng.randint(1, 127)), document(rng.randint(length // 4, length // 2))]
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


def check_gradients(args: argparse.Namespace) -> dict:
    """Section 1: one row of errors a layout; raises only after all were tried."""
    torch.set_float32_matmul_precision("highest")  # flex's float32 would otherwise be tf32
    candidate = "eager" if args.tiny else "flex_attention"
    reference = build_model(SMALL, args.device, torch.float32, "sdpa")
    with torch.no_grad():
        for parameter in reference.parameters():  # the same weights in both dtypes
            parameter.copy_(parameter.bfloat16())
    models = {"reference": use_bottleneck_mask(reference)}
    for dtype in (torch.float32, torch.bfloat16):
        for attention in ("sdpa", candidate):
            model = build_model(SMALL, args.device, dtype, attention)
            model.load_state_dict(reference.state_dict())
            models[f"{attention}-{dtype}"] = use_bottleneck_mask(model)
    rng, rows = random.Random(0), []
    lengths = (128, 256) if args.tiny else (512, 1024, 1920, 640, 2048)
    for number, length in enumerate(lengths):  # changing lengths, as in training: the kernel's dynamic shapes too
        for channel in ("hidden", "discrete"):
            packed = bool((number + (channel == "discrete")) % 2)
            batch = random_layout(channel, packed, length, rng)
            batch = {key: value.to(args.device) for key, value in batch.items()}
            with sdpa_kernel(SDPBackend.MATH):  # exact float32, no tf32 inside a fused kernel
                wanted = gradients(models["reference"], batch)
                control = error(gradients(models["reference"], batch, masked=False), wanted)[1]
            fp32 = error(gradients(models[f"{candidate}-{torch.float32}"], batch), wanted)[0]
            sdpa_max, sdpa_all = error(gradients(models[f"sdpa-{torch.bfloat16}"], batch), wanted)
            flex_max, flex_all = error(gradients(models[f"{candidate}-{torch.bfloat16}"], batch), wanted)
            good = fp32 <= FP32_BOUND and control >= CONTROL and flex_all <= BF16_BOUND
            good = good and flex_max <= BF16_RATIO * sdpa_max + BF16_SLACK  # False for NaN too
            row = {"layout": f"{channel}{' packed' if packed else ''} {tuple(batch['input_ids'].shape)}", "ok": good}
            row |= {"fp32_max": fp32, "bf16_max": flex_max, "bf16_max_sdpa": sdpa_max}
            rows.append(row | {"bf16_all": flex_all, "bf16_all_sdpa": sdpa_all, "control": control})
            errors = "  ".join(f"{key} {value:.1e}" for key, value in rows[-1].items() if isinstance(value, float))
            print(f"  {row['layout']:28} {errors}  {'ok' if good else 'FAILED'}")
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


def training_row(lengths: dict[str, int], vocab_size: int) -> dict[str, list[int]]:
    """Random ids; the same row for every section."""
    rng = random.Random(0)
    row = {f"{part}_ids": [rng.randrange(128, vocab_size) for _ in range(lengths[part])] for part in lengths}
    return {**{key: row[key] for key in ("prompt_ids", "cot_ids", "answer_ids")}, "trace": [7] * lengths["trace"]}


def bench_seed(args: argparse.Namespace, shape: dict, lengths: dict[str, int]) -> dict:
    """The earlier way: dense additive mask in sdpa, whole embedding and head trained, all logits, checkpointing."""
    model = build_model(shape, args.device, torch.bfloat16, "sdpa")
    whole = LoraConfig(**LORA, target_modules=MODULES, modules_to_save=["embed_tokens", "lm_head"])
    model = get_peft_model(model, whole)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    tokenizer, vocabulary = toy_tokenizer(), AbstractVocabulary()
    vocabulary.extend(tokenizer)
    row = training_row(lengths, shape["vocab_size"])
    encoded = Encoder.from_tokenizer(vocabulary, tokenizer)(
        row["prompt_ids"], row["cot_ids"], row["trace"], row["answer_ids"]
    )
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
    """`BottleneckSFTTrainer` as a recipe would run it: bf16 weights under bf16 autocast, flex, trl's fused head."""
    overrides = dict(overrides)
    peft, narrow = overrides.pop("peft", True), overrides.pop("narrow", False)
    liger = overrides.pop("use_liger_kernel", True) and is_liger_kernel_available() and not args.tiny
    tokenizer, vocabulary = toy_tokenizer(), AbstractVocabulary()
    vocabulary.extend(tokenizer)
    token_ids = [*vocabulary.ids(tokenizer), vocabulary.begin_id(tokenizer), vocabulary.end_id(tokenizer)]
    model = build_model(shape, args.device, torch.bfloat16, "sdpa" if args.tiny else "flex_attention")
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        model_args = ModelConfig(
            model_name_or_path=folder,
            use_peft=peft,
            lora_r=LORA["r"],
            lora_alpha=LORA["lora_alpha"],
            lora_dropout=0.0,
            lora_target_modules=MODULES,
        )
        fields = {
            "learning_rate": 1e-4,
            "max_length": sum(lengths.values()) + 2,
            "gradient_checkpointing": True,
            "use_liger_kernel": liger,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": True,
            "use_cpu": args.device == "cpu",
            **overrides,
        }
        config = BottleneckConfig(folder, per_device_train_batch_size=1, max_steps=args.steps, **fields)
        meter = Meter(args.device)
        trainer = BottleneckSFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list([training_row(lengths, shape["vocab_size"])] * args.steps),
            vocabulary=vocabulary,
            processing_class=tokenizer,
            peft_config=lora_config(model_args, token_ids),
            callbacks=[meter],
        )
        for module in trainer.model.modules() if narrow else ():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False
        meter.last = time.perf_counter()
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = meter.result(trainer.model, losses, sum(lengths.values()) + 2) | {"liger": liger}
    if not peft:  # 6 N a token and the causal half of attention; the head runs on the few supervised positions only
        tokens, body = sum(lengths.values()) + 2, sum(p.numel() for p in model.model.layers.parameters())
        attention = 6 * shape["num_hidden_layers"] * shape["num_attention_heads"] * 128 * tokens**2
        result["tflop_per_s"] = (6 * body * tokens + attention) / result["step_s"] / 1e12
    return result


def run_section(name: str, args: argparse.Namespace) -> dict:
    shape, lengths = (SMALL, TINY_LENGTHS) if args.tiny else (QWEN3_4B, LENGTHS)
    if name == "gradients":
        return check_gradients(args)
    if name == "seed":
        return bench_seed(args, shape, lengths)
    return bench_ours(args, shape, lengths, VARIANTS[name])


def checks(results: dict[str, dict]) -> list[dict]:
    """Every bound with what was found; adds `speed` and `memory` against `seed` to the results."""
    found, seed = [], results.get("seed", {})
    if "gradients" in results:
        found.append({"check": "gradients equal sdpa's on every layout", "ok": results["gradients"].get("ok", False)})
    for name, result in results.items():
        if "error" in result:
            found.append({"check": f"{name} ran", "ok": False})
        elif name != "gradients" and "step_s" in seed:
            result["speed"] = seed["step_s"] / result["step_s"]
            result["memory"] = result["peak_gib"] / max(seed["peak_gib"], 1e-9)
            same = abs(result["first_loss"] / seed["first_loss"] - 1)
            found.append({"check": f"{name}: first loss is the seed's within 1 %", "ok": same < 0.01})
            for quantity, bound in BOUNDS.get(name, {}).items():
                good = result[quantity] >= bound if quantity == "speed" else result[quantity] <= bound
                sign = ">=" if quantity == "speed" else "<="
                text = f"{name}: {quantity} {result[quantity]:.2f} {sign} {bound} of the seed's"
                found.append({"check": text, "ok": good})
    return found


def table(results: dict[str, dict]) -> str:
    lines = [f"{'':30} {'step s':>8} {'tokens/s':>9} {'peak GiB':>9} {'speed':>6} {'memory':>7} {'trained M':>10}"]
    for name, r in results.items():
        if "step_s" in r:
            ratios = f"{r.get('speed', 0):6.2f} {r.get('memory', 0):7.2f} {r['trainable_m']:10.1f}"
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
        args.output.write_text(json.dumps(run_section(args.child, args)))
        return 0

    start, results = time.monotonic(), {}
    for name in [*args.sections, *(["ours-full"] if args.full else [])]:
        print(f"== {name}", flush=True)
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "result.json"
            command = [sys.executable, "-u", __file__, *sys.argv[1:], "--child", name, "--output", str(report)]
            try:
                left = max(1.0, args.budget - (time.monotonic() - start))
                subprocess.run(command, check=True, timeout=left)
                results[name] = json.loads(report.read_text())
            except (subprocess.SubprocessError, OSError) as failure:
                results[name] = {"error": str(failure)}
        results[name]["section_s"] = round(time.monotonic() - began, 1)
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in results[name].items() if k != "layouts"}
        print(f"  {shown}", flush=True)
        outcome = checks(results)
        versions = {"torch": torch.__version__, "tiny": args.tiny, "steps": args.steps, "lengths": LENGTHS}
        args.output.write_text(json.dumps(versions | {"sections": results, "checks": outcome}, indent=2) + "\n")
    print("\n" + table(results) + "\n")
    for line in outcome:
        print(f"{'ok    ' if line['ok'] else 'FAILED'} {line['check']}")
    if not args.tiny:
        return int(not all(line["ok"] for line in outcome))
    return int(any("error" in result for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
