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
from abscot_trl.loop.arguments import DriverOptions
from abscot_trl.loop.driver import locked, run_all
from abscot_trl.loop.stages import Stage, check_server, is_done
from abscot_trl.phases import check_fields, read_yaml
from abscot_trl.report.runs import rounds
from abscot_trl.storage import MANIFEST, PRUNED, check_folder, read_manifest


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


def models(run: Path) -> list[tuple[str, Path]]:
    """
    `base` and the models of the rounds by the stage that trained them (`round1/bottleneck`), merged where LoRA did.

    Raises:
        Refused: no stage of the run is done.
    """
    finished: list[tuple[str, Path]] = []
    for folder in rounds(run):
        for phase in ("bottleneck", "distill"):
            if not (folder / phase / MANIFEST).is_file():
                continue
            if not finished:
                base = read_manifest(folder / phase, "settings")["settings"].get("model_name_or_path")
                if not isinstance(base, str):
                    raise Refused(f"{folder / phase}: its {MANIFEST} names no model that it was trained from")
                finished.append(("base", Path(base)))
            adapter = (folder / phase / "adapter_config.json").is_file()
            model = folder / f"{phase}-merged" if adapter else folder / phase
            if (model / MANIFEST).is_file():
                finished.append((f"{folder.name}/{phase}", model))
    if not finished:
        raise Refused(f"{run}: no model of a warm-up is done there; run `abscot warmup` first")
    return finished


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
    check_folder(args.run)
    todo, run = sweep_stages(args), Path(args.run)
    check_server(todo)
    path = run / "sweep" / "results.json"
    if path.exists() and not any(run.glob("sweep/*.yaml")):
        raise Refused(f"{path} is there but was not made by a sweep; move it away")
    path.parent.mkdir(exist_ok=True)

    def after(number: int) -> list[dict]:
        write_results(path, collect(todo))
        return collect(todo)

    with locked(run):
        return run_all(run, todo, todo, DriverOptions(launch=args.launch), "", after)
