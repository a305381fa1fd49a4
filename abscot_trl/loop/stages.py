"""The stages of a run: what they are, which of them are asked for, and what can be refused before they start."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from abscot_trl.data.problems import load_problems
from abscot_trl.errors import Refused
from abscot_trl.loop.arguments import DriverOptions, RunArguments
from abscot_trl.phases import PHASES, TRAINING, parse
from abscot_trl.storage import MANIFEST


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
            if stage.phase == "evaluate":
                settings = stage.settings
                where = settings.get("problems_split", "test"), settings.get("problems_config")
                load_problems(settings["problems"], *where, limit=1)


def print_stages(todo: list[Stage], chosen: list[Stage]) -> None:
    """What `dry_run` says: which of the stages are done, which are to do."""
    for stage in todo:
        note = "done" if is_done(stage) else "to do" if stage in chosen else "not asked for"
        print(f"{stage.name:<24} {note:<14} {stage.settings['output_dir']}")  # noqa: T201
