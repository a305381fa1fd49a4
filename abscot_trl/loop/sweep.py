"""
`abscot sweep`: one evaluation of the base and of every model that a warm-up's rounds and GRPO left, in order; with
`seeds` or temperatures one for each of their combinations.

Each evaluation is a stage as the driver's are: a process of its own, skipped when its manifest is there, gone on with
from its parts when it was killed.
"""

import re
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from abscot_trl.errors import Refused
from abscot_trl.evaluation.arguments import EvaluateArguments
from abscot_trl.evaluation.results import read_results, write_results
from abscot_trl.loop.arguments import DriverOptions
from abscot_trl.loop.driver import locked, run_all, tell
from abscot_trl.loop.stages import Stage, check_server, is_done
from abscot_trl.phases import check_fields, read_yaml
from abscot_trl.report.runs import rounds
from abscot_trl.storage import MANIFEST, PRUNED, check_folder, read_manifest

# Fields of the recipe, each with the field here that gives its values.
GRID = {"seed": "seeds", "trace_temperature": "trace_temperatures", "temperature": "temperatures"}


@dataclass
class SweepArguments:
    """
    Evaluate the models of a warm-up's run, over a grid of settings if one is given.

    Args:
        run (`str`): folder of the run. Evaluations go to `<run>/sweep`, their rows, with `stage` and `round`, to
            `<run>/sweep/results.json`.
        evaluate (`str`): recipe of the evaluation.
        stages (`list[str]`, *optional*): whose models (`base`, `round3/distill`, `grpo/train`); all when left out.
        seeds, trace_temperatures, temperatures (`list`, *optional*): values of the recipe's `seed`,
            `trace_temperature` and `temperature`; one evaluation for each combination, named in its `stage`.
        name (`str`, *optional*): the models' name in results, or else the folder's; GRPO's ends in `-grpo`.
        launch (`str`): `process`, each evaluation in one of its own, or `inline`, all in this one.
    """

    run: str = field(metadata={"help": "Folder of a warm-up's run."})
    evaluate: str = field(metadata={"help": "Recipe of the evaluation."})
    stages: list[str] | None = field(default=None, metadata={"help": "Whose models: base, round3/distill, ..; all."})
    seeds: list[int] | None = field(default=None, metadata={"help": "One evaluation for each."})
    trace_temperatures: list[float] | None = field(default=None, metadata={"help": "One evaluation for each."})
    temperatures: list[float] | None = field(default=None, metadata={"help": "One evaluation for each."})
    name: str | None = field(default=None, metadata={"help": "The models' name in results.json."})
    launch: str = field(
        default="process",
        metadata={"help": "A process an evaluation, or all in this one.", "choices": ["process", "inline"]},
    )

    def __post_init__(self):
        for name in ("stages", *GRID.values()):
            values = getattr(self, name)
            if values == []:
                raise Refused(f"{name} must name at least one; leave it out otherwise")
            if twice := [value for value in values or [] if values.count(value) > 1]:
                raise Refused(f"{name}: {twice[0]} stands twice")

    def grid(self) -> list[dict]:
        """The settings of each combination; one empty one without a grid."""
        given = {field: getattr(self, name) for field, name in GRID.items() if getattr(self, name) is not None}
        return [dict(zip(given, values, strict=True)) for values in product(*given.values())]


def models(run: Path) -> list[tuple[str, Path]]:
    """
    `base` and the models of rounds and GRPO by the stage that trained them (`round1/bottleneck`, `grpo/train`), merged
    where LoRA did.

    Raises:
        Refused: no stage of the run is done.
    """
    finished: list[tuple[str, Path]] = []
    trained = [folder / phase for folder in rounds(run) for phase in ("bottleneck", "distill")]
    for folder in [*trained, run / "grpo" / "train"]:
        if not (folder / MANIFEST).is_file():
            continue
        if not finished:
            base = read_manifest(folder, "settings")["settings"].get("model_name_or_path")
            if not isinstance(base, str):
                raise Refused(f"{folder}: its {MANIFEST} names no model that it was trained from")
            finished.append(("base", Path(base)))
        merged = folder.with_name(f"{folder.name}-merged")
        model = merged if (folder / "adapter_config.json").is_file() else folder
        if (model / MANIFEST).is_file():
            finished.append((f"{folder.parent.name}/{folder.name}", model))
    if not finished:
        raise Refused(f"{run}: no model of a warm-up is done there; run `abscot warmup` first")
    return finished


def _stage(args: SweepArguments, recipe: dict, name: str, model: Path, values: dict) -> Stage:
    words = [name]
    for field_, value in values.items():
        words.append(f"{field_.replace('_', ' ')} {str(value).removesuffix('.0')}")
    run = args.name or Path(args.run).resolve().name
    settings = {
        "model": str(model),
        "output_dir": str(Path(args.run) / "sweep" / "-".join(words).replace("/", "-").replace(" ", "-")),
        "name": {"base": "base", "grpo/train": f"{run}-grpo"}.get(name, run),
    }
    stage = Stage(" ".join(words), "evaluate", recipe | values | settings)
    try:
        EvaluateArguments(**stage.settings)  # refuses what makes no sense before the first is begun
    except Refused as error:
        raise Refused(f"{args.evaluate}, {stage.name}: {error}") from error
    return stage


def sweep_stages(args: SweepArguments) -> list[Stage]:
    """The evaluations in order; models without weights are named and left out."""
    recipe = read_yaml(args.evaluate)
    check_fields(recipe, (EvaluateArguments,), args.evaluate)
    found, todo = dict(models(Path(args.run))), []
    if "problems" not in recipe:
        raise Refused(f"{args.evaluate}: names no problems")
    if unknown := set(args.stages or []) - found.keys():
        raise Refused(f"stages: no model {min(unknown)!r}; the run has {', '.join(found)}")
    for name in args.stages or found:
        stages = [_stage(args, recipe, name, found[name], values) for values in args.grid()]
        if (found[name] / PRUNED).is_file() and not all(map(is_done, stages)):
            stages = list(filter(is_done, stages))
            print(f"{name} is left out: the weights of {found[name]} were pruned (`keep`)", flush=True)  # noqa: T201
        todo += stages
    return todo


def collect(run: Path, todo: list[Stage]) -> list[dict]:
    """
    The rows of the evaluations that are done (and graded), each with its `stage` and `round` (0: the base; GRPO's have
    none): those of `todo` in order, then those of earlier sweeps of this run.
    """
    names = {stage.output: stage.name for stage in todo if is_done(stage)}
    for path in sorted((run / "sweep").glob(f"*/{MANIFEST}")):
        names.setdefault(path.parent, read_manifest(path.parent, "stage")["stage"])
    rows = []
    for folder, name in names.items():
        if (folder / "results.json").is_file():
            of_round = re.match(r"round(\d+)/", name)
            about = {"stage": name, "round": int(of_round[1]) if of_round else 0}
            if name.startswith("grpo/"):
                del about["round"]
            rows += [row | about for row in read_results(folder)]
    return rows


def sweep(args: SweepArguments) -> list[dict]:
    """
    `abscot sweep`: run what is not done yet; returns the rows.

    Raises:
        Refused: no models, a recipe with unknown keys, or an evaluation that was made or begun
            with other settings or of another model;
            the run is at work, or an evaluation failed; the same command goes on from there.
    """
    check_folder(args.run)
    todo, run = sweep_stages(args), Path(args.run)
    check_server(todo)
    path = run / "sweep" / "results.json"
    if path.exists() and not any(run.glob("sweep/*.yaml")):
        raise Refused(f"{path} is there but was not made by a sweep; move it away")
    path.parent.mkdir(exist_ok=True)

    def after(number: int) -> list[dict]:
        write_results(path, collect(run, todo))
        tell(run, todo[number - 1].settings["model"])
        return collect(run, todo)

    with locked(run):
        return run_all(run, todo, todo, DriverOptions(launch=args.launch), "", after)
