"""The stages of a run: what they are, which of them are asked for, and what can be refused before they start."""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from abscot_trl.data.dolci import is_hub_id
from abscot_trl.data.problems import load_problems
from abscot_trl.errors import Refused
from abscot_trl.loop.arguments import DriverOptions, RunArguments
from abscot_trl.phases import PHASES, SETTABLE, TRAINING, check_fields, field_names, meant, parse, read_yaml
from abscot_trl.storage import MANIFEST
from abscot_trl.training.resume import sealed_checkpoints

# What a run tells its phases itself, whatever their recipes say.
OWN = {"model_name_or_path", "model", "data", "traces", "output_dir", "name", "resume_from_checkpoint", "rehearsal"}


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


def phase_recipes(args: RunArguments) -> dict[str, dict]:
    """
    The recipes of the phases that `args` names, by phase, with the fields of `args.set` over them.

    Raises:
        Refused: a recipe or `set` with an unknown phase or field, or a value that does not fit.
    """
    paths = {phase: path for phase in SETTABLE if (path := getattr(args, phase, None))}
    recipes = {phase: read_yaml(path) for phase, path in paths.items()}
    for phase, recipe in recipes.items():
        check_fields(recipe, PHASES[phase].classes, paths[phase])
    for word in args.set:
        phase, name, value = _setting(word, recipes)
        recipes[phase][name] = value
    return recipes


def _setting(word: str, recipes: dict[str, dict]) -> tuple[str, str, object]:
    """Phase, field and value of `phase.field=value`."""
    named, equals, text = word.partition("=")
    phase, dot, name = named.partition(".")
    if not equals or not dot:
        raise Refused(f"set {word!r:.200} is not of the form phase.field=value, such as bottleneck.max_length=4096")
    if phase not in recipes:
        raise Refused(f"set {word!r:.200}: this run has no recipe of {phase!r}; it has {', '.join(recipes)}")
    fields = field_names(phase)
    if name not in fields:
        raise Refused(
            f"set {word!r:.200}: {phase} has no field {name!r} ({meant(name, fields)}); its recipe sets "
            f"{', '.join(recipes[phase])}; `abscot {phase} --help` lists all"
        )
    if name in OWN or (name == "seed" and phase in TRAINING):
        raise Refused(f"set {word!r:.200}: the run sets {name} of {phase} itself; use its own fields")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Refused(f"set {word!r:.200}: {text!r:.80} is not valid YAML") from error
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):  # text in YAML 1.1
        value = float(value)
    check_fields({name: value}, PHASES[phase].classes, f"set {word!r:.200}")
    return phase, name, value


def choose_stages(todo: list[Stage], options: DriverOptions) -> list[Stage]:
    """
    Those from `from_stage` to `until`.

    Raises:
        Refused: no stage of that name, none between the two, or one before them that is not done.
    """
    names = [stage.name for stage in todo]
    for name in (options.from_stage, options.until):
        if name is not None and name not in names:
            raise Refused(f"no stage {name!r}; the run has {', '.join(names)}")
    first = names.index(options.from_stage or names[0])
    chosen = todo[first : names.index(options.until or names[-1]) + 1]
    if not chosen:
        raise Refused(f"from {options.from_stage} until {options.until} holds no stage: they are the other way round")
    missing = [stage.name for stage in todo[:first] if not is_done(stage)]
    if missing:
        raise Refused(f"from {options.from_stage}: {missing[0]} is not done; leave `from` out to run it too")
    return chosen


def check_server(todo: list[Stage]) -> None:
    """
    Raises:
        Refused: stages of several models, or of one that the run has yet to make, would ask one running server.
    """
    asked = {stage.settings["model"] for stage in todo if stage.settings.get("backend") == "server"}
    if len(asked) > 1 or asked & {str(stage.output) for stage in todo}:
        raise Refused(
            "backend: server asks one URL, which serves one model, and this run samples from models that it makes: "
            "use backend: vllm or hf"
        )


def check_stages(todo: list[Stage], args: RunArguments) -> None:
    """
    What can be refused before hours are spent: the stages' settings, the problems, a server that cannot serve them.

    Training recipes were checked field by field in `stages`; building their `TrainingArguments` here would hold a GPU.
    A dry run, which evaluates nothing, asks no hub for problems.

    Raises:
        Refused: as the stage itself would, later.
    """
    check_server(todo)
    with tempfile.TemporaryDirectory() as folder:
        for stage in (stage for stage in todo if stage.phase not in TRAINING):
            if stage.settings.get("backend") == "vllm" and args.launch == "inline":
                raise Refused(f"{args.evaluate}: backend vllm hangs in a process that trains; use launch: accelerate")
            path = Path(folder) / f"{stage.phase}.yaml"
            path.write_text(yaml.safe_dump(stage.settings))
            try:
                parse(PHASES[stage.phase].classes, ["--config", str(path)])
            except ValueError as error:
                raise Refused(str(error).replace(str(path), getattr(args, stage.phase, stage.name))) from None
            settings = stage.settings
            if stage.phase == "evaluate" and not (args.dry_run and is_hub_id(settings["problems"])):
                where = settings.get("problems_split", "test"), settings.get("problems_config")
                load_problems(settings["problems"], *where, limit=1)


def running_file(stage: Stage) -> Path:
    """Where a stage that has begun and not ended has noted what it was begun with."""
    return stage.output.with_name(stage.output.name + ".running")


def state_of(stage: Stage) -> str:
    """How far a stage is, in words."""
    if is_done(stage):
        return "done"
    if not running_file(stage).exists():
        return "to do"
    sealed = sealed_checkpoints(stage.output)
    return f"begun, has {sealed[-1].name}" if sealed else "begun"


def print_stages(todo: list[Stage], chosen: list[Stage]) -> None:
    """What `dry_run` says: which of the stages are done, which have begun and which are to do."""
    notes = [state_of(stage) if is_done(stage) or stage in chosen else "not asked for" for stage in todo]
    width = max(map(len, notes))
    for stage, note in zip(todo, notes, strict=True):
        print(f"{stage.name:<24} {note:<{width}} {stage.settings['output_dir']}")  # noqa: T201
