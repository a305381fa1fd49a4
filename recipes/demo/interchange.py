"""
Does interchange (`interchange:` of phase B) make the answer follow its trace? A toy whose prompt tells a part of each
result, its first digits: a number of two or three digits, then four sums or differences of one digit.

    prompt 508-1-2-8-6=    cot 508-1=507; / 507-2=505; / ..    answer \\boxed{491}

    python recipes/demo/interchange.py            # half an hour on a core

A base learns the verbal CoT; then content traces, once without interchange and once with it.
"""

import argparse
from pathlib import Path

import numpy as np
import yaml
from train_base import train

from abscot_trl.data.toy import write_problems
from abscot_trl.evaluation.results import read_results, write_results
from abscot_trl.examples import Example
from abscot_trl.phases import read_yaml, run_phase
from abscot_trl.report.tables import results_table

RECIPES = Path(__file__).parent
STEPS = {"base": 600, "bottleneck": 150, "distill": 350}
PACKED = {"packing": True, "max_length": 256, "per_device_train_batch_size": 40, "use_cpu": True}  # interchange packs
PACKED |= {"lr_scheduler_kwargs": {"num_decay_steps": 40}, "logging_steps": 50}


def problems(n: int, seed: int) -> list[Example]:
    """`n` distinct problems, half of them of numbers with two digits."""
    rng, found = np.random.default_rng(seed), {}
    while len(found) < n:
        value = int(rng.integers(25, 75)) if rng.random() < 0.5 else int(rng.integers(125, 875))
        prompt, lines = str(value), []
        for plus, operand in zip(rng.integers(2, size=4), rng.integers(1, 10, size=4), strict=True):
            result, step = value + operand if plus else value - operand, f"{'+' if plus else '-'}{operand}"
            prompt, value, line = prompt + step, int(result), f"{value}{step}={result};"
            lines.append(line)
        prompt += "="
        answer = f"\\boxed{{{value}}}"
        found[prompt] = Example([{"role": "user", "content": prompt}], "\n".join(lines), answer, str(value), prompt)
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/interchange"), help="must not exist yet")
    parser.add_argument("--share", type=float, default=0.2)
    args = parser.parse_args()
    out = args.output_dir
    out.mkdir(parents=True)
    rows = problems(102_000, seed=0)
    tests = write_problems(out / "test.jsonl", rows[:1000])
    data = write_problems(out / "train.jsonl", rows[1000:31_000])
    train(rows[31_000:], out / "base", STEPS["base"])
    run_phase("init", ["--base_model", f"{out}/base", "--codebook_size", "12", "--m_max", "16", "--initialisation",
                       "normal", "--output_dir", f"{out}/init"])  # fmt: skip
    run_phase("data", ["--data", data, "--data_format", "problems", "--tokenizer", f"{out}/init",
                       "--output_dir", f"{out}/data"])  # fmt: skip
    fields = {
        "bottleneck": read_yaml(RECIPES / "bottleneck.yaml") | PACKED,
        "evaluate": read_yaml(RECIPES / "evaluate.yaml"),
    }
    fields["evaluate"] |= {"task": "width", "problems": tests}
    warmup = read_yaml(RECIPES / "warmup.informed.yaml") | {"ratio": 3.4, "rounds": 1, "rows_per_phase": 14_000}
    warmup |= {"model": f"{out}/init", "data": f"{out}/data"}
    results = []
    for name, more in (("without", {}), ("with", {"interchange": args.share})):
        run = out / name
        run.mkdir()
        phases = fields | {"distill": fields["bottleneck"] | more}
        for phase in phases:
            own = {"max_steps": STEPS[phase]} if phase in STEPS else {}
            (run / f"{phase}.yaml").write_text(yaml.safe_dump(phases[phase] | own))
        recipes = {phase: f"{run}/{phase}.yaml" for phase in phases}
        (run / "warmup.yaml").write_text(yaml.safe_dump(warmup | recipes | {"name": name, "run_dir": f"{run}/run"}))
        run_phase("warmup", ["--config", f"{run}/warmup.yaml"])
        results += read_results(run / "run")
    write_results(out / "results.json", results)
    print(results_table(results))  # noqa: T201


if __name__ == "__main__":
    main()
