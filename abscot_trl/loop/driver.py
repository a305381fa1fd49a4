"""
Stages that may be killed at any moment and end in the files of a run that was not.

A stage writes one folder. Before it starts, `<folder>.running` records its settings and inputs; when it has ended,
`manifest.json` in the folder does, and the stage is skipped from then on. A training stage that was killed goes on
from its last sealed checkpoint, `abscot traces` from its parts; the others are short and begin again.
"""

import fcntl
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from abscot_trl.cli import TRAINING, accelerate_config_path
from abscot_trl.errors import Refused
from abscot_trl.loop.memory import GIB, stage_disk
from abscot_trl.loop.record import environment, write_record
from abscot_trl.phases import read_yaml, run_phase
from abscot_trl.storage import (
    INPUTS,
    MANIFEST,
    PRUNED,
    differences,
    input_digests,
    path_digest,
    read_json,
    read_manifest,
    write_whole,
)
from abscot_trl.training.resume import LOG_FILE, remove_checkpoint, sealed_checkpoints


@dataclass
class Stage:
    """One step of the loop: a phase, its settings, and the folder (`output_dir` of the settings) it writes."""

    name: str
    phase: str
    settings: dict

    @property
    def output(self) -> Path:
        return Path(self.settings["output_dir"])


def is_done(stage: Stage) -> bool:
    return (stage.output / MANIFEST).is_file()


def launcher_of(args) -> dict:
    """
    The accelerate configuration; empty without one.

    Raises:
        Refused: no such file or name, or no such configuration.
    """
    if args.accelerate_config is None:
        return {}
    path = accelerate_config_path(args.accelerate_config)
    config = read_yaml(path)
    processes = config.get("num_processes", 1)
    if type(processes) is not int or processes < 1:
        raise Refused(f"{path}: num_processes: {processes!r} is no number of processes")
    if not isinstance(config.get("deepspeed_config", {}), dict):
        raise Refused(f"{path}: deepspeed_config: {config['deepspeed_config']!r} is no mapping")
    return config


def launch(stage: Stage, config: Path, args, held: tuple[int, ...] = ()) -> None:
    """
    Run a stage from its configuration file.

    Raises:
        Refused: the stage's process failed.
    """
    if args.launch == "inline":
        run_phase(stage.phase, ["--config", str(config)])
        return
    module = ["-m", f"abscot_trl.scripts.{stage.phase}", "--config", str(config)]
    command = [sys.executable, *module]
    if stage.phase in TRAINING and args.accelerate_config:
        accelerate = ["--accelerate_config", args.accelerate_config, "--config", str(config)]
        command = [sys.executable, "-m", "abscot_trl.cli", stage.phase, *accelerate]
    elif stage.phase in TRAINING:
        command = [sys.executable, "-m", "accelerate.commands.launch", *module]
    code = subprocess.run(command, pass_fds=held).returncode  # an orphan of a killed driver keeps the run's lock
    if code:
        raise Refused(
            f"stage {stage.name} failed with exit code {code} (its settings: {config}); mend its recipe and run the "
            "same command again to continue from it"
        )


def _differences(then: dict, now: dict) -> str:
    """What tells two records of a stage apart, in words; empty when nothing does."""
    words = differences(then["settings"], now["settings"])
    other = [
        f"other files at {key} {now['settings'][key]}"
        for key, digest in now["inputs"].items()
        if key not in words and then["inputs"].get(key) != digest
    ]
    return ", ".join([*words.values(), *other])


def _begin(stage: Stage, record: dict, running: Path) -> int:
    """
    Clear what an attempt that did not end has left, except the work it can go on from, and note the new attempt.

    Returns:
        `int`: which attempt this is, from 1.

    Raises:
        Refused: the folder is there but not of this run's making;
            checkpoints are there that were made with other settings or inputs.
    """
    output, attempt = stage.output, 1
    if running.exists():
        remedy = f"remove it and {output} to begin this stage again"
        then = read_json(running, remedy, "settings", "inputs", "attempt")
        attempt = then["attempt"] + 1
        different = _differences(then, record)
        if sealed_checkpoints(output) and different:
            raise Refused(
                f"{output} was begun with other settings ({different}); go back to them to continue from "
                f"{sealed_checkpoints(output)[-1].name}, or remove the folder to begin this stage again"
            )
        if sealed_checkpoints(output):
            (output / LOG_FILE).unlink(missing_ok=True)
        elif output.exists() and (different or stage.phase != "evaluate"):
            shutil.rmtree(output)
        for left in output.parent.glob(f".{output.name}-*"):  # of `written_whole`; the run's lock is ours
            shutil.rmtree(left)
    elif output.exists():
        raise Refused(f"{output} is there but was not made by this run; move it away")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(running, json.dumps(record | {"attempt": attempt}, indent=2) + "\n")
    return attempt


def check_disk(stage: Stage) -> None:
    """
    Raises:
        Refused: the stage will write more than is free.
    """
    folder = next(path for path in stage.output.absolute().parents if path.exists())
    needed, free = stage_disk(stage.phase, stage.settings), shutil.disk_usage(folder).free
    if needed > free:
        raise Refused(
            f"{stage.name} will write about {needed / GIB:.1f} GiB, {free / GIB:.1f} are free at {folder}: make room "
            "(keep: last, a smaller save_total_limit) and run the same command again"
        )


def run_stage(stage: Stage, args, held: tuple[int, ...] = ()) -> float:
    """
    Run a stage unless its manifest says it is done with the same settings; returns its wall time in seconds.

    Raises:
        Refused: the stage was done, or begun, with other settings or inputs; nothing is mixed or overwritten;
            its folder is there but not of this run's making;
            too little disk, or the stage's process failed.
    """
    output = stage.output
    running = output.with_name(output.name + ".running")
    inputs = input_digests(stage.settings)
    record = {"stage": stage.name, "phase": stage.phase, "settings": stage.settings, "inputs": inputs}
    record = json.loads(json.dumps(record))
    if not is_done(stage):
        pruned = [str(stage.settings[key]) for key in inputs if (Path(str(stage.settings[key])) / PRUNED).is_file()]
        if pruned:
            raise Refused(f"{stage.name} needs {pruned[0]}, whose weights were pruned (`keep`); use another run_dir")
        check_disk(stage)
        attempt = _begin(stage, record, running)
        config = output.with_name(output.name + ".yaml")
        write_whole(config, yaml.safe_dump(stage.settings, sort_keys=False))
        start = time.monotonic()
        if output.exists() and stage.phase == "evaluate":  # whole, and killed before its manifest: graded once
            shutil.rmtree(f"{output}.parts", ignore_errors=True)
        else:
            launch(stage, config, args, held)
        record["wall_s"] = round(time.monotonic() - start, 1)
        record |= {"attempts": attempt, "environment": environment()}
        write_whole(output / MANIFEST, json.dumps(record, indent=2) + "\n")
    done = read_manifest(output, "settings", "inputs", "wall_s", "attempts")
    different = _differences(done, record)
    if different:
        raise Refused(f"{output} was made with other settings ({different}); use another run_dir")
    running.unlink(missing_ok=True)
    if not args.keep_checkpoints:
        for checkpoint in output.glob("checkpoint-*"):
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
    models = [stage for stage in todo if stage.phase in (*TRAINING, "merge")]
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
            for weights in output.glob("*.safetensors"):
                weights.unlink()


@contextmanager
def locked(run: Path) -> Iterator[int]:
    """
    Hold the run's lock; yields its file descriptor.

    Raises:
        Refused: another warm-up, or a process that a killed one left behind, still works in this folder.
    """
    with open(run / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(f"{run}: another warm-up, or a process it left behind, is still at work here") from None
        for left in run.rglob(".*.[0-9]*"):  # of `write_whole`, killed
            if left.is_file():
                left.unlink()
        yield lock.fileno()


def run_stages(
    run: Path, todo: list[Stage], chosen: list[Stage], args, lock: int, after: Callable[[Stage], None]
) -> list[tuple[str, float]]:
    """
    Run those `chosen` among the run's stages `todo`; after each, prune models, call `after` and write the record.

    Args:
        args: the run's fields: `name`, `launch`, `accelerate_config`, `keep`, `keep_checkpoints`.
        lock (`int`): the file descriptor that `locked` yields.

    Returns:
        (name, wall seconds) of each stage chosen.
    """
    times = []
    for stage in chosen:
        number = todo.index(stage) + 1
        print(f"[{number}/{len(todo)}] {args.name} {stage.name}{' (done)' * is_done(stage)}", flush=True)  # noqa: T201
        times.append((stage.name, run_stage(stage, args, held=(lock,))))
        prune_models(todo, number, args.keep)
        after(stage)
        write_record(run, todo[:number])
    return times


def print_stages(todo: list[Stage], chosen: list[Stage]) -> None:
    """What `dry_run` says: which of the stages are done, which are to do."""
    for stage in todo:
        note = "done" if is_done(stage) else "to do" if stage in chosen else "not asked for"
        print(f"{stage.name:<24} {note:<14} {stage.settings['output_dir']}")  # noqa: T201


def print_times(times: list[tuple[str, float]]) -> None:
    """Wall time by stage, and in all."""
    width = max(len(name) for name, _ in times)
    for name, seconds in [*times, ("total", sum(seconds for _, seconds in times))]:
        print(f"{name:<{width}} {seconds:>9.1f} s")  # noqa: T201
