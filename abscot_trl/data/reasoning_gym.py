"""
Rows that reasoning-gym's tasks make: `reasoning_gym:<task>?size=1000&seed=0&<its own settings>`.

Most tasks make item i of a data set with seed s from s + i. So here a seed stands for `STRIDE` items of its own, and
the splits have seeds of their own: what is made for `train` is never made for `test`, whatever seeds are named. (Two
items may still be equal by chance where a task has few; `not_in` finds them.)
"""

import difflib
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl

import yaml

from abscot_trl.errors import Refused

PREFIX = "reasoning_gym:"  # how the name of such rows begins
FORM = f"{PREFIX}<task>, {PREFIX}<task>?size=1000&seed=0, and settings of the task's own"
SPLITS = ("train", "test")
SIZE = 1000
STRIDE = 1_000_000  # items of a seed and a split
SEEDS = 2000  # numpy, which some tasks ask, takes seeds up to 2^32


def is_generated(name: str) -> bool:
    return name.startswith(PREFIX)


def _settings(name: str) -> tuple[str, dict[str, Any]]:
    """The task, and its settings: values are what YAML makes of them."""
    task, mark, query = name.removeprefix(PREFIX).partition("?")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if mark else []
        settings = {key: yaml.safe_load(value) for key, value in pairs}
    except (ValueError, yaml.YAMLError) as error:
        raise Refused(f"{name!r:.200} cannot be read ({error!s:.100}); write {FORM}") from error
    if len(settings) < len(pairs) or not task or ":" in task:
        wrong = "a setting stands twice" if task.isidentifier() else f"{task!r:.40} is no name of a task"
        raise Refused(f"{name!r:.200}: {wrong}; write {FORM}")
    settings = {"size": SIZE, "seed": 0} | settings
    for key, low, high in (("size", 1, STRIDE), ("seed", 0, SEEDS)):
        if type(settings[key]) is not int or not low <= settings[key] <= high:
            raise Refused(f"{name!r:.200}: {key} {settings[key]!r:.40} is no whole number of {low} to {high}")
    return task, settings


def _made(name: str, task: str, settings: dict[str, Any], split: str):
    """reasoning-gym's data set."""
    if split not in SPLITS:
        raise Refused(f"{name}: the split is {' or '.join(SPLITS)}, not {split!r}")
    try:
        from reasoning_gym import create_dataset
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise Refused(f"{name} needs reasoning-gym ({error}); pip install 'abscot_trl[evidence]'") from error
    if task not in DATASETS:
        near = ", ".join(difflib.get_close_matches(task, DATASETS, cutoff=0.5)) or "see its GALLERY.md"
        raise Refused(f"{name}: reasoning-gym has no task {task!r}; near it: {near}")
    seed = (len(SPLITS) * settings["seed"] + SPLITS.index(split)) * STRIDE
    try:
        return create_dataset(task, **settings | {"seed": seed})
    except Exception as error:  # noqa: BLE001 (of a hundred tasks, each with checks of its own)
        fields = ", ".join(sorted(DATASETS[task][1].__dataclass_fields__.keys() - {"seed"}))
        raise Refused(f"{name}: {task} does not take that ({error!s:.200}); its settings are {fields}") from error


def rows(name: str, split: str) -> Iterator[dict[str, Any]]:
    """
    `id`, `source` (`reasoning_gym/<task>`) and `entry` (what the task made: question, answer, metadata), one by one.

    Raises:
        Refused: a name of another form, no reasoning-gym, no such task, split or setting.
    """
    task, settings = _settings(name)
    dataset = _made(name, task, settings, split)
    for number in range(settings["size"]):
        identifier = f"{task}-{split}-{settings['seed']}-{number}"
        yield {"id": identifier, "source": f"reasoning_gym/{task}", "entry": dataset[number]}


def cot_of(entry: dict[str, Any]) -> str:
    """The chain of thought of an entry that has one, without its last line, `#### result`; `""` for all others."""
    metadata = entry.get("metadata")
    cot = metadata.get("answer_cot") if isinstance(metadata, dict) else None
    return cot.rpartition("\n####")[0].strip() if isinstance(cot, str) else ""


def check_cot(name: str, split: str) -> None:
    """
    Raises:
        Refused: the task gives no chain of thought, which `abscot data` is for.
    """
    if not cot_of(next(rows(name, split))["entry"]):
        raise Refused(
            f"{name}: its entries hold no chain of thought, so there is nothing to train on; use it as `prompts` of "
            "GRPO or `problems` of an evaluation, or write rows with a chain of thought of your own"
        )
