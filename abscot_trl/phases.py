"""
The phases: one table, and how a command line becomes a call.

What a phase calls is imported when it is called: a training process imports no web server and no plotting.
"""

import argparse
import dataclasses
import difflib
import json
import os
import reprlib
import sys
import typing
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml

from abscot_trl.errors import Refused


@dataclasses.dataclass(frozen=True)
class Phase:
    """
    A command, `abscot <name>`; objects are named `module:object`.

    Args:
        sentence (`str`): what it does, for `abscot --help`.
        function (`str`): what is called with one instance of each of `fields`.
        fields (`tuple[str, ...]`): the dataclasses of its recipe and command line.
        folder (`str`, *optional*): the field that names what it writes; errors are kept beside that.
        first (`str`, *optional*): the field that values before the first `--field` are of.
        show (`str`, *optional*): makes text for the terminal of the result; without it a dict is shown as JSON.
        launched (`bool`): by accelerate.
    """

    sentence: str
    function: str
    fields: tuple[str, ...]
    folder: str | None = "output_dir"
    first: str | None = None
    show: str | None = None
    launched: bool = False

    @property
    def classes(self) -> tuple[type, ...]:
        return tuple(map(resolve_name, self.fields))


def _training(sentence: str, name: str, arguments: str, config: str) -> Phase:
    fields = (f"abscot_trl.training.phase:{arguments}", f"abscot_trl.training.configs:{config}", "trl:ModelConfig")
    return Phase(sentence, f"abscot_trl.training.phase:train_{name}", fields, launched=True)


PHASES = {
    "new": Phase(
        "write the recipes of a model of your own, for its rows and a machine",
        "abscot_trl.loop.new:new",
        ("abscot_trl.loop.new:NewArguments",),
    ),
    "init": Phase(
        "extend a base model by the codebook",
        "abscot_trl.checkpoint:init_checkpoint",
        ("abscot_trl.checkpoint:InitArguments",),
    ),
    "data": Phase(
        "prepare rows: parse, tokenise, filter, count",
        "abscot_trl.data.prepare:prepare",
        ("abscot_trl.data.arguments:DataArguments",),
    ),
    "traces": Phase(
        "make the traces of a phase, initial or on policy",
        "abscot_trl.traces.make:make_traces",
        ("abscot_trl.traces.make:TracesArguments",),
        show="abscot_trl.traces.files:describe_traces",
    ),
    "bottleneck": _training(
        "phase A: bottlenecked SFT under the block mask (eq. 3)", "bottleneck", "TrainArguments", "BottleneckConfig"
    ),
    "distill": _training("phase B: self-distillation (eq. 4)", "distill", "TrainArguments", "DistillationConfig"),
    "grpo": Phase(
        "stage 2: reinforcement learning of trace and answer under constrained decoding (eq. 5)",
        "abscot_trl.training.grpo_phase:train_grpo",
        (
            "abscot_trl.training.grpo_phase:GRPOArguments",
            "abscot_trl.training.grpo_config:AbstractGRPOConfig",
            "trl:ModelConfig",
        ),
        launched=True,
    ),
    "baseline": _training(
        "what a warm-up is compared with: SFT without or with CoT, pause tokens, ..",
        "baseline",
        "BaselineArguments",
        "BaselineConfig",
    ),
    "concise": Phase(
        "the base model's own shortest right answers, as rows to train on",
        "abscot_trl.evaluation.concise:make_concise",
        ("abscot_trl.evaluation.concise:ConciseArguments",),
    ),
    "merge": Phase(
        "merge an adapter into its checkpoint",
        "abscot_trl.checkpoint:merge_adapter",
        ("abscot_trl.checkpoint:MergeArguments",),
    ),
    "evaluate": Phase(
        "score a model in verbal, direct and abstract mode, with every swap of the trace",
        "abscot_trl.evaluation.evaluate:evaluate",
        ("abscot_trl.evaluation.arguments:EvaluateArguments",),
        show="abscot_trl.report.tables:results_table",
    ),
    "sweep": Phase(
        "one evaluation of the base and of every model that a warm-up's rounds and GRPO left",
        "abscot_trl.loop.sweep:sweep",
        ("abscot_trl.loop.sweep:SweepArguments",),
        folder="run",
    ),
    "alpaca": Phase(
        "a judge compares an evaluation's outputs on AlpacaEval's prompts with reference outputs",
        "abscot_trl.evaluation.alpaca:alpaca",
        ("abscot_trl.evaluation.alpaca:AlpacaArguments",),
        show="abscot_trl.report.tables:results_table",
    ),
    "serve": Phase(
        "OpenAI's chat API for a trained checkpoint, the trace as reasoning_content",
        "abscot_trl.serving.server:serve",
        ("abscot_trl.serving.server:ServeArguments",),
        folder=None,
    ),
    "push": Phase(
        "upload a trained checkpoint to the hub, private unless you say otherwise",
        "abscot_trl.serving.push:push",
        ("abscot_trl.serving.push:PushArguments",),
        folder=None,
    ),
    "report": Phase(
        "figures, codebook and answers of one or more runs side by side: report.md, report.html",
        "abscot_trl.report.make:report",
        ("abscot_trl.report.make:ReportArguments",),
        first="runs",
    ),
    "plan": Phase(
        "what a warm-up will take: steps, tokens, memory, disk, hours",
        "abscot_trl.loop.plan:plan",
        ("abscot_trl.loop.plan:PlanArguments",),
        folder=None,
        show="abscot_trl.loop.plan:describe_plan",
    ),
    "warmup": Phase(
        "the policy iteration: all of the above, T rounds",
        "abscot_trl.loop.warmup:warmup",
        ("abscot_trl.loop.warmup:WarmupArguments",),
        folder="run_dir",
    ),
    "baselines": Phase(
        "train and evaluate the baselines on a warm-up's rows, for as many steps",
        "abscot_trl.loop.baselines:baselines",
        ("abscot_trl.loop.baselines:BaselinesArguments",),
        folder="run_dir",
    ),
    "demo": Phase(
        "the whole on a toy task, minutes on a laptop",
        "abscot_trl.loop.demo:demo",
        ("abscot_trl.loop.demo:DemoArguments",),
    ),
}
TRAINING = tuple(name for name, phase in PHASES.items() if phase.launched)
SETTABLE = ("bottleneck", "distill", "evaluate", "grpo")  # the phases whose fields a run takes as phase.field=value


def field_names(phase: str) -> list[str]:
    return [field.name for cls in PHASES[phase].classes for field in dataclasses.fields(cls) if field.init]


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; YAML itself would keep the last one without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            raise yaml.YAMLError(f"key {twice[0]!r} stands twice")
        return super().construct_mapping(node, deep)


def _mapping(path: str | Path) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise Refused(f"{path!s:.200}: no such recipe")
    try:
        settings = yaml.load(Path(path).read_text(), _StrictLoader)  # noqa: S506 (a SafeLoader)
    # Not UTF-8, or no such date, is a ValueError; PyYAML has a LookupError for `!!int ''`, and others of that kind.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, OSError, RecursionError) as error:
        raise Refused(f"{path} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise Refused(f"{path} must hold a YAML mapping of fields, not {type(settings).__name__}")
    return settings


def read_yaml(path: str | Path) -> dict[str, Any]:
    """
    A recipe's mapping. `base: FILE` stands for the fields of that recipe, in the same folder; those beside it win.

    Raises:
        Refused: no such file, or not a YAML mapping; the message names the file.
    """
    settings = _mapping(path)
    if "base" not in settings:
        return settings
    name = settings.pop("base")
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise Refused(f"{path}: base: {_short(name)} is not the name of a recipe in the same folder")
    fields = _mapping(Path(path).with_name(name))
    if "base" in fields:
        raise Refused(f"{path}: base: {name} has a base itself; name that one, or write the fields out")
    return fields | settings


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80
_short = _repr.repr  # of a value in a message, however deep or long


def check_fields(settings: dict[str, Any], classes: tuple[type, ...], path: str | Path) -> None:
    """
    argparse checks neither types nor choices of YAML values; this does.

    Raises:
        Refused: a key that is a field of none of `classes`, a value of another type (`2e-5` is text in YAML), or
            one that is not among the field's choices.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    fields = {field.name: field for cls in classes for field in dataclasses.fields(cls) if field.init}
    kinds = {name: kind for cls in classes for name, kind in typing.get_type_hints(cls).items()}
    strict = ConfigDict(strict=True, arbitrary_types_allowed=True)  # an int may stand for a float, nothing else
    for key, value in settings.items():
        if key not in fields:
            raise Refused(f"{path}: unknown key {_short(key)}; {meant(str(key), fields)}")
        if isinstance(value, str) and kinds[key] in (int, float):
            raise Refused(f"{path}: {key}: {_short(value)} is text; write a number (2.0e-5, not 2e-5)")
        choices = fields[key].metadata.get("choices")
        if choices and value not in choices:
            raise Refused(f"{path}: {key}: {_short(value)} is not one of {', '.join(map(str, choices))}")
        if value is None and fields[key].default is None:
            continue
        try:
            TypeAdapter(kinds[key], config=strict).validate_python(value)
        except (ValidationError, RecursionError) as error:
            kind = getattr(kinds[key], "__name__", None) or str(kinds[key])
            raise Refused(f"{path}: {key}: {_short(value)} does not fit; {kind} is wanted") from error


def meant(name: str, fields: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "see --help for the fields"


def _field_of_a_phase(given: str, rest: list[str]) -> str:
    """How a run takes `--field value` of its phases, in words; empty for what is no field of theirs."""
    name, equals, value = given.removeprefix("--").partition("=")
    value = value if equals else rest[0] if rest else ""
    phases = [phase for phase in SETTABLE[:3] if name in field_names(phase)]
    words = " ".join(f"{phase}.{name}={_short(value)[1:-1]}" for phase in phases)
    cpu = "; `abscot new --hardware cpu` writes whole recipes for a CPU" * (name == "use_cpu")
    return f"it is a field of {' and '.join(phases)}: --set {words}{cpu}" if phases else ""


def _refuse_usage(message: str) -> typing.NoReturn:
    """In one line what is wrong with a command line, without the usage of forty fields."""
    raise Refused(f"{message}; see --help")


def _set_out_help(parser: argparse.ArgumentParser) -> None:
    """`--config`, which `parse` reads itself, then the fields that must be given, then the others."""
    words = "A recipe: any of these fields; the command line wins."
    parser.add_argument("--config", metavar="FILE.yaml", default=argparse.SUPPRESS, help=words)
    for action in (action for action in parser._actions if action.required):
        action.help, action.default = f"{action.help} Required.", argparse.SUPPRESS  # no "(default: None)"
    for action in (action for action in parser._actions if isinstance(action, argparse._StoreFalseAction)):
        # transformers repeats the field's help.
        action.help, action.default = f"The same as --{action.dest} false.", argparse.SUPPRESS
    for actions in (parser._actions, parser._optionals._group_actions):
        actions.sort(key=lambda action: (action.dest not in ("help", "config"), not action.required))


def parse(classes: tuple[type, ...], arguments: list[str] | None = None) -> tuple:
    """
    Command line and `--config FILE.yaml` to dataclasses; the command line wins, then the last of several files.
    `None` reads `sys.argv`.

    Raises:
        Refused: an unknown key or a bad value; the message names the file.
    """
    from trl import TrlParser

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    parser, recipes = TrlParser(classes), []
    parser.error = _refuse_usage
    if {"-h", "--help"} & {*arguments}:
        _set_out_help(parser)
    while "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 == len(arguments):
            raise Refused("--config needs a file")
        recipes.append(arguments[at + 1])
        settings = read_yaml(recipes[-1])
        check_fields(settings, classes, recipes[-1])
        parser.set_defaults_with_config(**settings)
        del arguments[at : at + 2]
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError, OSError) as error:  # of transformers, about the values given
        words = f"{error} in {_short(error.doc)}" if isinstance(error, json.JSONDecodeError) else error
        raise Refused(f"{', '.join(recipes) or 'command line'}: {words!s:.500}") from error
    if unknown:
        names, given = [f"--{field.name}" for cls in classes for field in dataclasses.fields(cls)], unknown[0]
        words = ("--set" in names and _field_of_a_phase(given, unknown[1:])) or meant(given.partition("=")[0], names)
        raise Refused(f"command line: unknown {given!r}; {words}")
    return tuple(parsed)


def parse_phase(name: str, arguments: list[str] | None = None) -> tuple:
    """The fields of phase `name`, as `parse` has them; values before the first `--field` are of the phase's first."""
    phase, arguments = PHASES[name], list(sys.argv[1:] if arguments is None else arguments)
    if phase.first and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{phase.first}", *arguments]
    if phase.first and arguments.count(f"--{phase.first}") > 1:  # argparse would take the last
        raise Refused(f"{phase.first} are named in two places; name all of them in one")
    return parse(phase.classes, arguments)


def run_phase(name: str, arguments: list[str] | None = None) -> Any:
    """Parse the fields of phase `name` and run it in this process."""
    return resolve_name(PHASES[name].function)(*parse_phase(name, arguments))
