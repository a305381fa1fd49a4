"""A run folder as the report reads it. What an older run lacks is absent here; what is damaged is an error."""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from abscot_trl.errors import Refused
from abscot_trl.evaluation.results import is_number
from abscot_trl.storage import INPUTS, MANIFEST, read_json, read_manifest
from abscot_trl.vocabulary import FILE_NAME, AbstractVocabulary

TEXT_LIMIT = 20_000  # characters of a problem or a response that are kept; a report is no archive
PATHS = {*INPUTS, "output_dir", "resume_from_checkpoint"} - {"problems"}
AGAIN = "`abscot warmup` writes it again, remove it until then"
ANSWER_TEXTS = ("model", "task", "mode", "swap", "response")
ANSWER_FIELDS = {*ANSWER_TEXTS, "id", "trace", "gold", "score"}


@dataclass
class Group:
    """The answers of one model in one mode on one task, from one file: `records[swap][id, sample]`."""

    label: str
    model: str
    task: str
    mode: str
    source: Path
    records: dict[str, dict[tuple[str, int], dict]]

    def vocabulary(self, run: Path) -> tuple[AbstractVocabulary, bool]:
        """
        The codebook of the nearest checkpoint above the answers, up to `run`, and `True`; or else the smallest one
        that the traces fit in, and `False`.
        """
        for folder in self.source.parents:
            if not folder.is_relative_to(run):
                break
            found = [folder / FILE_NAME, *sorted(folder.glob(f"*/{FILE_NAME}"))]
            for path in (path for path in found if path.is_file()):
                settings = read_json(path, "run `abscot init` again", "size", "m_min", "m_max")
                return AbstractVocabulary(settings["size"], settings["m_min"], settings["m_max"]), True
        traces = [record["trace"] for record in self.records["own"].values()]
        lengths = [len(trace) for trace in traces]
        size = 1 + max((index for trace in traces for index in trace), default=0)
        return AbstractVocabulary(size, min(lengths), max(1, *lengths)), False


def _clip(record: dict) -> dict:
    for key in ("problem", "response"):
        text = record.get(key)
        if isinstance(text, str) and len(text) > TEXT_LIMIT:
            record |= {key: text[:TEXT_LIMIT], f"{key}_length": len(text)}
    return record


def _records(path: Path) -> Iterator[dict]:
    if not path.stat().st_size:
        raise Refused(f"{path} is empty; evaluate again")
    with open(path, encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                if missing := ANSWER_FIELDS - record.keys():
                    raise Refused(f"lacks {', '.join(sorted(missing))}")
                if not all(type(index) is int and index >= 0 for index in record["trace"]):
                    raise Refused("trace: no codebook indices")
                if wrong := [name for name in ANSWER_TEXTS if not isinstance(record[name], str)]:
                    raise Refused(f"{', '.join(wrong)}: no text")
                if record["score"] is not None and not is_number(record["score"]):
                    raise Refused(f"score {record['score']!r} is no number")
            except (ValueError, AttributeError, TypeError) as error:
                raise Refused(f"{path} line {number} is no answer ({error}); evaluate again") from error
            yield _clip(record)


def read_answers(run: str | Path) -> list[Group]:
    """
    The answers of every `answers.jsonl` below `run`, by file, model, task and mode. Folders `*.parts` are left out,
    and `sweep`, which makes a report of its own.

    Raises:
        Refused: a line that is no answer; names file and line.
    """
    groups: dict[tuple, Group] = {}
    for path in sorted(Path(run).rglob("answers.jsonl")):
        if any(part.endswith(".parts") or part == "sweep" for part in path.relative_to(run).parts):
            continue
        rounds = re.findall(r"round(\d+)", str(path.parent.relative_to(run)))
        for record in _records(path):
            key = path, record["model"], record["task"], record["mode"]
            if key not in groups:
                label = record["model"] + (f" r{rounds[-1]}" if rounds and int(rounds[-1]) > 1 else "")
                groups[key] = Group(label, *key[1:], path, {})
            records = groups[key].records.setdefault(record["swap"], {})
            records[str(record["id"]), record.get("sample", 0)] = record
    found = [group for group in groups.values() if "own" in group.records]
    names = [(group.label, group.task, group.mode) for group in found]
    for group, name in zip(found, names, strict=True):
        if names.count(name) > 1:
            group.label += f" [{group.source.parent.relative_to(run)}]"
    return found


def warmups(run: str | Path) -> list[Path]:
    """The folders of the warm-ups in a run: itself or right below it, told by their `record.md`."""
    run = Path(run)
    return [path.parent for path in [run / "record.md", *sorted(run.glob("*/record.md"))] if path.is_file()]


def rounds(warmup: Path) -> list[Path]:
    """The folders of a warm-up's rounds in order; another name (`round1-old`) is none."""
    found = [path for path in warmup.glob("round*") if path.name.removeprefix("round").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("round")))


def over_training(warmup: str | Path) -> list[dict]:
    """The summaries of a warm-up's trace stages in order, each with its `stage`; none where there is no warm-up."""
    keys = ("traces", "distinct", "tokens_used", "token_counts", "token_entropy", "token_entropy_uniform")
    return [
        {"stage": f"{folder.name}/{path.parent.name}", **read_json(path, "make these traces again", *keys)}
        for folder in rounds(Path(warmup))
        for path in sorted(folder.glob("*-traces/summary.json"))
    ]


def read_losses(warmup: Path) -> dict[str, list[dict]]:
    """
    The logged steps by stage, from `losses.csv`; empty without one.

    Raises:
        Refused: a line that holds no step; names file and line.
    """
    path, logs = warmup / "losses.csv", {}
    if path.is_file():
        with open(path, newline="") as file:
            for number, row in enumerate(csv.DictReader(file), 2):
                try:
                    stage, _ = row.pop("stage"), row["step"]
                    logs.setdefault(stage, []).append({key: float(value) for key, value in row.items() if value})
                except (ValueError, KeyError, TypeError) as error:
                    raise Refused(f"{path} line {number} is no logged step ({error}); {AGAIN}") from error
    return logs


def read_wall_times(warmup: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table in `record.md`."""
    path = warmup / "record.md"
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    if len(lines) < 2 or len({line.count("|") for line in lines}) > 1:
        raise Refused(f"{path} holds no table of wall times; {AGAIN}")
    header, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]]
    return header, rows


def read_settings(run: str | Path) -> dict[str, dict]:
    """By phase of each warm-up, the settings that all its stages share, from their manifests; without paths."""
    phases: dict[str, list[dict]] = {}
    for warmup in warmups(run):
        name = "" if warmup == Path(run) else f"{warmup.name}: "
        for path in (path for folder in rounds(warmup) for path in sorted(folder.glob(f"*/{MANIFEST}"))):
            record = read_manifest(path.parent, "phase", "settings")
            settings = {key: value for key, value in record["settings"].items() if key not in PATHS}
            phases.setdefault(name + record["phase"], []).append(settings)
    return {
        phase: {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
        for phase, (first, *others) in phases.items()
    }
