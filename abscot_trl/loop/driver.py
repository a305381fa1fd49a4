"""
Stages that may be killed at any moment and end in the files of a run that was not.

A stage writes one folder. Before it starts, `<folder>.running` records its settings and inputs; when it has ended,
`manifest.json` in the folder does, and the stage is skipped from then on. A training stage that was killed goes on
from its last sealed checkpoint, `abscot traces` from its parts; the others are short and begin again.
"""

import glob
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from abscot_trl.data.splits import save_splits
from abscot_trl.errors import Refused
from abscot_trl.evaluation.results import write_results
from abscot_trl.loop.arguments import DriverOptions, RunArguments
from abscot_trl.loop.launch import check_nodes, launch, launcher_of
from abscot_trl.loop.memory import GIB, stage_disk
from abscot_trl.loop.record import RECORDS, environment, write_record
from abscot_trl.loop.stages import Stage, choose_stages, is_done, print_stages, running_file
from abscot_trl.phases import TRAINING
from abscot_trl.report.card import write_results_card
from abscot_trl.report.tables import results_table
from abscot_trl.storage import (
    CARD,
    INPUTS,
    MANIFEST,
    PRUNED,
    SETTINGS,
    TEMPORARY,
    at_work,
    differences,
    input_digests,
    path_digest,
    read_json,
    read_manifest,
    write_whole,
)
from abscot_trl.training.resume import LOG_FILE, MARK, remove_checkpoint, sealed_checkpoints


def _differences(then: dict, now: dict) -> str:
    """What tells two records of a stage apart, in words; empty when nothing does."""
    words = differences(then["settings"], now["settings"])
    other = [
        f"other files at {key} {now['settings'][key]}"
        for key, digest in now["inputs"].items()
        if key not in words
        and then["inputs"].get(key, digest) != digest  # an older version noted fewer, and cards with the rest
        and then["inputs"][key] != input_digests({key: now["settings"][key]}, with_card=True)[key]
    ]
    return ", ".join([*words.values(), *other])


def _is_whole(stage: Stage) -> bool:
    """Made to its end, if perhaps killed before its manifest. Phases that do not train rename their folder last."""
    return (stage.output / LOG_FILE).is_file() if stage.phase in TRAINING else stage.output.exists()


def _begin(stage: Stage, record: dict, running: Path) -> int:
    """
    Clear what an attempt that did not end has left, except the work it can go on from, and note the new attempt.

    Returns:
        `int`: which attempt this is, from 1.

    Raises:
        Refused: the folder is there but not of this run's making, or somebody is at work on it;
            it is whole, or holds checkpoints, but was made with other settings or inputs.
    """
    output, attempt = stage.output, 1
    with at_work(output):  # nobody else is
        pass
    if running.exists():
        remedy = f"remove it and {output} to begin this stage again"
        then = read_json(running, remedy, settings=dict, inputs=dict, attempt=int)
        attempt = then["attempt"] + 1
        different, sealed = _differences(then, record), sealed_checkpoints(output)
        if different and (sealed or _is_whole(stage)):
            raise Refused(
                f"{output} was begun with other settings ({different}); go back to them to continue from "
                f"{sealed[-1].name if sealed else 'there'}, or remove the folder to begin this stage again"
            )
        half = f".{glob.escape(output.name)}-*{TEMPORARY}/"  # of `written_whole`, and of the lines below
        for left in output.parent.glob(half):
            shutil.rmtree(left)
        if (output / MARK).is_file() and not sealed and not _is_whole(stage):
            gone = output.with_name(f".{output.name}-gone{TEMPORARY}")  # a kill in here must not lose the mark alone
            output.rename(gone)
            shutil.rmtree(gone)
    elif output.exists():
        raise Refused(f"{output} is there but was not made by this run; move it away")
    write_whole(running, json.dumps(record | {"attempt": attempt}, indent=2) + "\n")
    return attempt


def check_disk(stage: Stage, options: DriverOptions) -> None:
    """
    Raises:
        Refused: the stage will write more than is free.
    """
    folder = next(path for path in stage.output.absolute().parents if path.exists())
    launcher = launcher_of(options) if options.launch == "accelerate" else {}
    needed, free = stage_disk(stage.phase, stage.settings, launcher), shutil.disk_usage(folder).free
    if needed > free:
        raise Refused(
            f"{stage.name} will write about {needed / GIB:.1f} GiB, {free / GIB:.1f} are free at {folder}: make room "
            "(keep: last, a smaller save_total_limit) and run the same command again"
        )


def run_stage(stage: Stage, options: DriverOptions) -> float:
    """
    Run a stage unless its manifest says it is done with the same settings; returns its wall time in seconds.

    Raises:
        Refused: the stage was done, or begun, with other settings or inputs; nothing is mixed or overwritten;
            its folder is there but not of this run's making;
            too little disk, or the stage's process failed.
    """
    output = stage.output
    running = running_file(stage)
    inputs = input_digests(stage.settings)
    record = {"stage": stage.name, "phase": stage.phase, "settings": stage.settings, "inputs": inputs}
    record = json.loads(json.dumps(record))
    if not is_done(stage):
        pruned = [str(stage.settings[key]) for key in inputs if (Path(str(stage.settings[key])) / PRUNED).is_file()]
        if pruned:
            raise Refused(f"{stage.name} needs {pruned[0]}, whose weights were pruned (`keep`); use another run_dir")
        check_disk(stage, options)
        attempt = _begin(stage, record, running)
        config = output.with_name(output.name + ".yaml")
        write_whole(config, yaml.safe_dump(stage.settings, sort_keys=False))
        start = time.monotonic()
        parts = Path(f"{output}.parts")
        if not _is_whole(stage):
            launch(stage, config, options)
        elif (parts / SETTINGS).is_file():
            shutil.rmtree(parts)
        record["wall_s"] = round(time.monotonic() - start, 1)
        record |= {"attempts": attempt, "environment": environment()}
        write_whole(output / MANIFEST, json.dumps(record, indent=2) + "\n")
    done = read_manifest(output, "settings", "inputs", "wall_s", "attempts")
    different = _differences(done, record)
    if different:
        raise Refused(f"{output} was made with other settings ({different}); use another run_dir")
    running.unlink(missing_ok=True)
    if not options.keep_checkpoints:
        for checkpoint in output.glob("checkpoint-*/"):
            if re.fullmatch(r"checkpoint-\d+", checkpoint.name):
                remove_checkpoint(checkpoint)
    return done["wall_s"]


def prune_models(todo: list[Stage], done: int, keep: str) -> None:
    """
    Remove weights that none of the stages after the first `done` needs; the last model of all always stays.

    With `keep` `rounds` the last model of each round stays too, with `all` every one. The folder keeps its digest
    (`pruned.json`), so that what was made from it still counts as done.
    """
    if keep == "all":
        return
    models = [stage for stage in todo if stage.phase in (*TRAINING, "merge", "init")]
    last = {stage.name.split("/")[0] if keep == "rounds" else "": stage.output for stage in models}
    needed = {str(stage.settings.get(key)) for stage in todo[done:] for key in INPUTS}
    trained_on = {str(stage.output): str(stage.settings.get("model_name_or_path")) for stage in models}
    needed |= {trained_on[stage.settings["adapter"]] for stage in todo[done:] if stage.phase == "merge"}
    for stage in todo[:done]:
        output = stage.output
        is_model = stage in models and (output / "config.json").is_file()
        if is_model and output not in last.values() and str(output) not in needed:
            if not (output / PRUNED).is_file():
                write_whole(output / PRUNED, json.dumps({"digest": path_digest(output)}) + "\n")
            for weights in output.glob("model*.safetensors"):
                weights.unlink()


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """
    Hold the run's lock, and remove the half-written files of whoever was killed in it.

    Raises:
        Refused: another driver is at work in this folder.
    """
    with at_work(run, lock=run / ".lock"):
        for left in run.rglob(f".*{TEMPORARY}"):
            if left.is_file():
                left.unlink()
        yield


def run_all(
    run: Path, todo: list[Stage], chosen: list[Stage], options: DriverOptions, title: str, after: Callable
) -> list[dict]:
    """
    Run those `chosen` among the stages `todo`; print results and wall times.

    Args:
        after (`Callable`): called when a stage is done; gives the results so far.

    Returns:
        The results at the end.
    """
    times, results, shown = [], [], 0
    for stage in chosen:
        shown += stage.phase == "evaluate" and options.launch == "accelerate" and not stage.output.exists()
        number = todo.index(stage) + 1
        print(f"[{number}/{len(todo)}] {title}{stage.name}{' (done)' * is_done(stage)}", flush=True)  # noqa: T201
        times.append((stage.name, run_stage(stage, options)))
        prune_models(todo, number, options.keep)
        results = after(number)
    if results and (shown, sum(stage.phase == "evaluate" for stage in todo)) != (1, 1):  # its process shows its own
        print(results_table(results))  # noqa: T201
    print_times(times)
    if results:
        print(f"next: abscot report {run}")  # noqa: T201
    return results


def drive(
    todo: list[Stage],
    args: RunArguments,
    title: str,
    splits: dict[str, list[int]],
    n_rows: int,
    collect: Callable[[], list[dict]],
    warn: Callable[[], list[str]] = list,
    judge: Callable[[Stage], None] = lambda stage: None,
) -> list[dict]:
    """
    Run the stages of a warm-up or its baselines that are chosen and not done, in `args.run_dir`.

    Args:
        todo (`list[Stage]`): all stages, in order.
        title (`str`): what the terminal calls the run.
        splits (`dict`): the run's (`run_splits`).
        n_rows (`int`): rows of the prepared data, which they were drawn from.
        collect (`Callable`): the results of what is done.
        warn (`Callable`): sentences to print after an evaluation.
        judge (`Callable`): called with each stage that is done; what it raises ends the run there.

    Returns:
        The rows of `results.json`.

    Raises:
        Refused: no such stage, or a folder that holds what it would write; nodes that cannot train together.
    """
    check_nodes(args)
    chosen, run = choose_stages(todo, args), Path(args.run_dir)
    last = todo.index(chosen[-1]) + 1
    foreign = [name for name in ("results.json", *RECORDS) if (run / name).exists()]
    if foreign and not (run / ".lock").exists():
        raise Refused(f"{run} holds a {foreign[0]} but no run; use another run_dir")
    if args.dry_run:
        print_stages(todo, chosen)
        return collect()

    def after(number: int) -> list[dict]:
        if todo[number - 1].phase == "evaluate":
            write_results(run / "results.json", collect())
            for sentence in warn():
                print(f"WARNING: {sentence}", flush=True)  # noqa: T201
        if number == last or not is_done(todo[number]):  # or the next stage, which is done too, has it written
            write_record(run, todo[:number])
        judge(todo[number - 1])
        return collect()

    run.mkdir(parents=True, exist_ok=True)
    with locked(run):
        if not (run / "splits.json").is_file():
            save_splits(run / "splits.json", splits, n_rows, args.seed)
        return run_all(run, todo, chosen, args, f"{title} ", after)


def tell(run: str | Path, model: str | Path) -> None:
    """Write what `run` found of `model` on its card, unless that was edited."""
    if write_results_card(run, model) is False:
        print(f"{model}/{CARD} is not as this package wrote it: it stays as it is", flush=True)  # noqa: T201


def print_times(times: list[tuple[str, float]]) -> None:
    """Wall time by stage, and in all."""
    width = max(len(name) for name, _ in times)
    for name, seconds in [*times, ("total", sum(seconds for _, seconds in times))]:
        print(f"{name:<{width}} {seconds:>9.1f} s")  # noqa: T201
