"""
The baselines of a warm-up: the same rows (the union of its parts), the same number of optimiser steps, the learning
rate, batch and LoRA fields of its phase A, the same evaluation.

    concise: samples -> data;   then a baseline each: train -> merge -> evaluate
"""

from dataclasses import dataclass, field
from pathlib import Path

from abscot_trl.data.prepare import load_prepared
from abscot_trl.data.splits import PHASES as PARTS
from abscot_trl.data.splits import load_splits, run_splits
from abscot_trl.errors import Refused
from abscot_trl.evaluation.concise import ROWS_FILE
from abscot_trl.evaluation.results import read_results
from abscot_trl.loop.arguments import RunArguments
from abscot_trl.loop.driver import drive
from abscot_trl.loop.launch import check_launch, launcher_of
from abscot_trl.loop.stages import Stage, check_stages, phase_recipes
from abscot_trl.phases import PHASES, check_fields, read_yaml
from abscot_trl.storage import check_folder, read_json
from abscot_trl.training.configs import BASELINES
from abscot_trl.training.resume import LOG_FILE
from abscot_trl.training.steps import probes, steps_of
from abscot_trl.vocabulary import AbstractVocabulary

NAMES = ("base", *BASELINES)


@dataclass(kw_only=True)
class BaselinesArguments(RunArguments):
    """
    The baselines beside a warm-up, whose `rounds`, `rows_per_phase` and `seed` give the same rows, the phases' recipes
    and `rehearsal` the same steps.

    Args:
        names (`list[str]`): which, of `base` (the untrained model, verbal) and those of [`BaselineTrainer`].
        recipes (`str`): folder of `baseline.<name>.yaml`: what a baseline adds to the recipe of phase A.
        concise (`str`, *optional*): recipe of `abscot concise`, for the baseline of that name.
        warmup (`str`, *optional*): the run folder of the warm-up, once it is done: its steps are taken from its logs.
        steps (`int`, *optional*): optimiser steps of each baseline. Without these two they are computed, which packed
            rows do not allow.
        verbal_tokens (`int`, *optional*): `max_new_tokens` of verbal mode, where that of the evaluation is too short.
    """

    name: str = field(default="baselines", metadata={"help": "What the terminal calls the run."})
    names: list[str] = field(default_factory=lambda: list(NAMES), metadata={"help": f"Any of {', '.join(NAMES)}."})
    recipes: str = field(default="recipes/baselines", metadata={"help": "Folder of baseline.<name>.yaml."})
    concise: str | None = field(default=None, metadata={"help": "Recipe of abscot concise."})
    warmup: str | None = field(default=None, metadata={"help": "Finished warm-up whose steps are taken."})
    steps: int | None = field(default=None, metadata={"help": "Optimiser steps of each baseline."})
    verbal_tokens: int | None = field(default=None, metadata={"help": "max_new_tokens of verbal mode."})

    def __post_init__(self):
        super().__post_init__()
        unknown = [name for name in self.names if name not in NAMES]
        if unknown or not self.names:
            raise Refused(f"names: {unknown or 'none'}; any of {', '.join(NAMES)} are wanted")
        if "concise" in self.names and self.concise is None:
            raise Refused("names: concise needs the field concise, a recipe of `abscot concise`; or leave it out")
        for name in ("steps", "verbal_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise Refused(f"{name} must be at least 1, got {getattr(self, name)}")


def warmup_steps(args: BaselinesArguments) -> int:
    """
    Optimiser steps of the whole warm-up: given, summed over a finished one, or computed.

    Raises:
        Refused: the warm-up has not ended;
            its rows are packed and it was not run yet, so that nobody knows.
    """
    phases = [(t, phase) for t in range(1, args.rounds + 1) for phase in PARTS]
    if args.steps is not None:
        return args.steps
    if args.warmup is not None:
        logs = [Path(args.warmup) / f"round{t}" / phase / LOG_FILE for t, phase in phases]
        missing = [str(log) for log in logs if not log.is_file()]
        if missing:
            raise Refused(f"{missing[0]} is not there: the warm-up has not ended; end it, or set steps")
        remedy = "run that stage of the warm-up again, or set steps"
        return sum(read_json(log, remedy, "steps")["steps"] for log in logs)
    total, processes = 0, launcher_of(args).get("num_processes", 1)
    recipes = phase_recipes(args)
    for _, phase in phases:
        recipe = recipes[phase]
        if recipe.get("packing") and recipe.get("max_steps", -1) < 1:
            raise Refused(
                f"{getattr(args, phase)} packs rows, so its steps are known from a run alone; set warmup to the "
                "folder of a finished one, or steps"
            )
        rows = args.rows_per_phase - len(probes(args.rows_per_phase, recipe))
        rows *= 2 if phase == "distill" and args.rehearsal else 1
        total += steps_of(rows, recipe, processes)
    return total


def baseline_stages(args: BaselinesArguments) -> list[Stage]:
    """
    The stages in order, those of `concise`'s rows before its training.

    Raises:
        Refused: no recipe of the evaluation, or a recipe with unknown keys.
    """
    check_folder(args.run_dir)
    if not args.evaluate:
        raise Refused("evaluate: a recipe is needed; baselines are there to be compared")
    recipes = phase_recipes(args)
    check_fields(recipes["bottleneck"], PHASES["baseline"].classes, args.bottleneck)
    run, stages = Path(args.run_dir), []
    splits = str(run / "splits.json")
    steps = warmup_steps(args) if args.names != ["base"] else 0

    def add(name: str, phase: str, output: Path, settings: dict) -> str:
        stages.append(Stage(name, phase, settings | {"output_dir": str(output)}))
        return str(output)

    for name in (name for name in NAMES if name in args.names):
        folder, model, evaluation = run / name, args.model, recipes["evaluate"] | {"swaps": ["own"]}
        if name != "base":
            path = f"{args.recipes}/baseline.{name}.yaml"
            recipe = read_yaml(path)
            check_fields(recipe, PHASES["baseline"].classes, path)
            rows = {"data": args.data, "splits": splits}
            if name == "concise":
                concise = read_yaml(args.concise)
                check_fields(concise, PHASES["concise"].classes, args.concise)
                settings = concise | {"model": model, "seed": args.seed} | rows
                samples = add("concise/samples", "concise", folder / "samples", settings)
                settings = {"data": [f"{samples}/{ROWS_FILE}"], "data_format": "problems", "tokenizer": model}
                settings |= {"max_total_tokens": recipes["bottleneck"].get("max_length", 8192), "shuffle_buffer": 0}
                rows = {"data": add("concise/data", "data", folder / "data", settings)}
            settings = recipes["bottleneck"] | recipe | rows | {"model_name_or_path": model, "max_steps": steps}
            settings |= {"resume_from_checkpoint": True, "seed": args.seed}
            model = add(f"{name}/train", "baseline", folder / "train", settings)
            if settings.get("use_peft"):
                model = add(f"{name}/merge", "merge", folder / "merged", {"adapter": model})
            if name == "pause":
                pauses = recipe.get("pause_tokens") or AbstractVocabulary.load(args.model).m_max
                evaluation = evaluation | {"pause_tokens": pauses}
        mode = BASELINES.get(name, "verbal")
        if mode == "verbal" and args.verbal_tokens is not None:
            evaluation = evaluation | {"max_new_tokens": args.verbal_tokens}
        evaluation = evaluation | {"model": model, "name": name, "modes": [mode]}
        add(f"{name}/evaluate", "evaluate", folder / "evaluate", evaluation)
    return stages


def collect_baselines(run_dir: str | Path) -> list[dict]:
    """Rows of all baselines that were evaluated in this run, in the order of `NAMES`."""
    paths = [Path(run_dir) / name / "evaluate" / "results.json" for name in NAMES]
    return [row for path in paths if path.is_file() for row in read_results(path)]


def baselines(args: BaselinesArguments) -> list[dict]:
    """
    `abscot baselines`: run all stages that are not done, and print results and wall times.

    Returns:
        The rows of `results.json`.

    Raises:
        Refused: recipes with unknown keys, too few rows, rows that are not the warm-up's, or a run that was started
            with other settings.
    """
    todo = baseline_stages(args)
    check_launch(todo, args)
    check_stages(todo, args)
    data, _ = load_prepared(args.data)
    if args.warmup is not None:
        load_splits(Path(args.warmup) / "splits.json", len(data), args.rounds, args.rows_per_phase, args.seed)
    splits = run_splits(Path(args.run_dir) / "splits.json", len(data), args.rounds, args.rows_per_phase, args.seed)
    return drive(todo, args, args.name, splits, len(data), lambda: collect_baselines(args.run_dir))
