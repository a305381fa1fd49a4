"""The phases by name: what each calls, and the fields of its YAML. Scripts, driver and demo all go through it."""

import dataclasses
import difflib
import json
import os
import signal
import sys
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from trl import ModelConfig, TrlParser

from abscot_trl.checkpoint import InitArguments, MergeArguments, init_checkpoint, merge_adapter
from abscot_trl.data.prepare import DataArguments, prepare
from abscot_trl.errors import Refused
from abscot_trl.evaluation.arguments import EvaluateArguments
from abscot_trl.evaluation.concise import ConciseArguments, make_concise
from abscot_trl.evaluation.evaluate import evaluate
from abscot_trl.report.tables import results_table
from abscot_trl.serving.server import ServeArguments, serve
from abscot_trl.traces.files import describe_traces
from abscot_trl.traces.make import TracesArguments, make_traces
from abscot_trl.training.configs import BaselineConfig, BottleneckConfig, DistillationConfig
from abscot_trl.training.phase import (
    BaselineArguments,
    TrainArguments,
    train_baseline,
    train_bottleneck,
    train_distill,
)

PHASES: dict[str, tuple[Callable, tuple[type, ...]]] = {
    "init": (init_checkpoint, (InitArguments,)),
    "data": (prepare, (DataArguments,)),
    "traces": (make_traces, (TracesArguments,)),
    "bottleneck": (train_bottleneck, (TrainArguments, BottleneckConfig, ModelConfig)),
    "distill": (train_distill, (TrainArguments, DistillationConfig, ModelConfig)),
    "baseline": (train_baseline, (BaselineArguments, BaselineConfig, ModelConfig)),
    "concise": (make_concise, (ConciseArguments,)),
    "merge": (merge_adapter, (MergeArguments,)),
    "evaluate": (evaluate, (EvaluateArguments,)),
    "serve": (serve, (ServeArguments,)),
}


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; YAML itself would keep the last one without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            raise yaml.YAMLError(f"key {twice[0]!r} stands twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """
    A recipe's mapping.

    Raises:
        Refused: no such file, or not a YAML mapping; the message names the file.
    """
    if not Path(path).is_file():
        raise Refused(f"{path}: no such recipe")
    try:
        settings = yaml.load(Path(path).read_text(), _StrictLoader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refused(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise Refused(f"{path} must hold a YAML mapping of fields, not {type(settings).__name__}")
    return settings


def _fits(value: Any, kind: Any) -> bool:
    """Whether a YAML value may stand for a field annotated `kind` (unions, lists, dicts and plain types)."""
    origin = typing.get_origin(kind)
    if kind is Any or isinstance(kind, typing.TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(kind))
    if origin is typing.Literal:
        return value in typing.get_args(kind)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, typing.get_args(kind)[0]) for item in value)
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, (int, float))
    return isinstance(value, origin or kind) if isinstance(origin or kind, type) else True


def check_fields(settings: dict[str, Any], classes: tuple[type, ...], path: str | Path) -> None:
    """
    argparse checks neither types nor choices of YAML values; this does.

    Raises:
        Refused: a key that is a field of none of `classes`, a value of another type (`2e-5` is text in YAML), or
            one that is not among the field's choices.
    """
    fields = {field.name: field for cls in classes for field in dataclasses.fields(cls)}
    kinds = {name: kind for cls in classes for name, kind in typing.get_type_hints(cls).items()}
    for key, value in settings.items():
        if key == "env":
            continue
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else "see --help for the fields"
            raise Refused(f"{path}: unknown key {key!r}; {hint}")
        if isinstance(value, str) and kinds[key] in (int, float):
            raise Refused(f"{path}: {key}: {value!r} is text; write a number (2.0e-5, not 2e-5)")
        field_kind = getattr(kinds[key], "__name__", None) or str(kinds[key])
        choices = fields[key].metadata.get("choices")
        if choices and value not in choices:
            raise Refused(f"{path}: {key}: {value!r} is not one of {', '.join(map(str, choices))}")
        if not _fits(value, kinds[key]) and not (value is None and fields[key].default is None):
            raise Refused(f"{path}: {key}: {value!r} does not fit; {field_kind} is wanted")


class _Parser(TrlParser):
    """Says in one line what is wrong with a command line, without the usage of forty fields."""

    def error(self, message: str):
        raise Refused(f"{message}; see --help")


def parse(classes: tuple[type, ...], arguments: list[str] | None = None) -> tuple:
    """
    Command line and `--config FILE.yaml` to dataclasses; the command line wins, then the last of several files.
    `None` reads `sys.argv`.

    Raises:
        Refused: an unknown key or a bad value; the message names the file.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    parser, path = _Parser(classes), None
    while "--config" in arguments:
        if arguments[-1] == "--config":
            raise Refused("--config needs a file")
        at = arguments.index("--config")
        path = arguments[at + 1]
        check_fields(read_yaml(path), classes, path)
        if "--config" not in arguments[at + 2 :]:
            break
        parser.set_defaults_with_config(**read_yaml(path))
        del arguments[at : at + 2]
    try:
        return parser.parse_args_and_config(arguments)
    except ValueError as error:
        where = "command line" if path is None or "not used by" in str(error) else path
        raise Refused(f"{where}: {error}") from error


def run_phase(name: str, arguments: list[str] | None = None) -> Any:
    """Parse the fields of phase `name` and run it in this process."""
    function, classes = PHASES[name]
    return function(*parse(classes, arguments))


@contextmanager
def exit_with_words(name: str) -> Iterator[None]:
    """Turn an error into one line and exit code 1; with ABSCOT_TRACEBACK=1 in the environment, show where it arose."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half-written folders are removed
    try:
        yield
    except Exception as error:
        if os.environ.get("ABSCOT_TRACEBACK"):
            raise
        words = " ".join(str(error).split())
        if not isinstance(error, (ValueError, OSError, RuntimeError)):  # not one of ours
            words = f"{type(error).__name__}: {words} (ABSCOT_TRACEBACK=1 shows where)"
        sys.exit(f"abscot {name}: {words}")


def main(name: str) -> None:
    """What `python -m abscot_trl.scripts.<name>` does."""
    with exit_with_words(name):
        result = run_phase(name)
    if name == "evaluate" and result:
        print(results_table(result))  # noqa: T201
    elif name == "traces" and "lengths" in result:
        print(describe_traces(result))  # noqa: T201
    elif isinstance(result, dict):
        print(json.dumps({key: value for key, value in result.items() if key != "settings"}, indent=2))  # noqa: T201
