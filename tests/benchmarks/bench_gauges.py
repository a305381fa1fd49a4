"""
What reading the gauges costs: seconds of the first reading, with its kernels compiled, of a later one, and of a step.

    python tests/benchmarks/bench_gauges.py              # one GPU, 2 minutes; --tiny: a run on CPU, recorded nowhere

SmolLM2-135M's shape on rows like GSM-Symbolic's, packed and compiled as the recipes have it, 64 rows of 12,800 held
out; `value` is the share that two readings take of a phase of 400 steps.
"""

import argparse
import random
import sys
import time
from pathlib import Path

import torch
from figures import RESULTS, record
from models import SMOLLM2_135M, TINY, build_model, short_lengths, trainer_on, training_row


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "gauges.json")
    args = parser.parse_args()
    shape, device = (TINY, "cpu") if args.tiny else (SMOLLM2_135M, "cuda")
    rng, rows = random.Random(0), 3200 if args.tiny else 12800
    rows = [training_row(short_lengths(rng), shape["vocab_size"], rng) for _ in range(rows)]
    fields = {"max_steps": 24, "max_length": 512 if args.tiny else 8192, "packing": True, "gauge_rows": 64}
    fields |= {"per_device_train_batch_size": 1 if args.tiny else 4, "compile_layers": not args.tiny}
    fields |= {"gradient_checkpointing": False, "use_cpu": args.tiny, "bf16": not args.tiny, "gauge_steps": 1000}
    model = build_model(shape, device, torch.float32, "sdpa" if args.tiny else "flex_attention")
    with trainer_on(model, rows, fields, None) as trainer:
        ends, log = [], trainer.log
        trainer.log = lambda *given: (log(*given), ends.append(time.perf_counter()))  # at each step
        trainer.train()
        step = sorted(b - a for a, b in zip(ends[3:-3], ends[4:-2], strict=True))[len(ends) // 2 - 3]
        torch._dynamo.reset()  # as in a phase that has yet to read them
        first, later = seconds(trainer.gauges.read), min(seconds(trainer.gauges.read) for _ in range(3))
    share = (first + later) / (400 * step + first + later)
    row = {"name": "gauges: packed SmolLM2-135M", "value": round(share, 4), "unit": "of a phase of 400 steps"}
    row |= {"step_s": round(step, 3), "first_s": round(first, 2), "later_s": round(later, 2)}
    print(row, flush=True)
    if not args.tiny:
        record(args.output, [row | {"baseline": "the same phase without"}], "python tests/benchmarks/bench_gauges.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
