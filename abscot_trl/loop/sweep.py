"""
`abscot sweep`: one evaluation of the base and of every model that a warm-up's rounds left, in order.

Each evaluation is a stage as the driver's are: a process of its own, skipped when its manifest is there, gone on with
from its parts when it was killed.
"""

from dataclasses import dataclass, field
from pathlib import Path

from abscot_trl.errors import Refused
from abscot_trl.evaluation.arguments import EvaluateArguments
from abscot_trl.evaluation.results import read_results, write_results
from abscot_trl.loop.driver import Stage, is_done, locked, print_times, run_stage
from abscot_trl.phases import check_fields, read_yaml
from abscot_trl.report.runs import rounds
from abscot_trl.report.tables import results_table
from abscot_trl.storage import MANIFEST, PRUNED, read_manifest


@dataclass
class SweepArguments:
    """
    Evaluate all models of a warm-up's run.

    Args:
        run (`str`): folder of the run. Evaluations go to `<run>/sweep`, their rows, with `stage` and `round`, to
            `<run>/sweep/results.json`.
        evaluate (`str`): recipe of the evaluation.
        name (`str`, *optional*): the models' name in results; the run's folder's when left out.
        launch (`str`): `process`, each evaluation in one of its own, or `inline`, all in this one.
    """

    run: str = field(metadata={"help": "Folder of a warm-up's run."})
    evaluate: str = field(metadata={"help": "Recipe of the evaluation."})
    name: str | None = field(default=None, metadata={"help": "The models' name in results.json."})
    launch: str = field(
        default="process",
        metadata={"help": "A process an evaluation, or all in this one.", "choices": ["process", "inline"]},
    )
    keep_checkpoints = True  # what the driver asks of a run; an evaluation has none


def models(run: Path) -> list[tuple[str, Path]]:
    """
    `base` and the models of the rounds by the stage that trained them (`round1/bottleneck`), merged where LoRA did.

    Raises:
        Refused: no stage of the run is done.
    """
    found: list[tuple[str, Path]] = []
    for folder in rounds(run):
        for phase in ("bottleneck", "distill"):
            if not (folder / phase / MANIFEST).is_file():
                continue
            if not found:
                settings = read_manifest(folder / phase, "settings")["settings"]
                found.append(("base", Path(settings["model_name_or_path"])))
            adapter = (folder / phase / "adapter_config.json").is_file()
            model = folder / f"{phase}-merged" if adapter else folder / phase
            if (model / MANIFEST).is_file():
                found.append((f"{folder.name}/{phase}", model))
    if not found:
        raise Refused(f"{run}: no model of a warm-up is done there; run `abscot warmup` first")
    return found


def sweep_stages(args: SweepArguments) -> list[Stage]:
    """The evaluations in order; models without weights are named and left out."""
    run, recipe = Path(args.run), read_yaml(args.evaluate)
    check_fields(recipe, (EvaluateArguments,), args.evaluate)
    todo = []
    for name, model in models(run):
        stage = Stage(
            name,
            "evaluate",
            recipe
            | {
                "model": str(model),
                "output_dir": str(run / "sweep" / name.replace("/", "-")),
                "name": "base" if name == "base" else args.name or run.resolve().name,
            },
        )
        if (model / PRUNED).is_file() and not is_done(stage):
            print(f"{name} is left out: the weights of {model} were pruned (`keep`)", flush=True)  # noqa: T201
        else:
            todo.append(stage)
    return todo


def collect(stages: list[Stage]) -> list[dict]:
    """The rows of the evaluations that are done (and graded), each with its `stage` and `round` (0: the base)."""
    rows = []
    for stage in stages:
        path, round_name = stage.output / "results.json", stage.name.partition("/")[0]
        if is_done(stage) and path.is_file():
            t = 0 if stage.name == "base" else int(round_name.removeprefix("round"))
            rows += [{**row, "stage": stage.name, "round": t} for row in read_results(path)]
    return rows


def sweep(args: SweepArguments) -> list[dict]:
    """
    `abscot sweep`: run what is not done yet; returns the rows.

    Raises:
        Refused: no models, a recipe with unknown keys, or an evaluation that was made or begun
            with other settings or of another model;
            the run is at work, or an evaluation failed; the same command goes on from there.
    """
    todo, times = sweep_stages(args), []
    (Path(args.run) / "sweep").mkdir(exist_ok=True)
    with locked(Path(args.run)) as lock:
        for number, stage in enumerate(todo, 1):
            print(f"[{number}/{len(todo)}] {stage.name}{' (done)' * is_done(stage)}", flush=True)  # noqa: T201
            times.append((stage.name, run_stage(stage, args, held=(lock,))))
            write_results(Path(args.run) / "sweep" / "results.json", collect(todo))
    results = collect(todo)
    print(results_table(results))  # noqa: T201
    print_times(times)
    return results
