"""
Flex attention's gradients under the bottleneck mask against sdpa's, on one GPU.

    python tests/benchmarks/bench_gradients.py             # about a minute; `make bench-gradients`
    python tests/benchmarks/bench_gradients.py --tiny      # on CPU, where flex has no backward: eager takes its place

Random layouts (hidden and discrete, packed or not, padded to 128), a small Qwen3, against sdpa in float32. Exit code 1
when a bound is missed.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from figures import RESULTS, record
from models import SMALL, TINY, build_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from abscot_trl.attention import use_bottleneck_mask
from abscot_trl.examples import IGNORE, Collator, Encoder, pack

FP32_BOUND = 1e-4  # flex against sdpa, relative, the largest over the parameters
BF16_RATIO, BF16_SLACK, BF16_BOUND = 1.5, 1e-3, 2e-2  # flex's bf16 error against sdpa's; of the whole gradient
CONTROL = 1e-2  # the gradient of a plain causal mask must differ by more: the check can fail


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on CPU, eager instead of flex")
    parser.add_argument("--output", type=Path, default=RESULTS / "gradients.json")
    args = parser.parse_args()
    args.device = "cpu" if args.tiny else "cuda"
    result = check_gradients(args)
    if not args.tiny:
        worst = {key: max(row.get(key, float("inf")) for row in result["layouts"]) for key in ("fp32_max", "bf16_all")}
        rows = [
            {"name": "flex-gradient-error-float32", "value": worst["fp32_max"], "unit": "relative, worst parameter"},
            {"name": "flex-gradient-error-bf16", "value": worst["bf16_all"], "unit": "relative, whole gradient"},
        ]
        record(args.output, [row | {"baseline": "sdpa in float32"} for row in rows], "make bench-gradients")
    return int(not result["ok"])


if __name__ == "__main__":
    sys.exit(main())
