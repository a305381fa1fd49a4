"""
The whole method on chain arithmetic, on a laptop: SFT without CoT (or any baseline), the paper's recipe and the
informed one at equal steps, from a tiny base model that speaks its CoT; every trace swapped; a table, results.json,
report.md, report.html.

    python -m abscot_trl.scripts.demo --config recipes/demo/demo.yaml --rounds 1
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from abscot_trl.data.toy import chain_arithmetic
from abscot_trl.evaluation.results import write_results
from abscot_trl.loop.baselines import BaselinesArguments, baselines
from abscot_trl.loop.warmup import WarmupArguments, warmup
from abscot_trl.phases import exit_with_words, parse, read_yaml, run_phase
from abscot_trl.report.make import ReportArguments, report
from abscot_trl.training.configs import BASELINES

WARMUPS = ("paper", "informed")


@dataclass
class DemoArguments:
    """
    The demo's task and where its recipes are.

    Args:
        output_dir (`str`): the run's folder.
        recipes (`str`): folder of the base model and the phase recipes.
        rounds (`int`): rounds of the policy iteration.
        models (`list[str]`): what to train: any of the baselines (`sft`, ..), `paper`, `informed`.
    """

    output_dir: str = field(default="runs/demo", metadata={"help": "The run's folder."})
    recipes: str = field(default="recipes/demo", metadata={"help": "Folder of the base model and the recipes."})
    rounds: int = field(default=1, metadata={"help": "Rounds of the policy iteration."})
    models: list[str] = field(
        default_factory=lambda: ["sft", *WARMUPS], metadata={"help": f"Any of {', '.join([*BASELINES, *WARMUPS])}."}
    )
    chain_steps: int = field(default=6, metadata={"help": "Operations of a problem."})
    modulus: int = field(default=5, metadata={"help": "Numbers are 0 .. modulus - 1."})
    rows_per_phase: int = field(default=12800, metadata={"help": "Training rows of each phase and round."})
    test_rows: int = field(default=1000, metadata={"help": "Held-out problems."})
    seed: int = field(default=0, metadata={"help": "Seed of data, traces and training."})


def write_problems(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps({**asdict(row), "prompt": row.prompt[0]["content"]}) + "\n" for row in rows))
    return str(path)


def demo(args: DemoArguments) -> list[dict]:
    """Run everything and return the rows of `results.json`."""
    start = time.monotonic()
    run, recipes = Path(args.output_dir), Path(args.recipes)
    run.mkdir(parents=True, exist_ok=True)
    n_train = 2 * args.rounds * args.rows_per_phase
    rows = chain_arithmetic(n_train + args.test_rows, args.chain_steps, args.modulus, args.seed)
    train = write_problems(run / "train.jsonl", rows[:n_train])
    test = write_problems(run / "test.jsonl", rows[n_train:])

    def phase(phase_name: str, recipe: str | None, output: str, **fields) -> str:
        arguments = ["--config", str(recipes / recipe)] if recipe else []
        for key, value in {"output_dir": run / output, **fields}.items():
            arguments += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
        print(f"[{time.monotonic() - start:5.0f} s] {output}", flush=True)
        run_phase(phase_name, arguments)
        return str(run / output)

    base = phase("init", "init.yaml", "init", base_model=recipes / "base")
    data = phase("data", None, "data", data=train, data_format="problems", tokenizer=base)
    evaluation = run / "evaluate.yaml"
    evaluation.write_text((recipes / "evaluate.yaml").read_text() + f"problems: {test}\n")

    def shared(folder: str) -> dict:
        print(f"[{time.monotonic() - start:5.0f} s] {folder}", flush=True)
        same = {"model": base, "data": data, "evaluate": str(evaluation), "rounds": args.rounds}
        return same | {"rows_per_phase": args.rows_per_phase, "seed": args.seed, "run_dir": str(run / folder)}

    names = ["base", *(name for name in args.models if name not in WARMUPS)]
    results = baselines(
        BaselinesArguments(**shared("baselines"), **read_yaml(recipes / "baselines.yaml"), names=names)
    )
    for name in (name for name in args.models if name in WARMUPS):
        results += warmup(WarmupArguments(**shared(name), **read_yaml(recipes / f"warmup.{name}.yaml")))

    write_results(run / "results.json", results)
    title = f"Demo: {args.chain_steps} steps mod {args.modulus}, chance {100 / args.modulus:.0f}"
    print(f"\n{title}\n")
    arguments = ReportArguments([str(run)], str(run), title, 100 / args.modulus)
    path = report(arguments, f"abscot demo --rounds {args.rounds} --models {' '.join(args.models)}")
    print(f"\n{path}, report.html and figures beside it; {time.monotonic() - start:.0f} s in all")
    return results


if __name__ == "__main__":
    with exit_with_words("demo"):
        demo(*parse((DemoArguments,)))
