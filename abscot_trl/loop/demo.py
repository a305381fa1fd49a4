"""
`abscot demo`: the whole method on chain arithmetic, from a tiny base model that speaks its CoT: SFT without CoT (or
any baseline), the paper's recipe and the informed one at equal steps, every trace swapped, a report.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from abscot_trl.data.toy import chain_arithmetic, write_problems
from abscot_trl.errors import Refused
from abscot_trl.evaluation.results import write_results
from abscot_trl.phases import PHASES, read_yaml, run_phase
from abscot_trl.report.make import ReportArguments, report
from abscot_trl.storage import check_folder
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

    def __post_init__(self):
        unknown = [name for name in self.models if name not in (*BASELINES, *WARMUPS)]
        if unknown:
            raise Refused(f"models: {', '.join(unknown)}; any of {', '.join([*BASELINES, *WARMUPS])} are wanted")
        for name in ("rounds", "chain_steps", "rows_per_phase", "test_rows"):
            if getattr(self, name) < 1:
                raise Refused(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 2 <= self.modulus <= 10:  # a number is one digit
            raise Refused(f"modulus must lie between 2 and 10, got {self.modulus}")


def demo(args: DemoArguments) -> list[dict]:
    """
    Run everything and return the rows of `results.json`.

    Raises:
        Refused: `output_dir` holds something already; nothing is overwritten.
    """
    start = time.monotonic()
    run, recipes = Path(args.output_dir), Path(args.recipes)
    check_folder(run)
    if run.is_dir() and (there := sorted(path.name for path in run.iterdir())):
        raise Refused(f"{run} is not empty ({there[0]}); choose another output_dir or remove it")
    n_train = 2 * args.rounds * args.rows_per_phase
    rows = chain_arithmetic(n_train + args.test_rows, args.chain_steps, args.modulus, args.seed)
    run.mkdir(parents=True, exist_ok=True)
    train = write_problems(run / "train.jsonl", rows[:n_train])
    test = write_problems(run / "test.jsonl", rows[n_train:])

    def phase(name: str, recipe: str | None, output: str, **fields):
        print(f"[{time.monotonic() - start:5.0f} s] {output}", flush=True)  # noqa: T201
        arguments = ["--config", str(recipes / recipe)] if recipe else []
        for key, value in {PHASES[name].folder: run / output, **fields}.items():
            arguments += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
        return run_phase(name, arguments)

    base = phase("init", "init.yaml", "init", base_model=recipes / "base")
    phase("data", None, "data", data=train, data_format="problems", tokenizer=base)
    evaluation = run / "evaluate.yaml"
    evaluation.write_text(yaml.safe_dump(read_yaml(recipes / "evaluate.yaml") | {"problems": test}))
    shared = {"model": base, "data": run / "data", "evaluate": evaluation, "rounds": args.rounds}
    shared |= {"rows_per_phase": args.rows_per_phase, "seed": args.seed}
    names = ["base", *(name for name in args.models if name not in WARMUPS)]
    results = phase("baselines", "baselines.yaml", "baselines", names=names, **shared)
    for name in (name for name in args.models if name in WARMUPS):
        results += phase("warmup", f"warmup.{name}.yaml", name, **shared)

    write_results(run / "results.json", results)
    title = f"Demo: {args.chain_steps} steps mod {args.modulus}, chance {100 / args.modulus:.0f}"
    print(f"\n{title}\n")  # noqa: T201
    arguments = ReportArguments([str(run)], str(run), title, 100 / args.modulus)
    path = report(arguments, f"abscot demo --rounds {args.rounds} --models {' '.join(args.models)}")
    print(f"\n{path}, report.html and figures beside it; {time.monotonic() - start:.0f} s in all")  # noqa: T201
    return results
