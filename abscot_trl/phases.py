"""The phases by name: what each calls, and the fields of its YAML. Scripts, driver and demo all go through it."""

import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from trl import ModelConfig, TrlParser

from abscot_trl.checkpoint import InitArguments, MergeArguments, init_checkpoint, merge_adapter
from abscot_trl.data.prepare import DataArguments, prepare
from abscot_trl.evaluation.evaluate import EvaluateArguments, evaluate
from abscot_trl.traces.make import TracesArguments, make_traces
from abscot_trl.training.configs import BottleneckConfig, DistillationConfig
from abscot_trl.training.phase import TrainArguments, train_bottleneck, train_distill

PHASES: dict[str, tuple[Callable, tuple[type, ...]]] = {
    "init": (init_checkpoint, (InitArguments,)),
    "data": (prepare, (DataArguments,)),
    "traces": (make_traces, (TracesArguments,)),
    "bottleneck": (train_bottleneck, (TrainArguments, BottleneckConfig, ModelConfig)),
    "distill": (train_distill, (TrainArguments, DistillationConfig, ModelConfig)),
    "merge": (merge_adapter, (MergeArguments,)),
    "evaluate": (evaluate, (EvaluateArguments,)),
}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """
    A recipe's mapping.

    Raises:
        FileNotFoundError, ValueError: no such file, or not a YAML mapping; the message names the file.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such recipe") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a YAML mapping of fields, not {type(settings).__name__}")
    return settings


def check_fields(settings: dict[str, Any], classes: tuple[type, ...], path: str | Path) -> None:
    """
    Raises:
        ValueError: a key that is a field of none of `classes`, or a number that YAML read as text (`2e-5`).
    """
    fields = {field.name: field for cls in classes for field in dataclasses.fields(cls)}
    for key, value in settings.items():
        if key not in fields and key != "env":
            close = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else "see --help for the fields"
            raise ValueError(f"{path}: unknown key {key!r}; {hint}")
        if key in fields and isinstance(value, str) and fields[key].type in (int, float, "int", "float"):
            raise ValueError(f"{path}: {key}: {value!r} is text; write a number (2.0e-5, not 2e-5)")


def parse(classes: tuple[type, ...], arguments: list[str] | None = None) -> tuple:
    """
    Command line and `--config FILE.yaml` to dataclasses; the command line wins. `None` reads `sys.argv`.

    Raises:
        ValueError: an unknown key or a bad value; the message names the file.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    arguments = [
        part for item in arguments for part in (item.split("=", 1) if item.startswith("--config=") else [item])
    ]
    path = None
    if "--config" in arguments[:-1]:
        path = arguments[arguments.index("--config") + 1]
        check_fields(read_yaml(path), classes, path)
    try:
        return TrlParser(classes).parse_args_and_config(arguments)
    except ValueError as error:
        raise ValueError(f"{path or 'command line'}: {error}") from error


def run_phase(name: str, arguments: list[str] | None = None) -> Any:
    """Parse the fields of phase `name` and run it in this process."""
    function, classes = PHASES[name]
    return function(*parse(classes, arguments))


@contextmanager
def exit_with_words(name: str) -> Iterator[None]:
    """Turn an error into one line and exit code 1; with ABSCOT_TRACEBACK=1 in the environment, show where it arose."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("ABSCOT_TRACEBACK"):
            raise
        sys.exit(f"abscot {name}: {error}")


def main(name: str) -> None:
    """What `python -m abscot_trl.scripts.<name>` does."""
    with exit_with_words(name):
        run_phase(name)
