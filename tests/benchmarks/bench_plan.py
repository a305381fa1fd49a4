"""
`abscot plan` against truth: predicted peak memory and seconds of a step beside those of runs it was not fitted to.

    python tests/benchmarks/bench_plan.py --predict        # no GPU: what it says, before anything is run
    python tests/benchmarks/bench_plan.py                  # one H100-80GB or larger, 3 minutes; `make bench-plan`

The cases are `bench_train.py`'s, on one GPU; `bench_gpus.py scale` holds its own, on several, against the plan too.
The peak is that of the steps after the third.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_train import CASES, Case
from figures import RESULTS, record
from models import GIB, MODULES, config_of

from abscot_trl.loop.duration import batch_seconds, card_of
from abscot_trl.loop.memory import shape_of, trained_parameters, training_memory
from abscot_trl.vocabulary import AbstractVocabulary

BLIND = ["plan-1.7b-lora", "plan-4b-lora", "plan-0.6b-full", "plan-1.7b-full"]
SEVERAL = [("full-4b-zero3", 3, 2), ("full-1.7b", 3, 2), ("smol-packed", 0, 2)]  # case, ZeRO stage, GPUs
SHORT = 184  # mean tokens of the short rows' documents, as a token sees it


def predict(case: Case, zero: int = 0, gpus: int = 1, gpu: str | None = None) -> tuple[float, float]:
    """Peak GiB on one GPU, and seconds of a step."""
    recipe = {"use_peft": case.lora is not None, "lora_r": case.lora, "lora_target_modules": MODULES, "bf16": True}
    recipe |= {"dtype": case.dtype, "gradient_accumulation_steps": case.accumulation, "compile_layers": True}
    with tempfile.TemporaryDirectory() as folder:
        config_of(case.shape).save_pretrained(folder)
        shape = shape_of(folder)
    recipe, at_once = recipe | case.fields, case.batch * case.tokens
    trained = trained_parameters(shape, recipe, AbstractVocabulary().size)
    length = SHORT if case.rows == "short" else case.tokens
    seconds = batch_seconds(shape, recipe, at_once, length, card_of(gpu), zero)
    return training_memory(shape, recipe, trained, at_once, zero, gpus) / GIB, case.accumulation * seconds


def compare(name: str, result: dict, zero: int = 0, gpus: int = 1) -> dict:
    """A figure: what was predicted over what `bench_train.py` found."""
    gib, seconds = predict(CASES[name], zero, gpus)
    row = {"name": f"plan: {name}" + (f", {gpus} GPUs, ZeRO {zero}" if gpus > 1 else "")}
    row |= {"value": round(gib / result["peak_gib"], 3), "unit": "predicted over measured memory"}
    row |= {"seconds": round(seconds / result["step_s"], 3), "predicted": [round(gib, 2), round(seconds, 3)]}
    return row | {"baseline": f"measured: {result['peak_gib']:.2f} GiB, {result['step_s']:.3f} s a step"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=BLIND, choices=[*CASES])
    parser.add_argument("--predict", action="store_true", help="run nothing")
    parser.add_argument("--gpu", default="h100", help="of --predict")
    parser.add_argument("--patience", type=float, default=100, help="seconds for a case")
    parser.add_argument("--output", type=Path, default=RESULTS / "plan.json")
    args = parser.parse_args()
    if args.predict:
        for name, zero, gpus in [*((name, 0, 1) for name in args.cases), *SEVERAL]:
            gib, seconds = predict(CASES[name], zero, gpus, args.gpu)
            print(f"{name}, {gpus} x {args.gpu}, ZeRO {zero}: {gib:.2f} GiB, {seconds:.3f} s a step")
        return 0
    failed = 0
    for name in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "result.json"
            command = [sys.executable, str(Path(__file__).with_name("bench_train.py")), "--child", name]
            try:
                subprocess.run(
                    [*command, "--output", str(path)], timeout=args.patience, capture_output=True, check=True
                )
            except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as failure:
                failed += 1
                print(f"{name}: FAILED: {failure}", flush=True)
                continue
            row = compare(name, json.loads(path.read_text()))
        print(row, flush=True)
        record(args.output, [row], "make bench-plan")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
