"""A run folder as the report reads it. What an older run lacks is absent here; what is damaged is an error."""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType

from abscot_trl.errors import Refused
from abscot_trl.evaluation.results import is_number
from abscot_trl.storage import INPUTS, MANIFEST, read_json, read_manifest
from abscot_trl.training.resume import LOG_FILE, SEAL, sealed_checkpoints
from abscot_trl.vocabulary import FILE_NAME, AbstractVocabulary

TEXT_LIMIT = 20_000  # characters of a problem or a response that are kept; a report is no archive
PATHS = {*INPUTS, "output_dir", "resume_from_checkpoint"} - {"problems"}
AGAIN = "`abscot warmup` writes it again, remove it until then"
TRACE_LIMIT, CODEBOOK_LIMIT = 2048, 4096  # tokens of a trace, and of a codebook: what the analysis can take
ANSWER_TEXTS = ("model", "task", "mode", "swap", "response")
ANSWER_FIELDS = {*ANSWER_TEXTS, "id", "trace", "gold", "score"}
ANSWER_OPTIONS = ("sample", "problem", "source", "answer", "trace_tokens", "answer_tokens", "truncated", "follows")


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

        Raises:
            Refused: a damaged checkpoint, or one whose codebook the traces leave.
        """
        traces = [record["trace"] for record in self.records["own"].values()]
        lengths = [len(trace) for trace in traces]
        size = 1 + max((index for trace in traces for index in trace), default=0)
        for folder in self.source.parents:
            if not folder.is_relative_to(run):
                break
            candidates = [folder / FILE_NAME, *sorted(folder.glob(f"*/{FILE_NAME}"))]
            for path in (path for path in candidates if path.is_file()):
                settings = read_json(path, "run `abscot init` again", "size", "m_min", "m_max")
                settings = [settings[key] for key in ("size", "m_min", "m_max")]
                if not all(type(value) is int and value <= CODEBOOK_LIMIT for value in settings):
                    raise Refused(f"{path} is damaged ({settings}: no sizes); run `abscot init` again")
                if size > settings[0]:
                    raise Refused(f"{self.source} holds token {size - 1}, {path} has {settings[0]}; evaluate again")
                return AbstractVocabulary(*settings), True
        return AbstractVocabulary(size, min(lengths), max(1, *lengths)), False


def _wrong(record: dict) -> str | None:
    """What of an answer cannot be shown, in words."""
    if not isinstance(record, dict):
        return f"a {type(record).__name__}"
    if missing := ANSWER_FIELDS - record.keys():
        return f"lacks {', '.join(sorted(missing))}"
    trace = record["trace"]
    if not isinstance(trace, list) or not all(type(index) is int and 0 <= index < CODEBOOK_LIMIT for index in trace):
        return f"trace: no codebook indices under {CODEBOOK_LIMIT}"
    if len(trace) > TRACE_LIMIT:
        return f"trace: {len(trace)} tokens, over {TRACE_LIMIT}"
    kinds = {"id": (str, int), "sample": int, "answer": (str, NoneType), "gold": (str, int, float, NoneType)}
    kinds |= dict.fromkeys((*ANSWER_TEXTS, "problem", "source"), str)
    if wrong := [key for key, kind in kinds.items() if key in record and not isinstance(record[key], kind)]:
        return f"{', '.join(wrong)}: no text" if wrong != ["sample"] else "sample: no number"
    if record["score"] is not None and not is_number(record["score"], 0, 1):
        return f"score {record['score']!r:.20} is no number in 0..1"
    counts = [key for key in ("trace_tokens", "answer_tokens") if not is_number(record.get(key, 0), 0, 1e9)]
    return f"{', '.join(counts)}: no number" if counts else None


def _clip(record: dict) -> dict:
    record = {key: record[key] for key in (*ANSWER_FIELDS, *ANSWER_OPTIONS) if key in record}
    for key in ("problem", "response"):
        text = record.get(key)
        if isinstance(text, str) and len(text) > TEXT_LIMIT:
            record |= {key: text[:TEXT_LIMIT], f"{key}_length": len(text)}
    return record


def _records(path: Path) -> Iterator[dict]:
    if not path.stat().st_size:
        raise Refused(f"{path} is empty; evaluate again")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if wrong := _wrong(record := json.loads(line)):
                    raise Refused(wrong)
            except (ValueError, RecursionError) as error:
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
        if not path.is_file():
            raise Refused(f"{path} is no file; move it away, or evaluate again")
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
    complete = [group for group in groups.values() if "own" in group.records]
    names = [(group.label, group.task, group.mode) for group in complete]
    for group, name in zip(complete, names, strict=True):
        if names.count(name) > 1:
            group.label += f" [{group.source.parent.relative_to(run)}]"
    return complete


def warmups(run: str | Path) -> list[Path]:
    """The folders of the warm-ups in a run: itself or right below it, told by their `record.md`."""
    run = Path(run)
    return [path.parent for path in [run / "record.md", *sorted(run.glob("*/record.md"))] if path.is_file()]


def rounds(warmup: Path) -> list[Path]:
    """The folders of a warm-up's rounds in order; another name (`round1-old`) is none."""
    folders = [path for path in warmup.glob("round*") if path.name.removeprefix("round").isdecimal()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("round")))


def over_training(warmup: str | Path) -> list[dict]:
    """The summaries of a warm-up's trace stages in order, each with its `stage`; none where there is no warm-up."""
    numbers = ("traces", "distinct", "tokens_used", "token_entropy", "token_entropy_uniform")
    summaries, remedy = [], "make these traces again"
    for path in (path for folder in rounds(Path(warmup)) for path in sorted(folder.glob("*-traces/summary.json"))):
        summary = read_json(path, remedy, *numbers, "token_counts")
        whole = all(is_number(summary[key], 0, 1e12) for key in numbers) and summary["traces"] >= 1
        if not whole or not isinstance(summary["token_counts"], list) or not summary["token_counts"]:
            raise Refused(f"{path} is damaged (no counts of traces); {remedy}")
        summaries.append(summary | {"stage": f"{path.parents[1].name}/{path.parent.name}"})
    return summaries


def read_log(folder: Path) -> list[dict]:
    """
    The logged steps of a training phase, each with what GRPO's probe gave there; of one at work those up to its last
    whole checkpoint; none of another phase.

    Raises:
        Refused: the log is damaged.
    """
    path, name, remedy, steps = folder / LOG_FILE, "log", f"remove {folder} and run the stage again", {}
    if not path.is_file():
        sealed = sealed_checkpoints(folder)
        if not sealed:
            return []
        path, name = sealed[-1] / "trainer_state.json", "log_history"
    log = read_json(path, remedy, **{name: list})[name]
    if not all(isinstance(entry, dict) and is_number(entry.get("step")) for entry in log):
        raise Refused(f"{path} is damaged (no steps); {remedy}")
    for entry in log:
        if "loss" in entry or "probe/own" in entry:
            steps[entry["step"]] = steps.get(entry["step"], {}) | entry
    return list(steps.values())


def row_count(folder: Path) -> int | None:
    """Rows that a stage made or trained on."""
    remedy = f"remove {folder} and run the stage again"
    if (folder / LOG_FILE).is_file():
        return read_json(folder / LOG_FILE, remedy, rows=dict)["rows"].get("rows")
    if (folder / "summary.json").is_file():
        return read_json(folder / "summary.json", remedy, traces=int)["traces"]
    return None


def _not_to_be_shown(entry: dict) -> str | None:
    """What of a logged step of GRPO is damaged, in words."""
    counts, rollouts = entry.get("codebook_counts", [0]), entry.get("rollouts", [])
    if not is_number(entry["step"], 0, 1e12):
        return "no step"
    if not isinstance(counts, list) or not 0 < len(counts) <= CODEBOOK_LIMIT:
        return f"codebook_counts: no list of at most {CODEBOOK_LIMIT}"
    if not all(is_number(count, 0, 1e12) for count in counts):
        return "codebook_counts: no counts"
    kinds = {"prompt": str, "trace": str, "answer": str, "rewards": dict}
    for rollout in rollouts if isinstance(rollouts, list) else [None]:
        if not isinstance(rollout, dict) or not all(isinstance(rollout.get(k), kind) for k, kind in kinds.items()):
            return "rollouts: no texts with rewards"
    return None


def reinforced(run: str | Path) -> dict[str, tuple[list[dict], int]]:
    """
    What GRPO logged in `run`: its steps and the number of its held-out prompts, by the phase's folder below `run`
    (of the phase itself "") and, while it is at work, how far its last checkpoint is.

    Raises:
        Refused: a damaged log; names file and step.
    """
    found = {}
    ended = {path.parent: path for path in Path(run).rglob(LOG_FILE)}
    working = {seal.parents[1]: seal for seal in sorted(Path(run).rglob(SEAL)) if seal.parents[1] not in ended}
    for phase, path in sorted((ended | working).items()):
        folder = phase.relative_to(run)
        if any(part.startswith(".") for part in folder.parts):  # not in its place yet
            continue
        log = read_log(phase)
        if not any("reward" in entry for entry in log):
            continue
        wrong = [f"step {entry['step']}: {words}" for entry in log if (words := _not_to_be_shown(entry))]
        if not wrong and len({len(entry["codebook_counts"]) for entry in log if "codebook_counts" in entry}) > 1:
            wrong = ["codebook_counts: of two codebooks"]
        if wrong:
            raise Refused(f"{path} is damaged ({wrong[0]}); run the phase again")
        about = read_json(path, "run the phase again")
        held_out = about["rows"].get("held_out") if isinstance(about.get("rows"), dict) else None
        name = "" if folder == Path() else str(folder)
        if phase in working:
            name = f"{name or phase.resolve().name}, at work (step {log[-1]['step']:.0f} of {about.get('of')})"
        found[name] = log, held_out if type(held_out) is int else 0
    return found


def read_losses(warmup: Path) -> dict[str, list[dict]]:
    """
    The logged steps by stage, from `losses.csv`; empty without one.

    Raises:
        Refused: a line that holds no step; names file and line.
    """
    path, logs, number = warmup / "losses.csv", {}, 1
    if not path.is_file():
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        try:
            for number, row in enumerate(csv.DictReader(file), 2):  # noqa: B007 (the error names it)
                stage, entry = row.pop("stage"), {key: float(value) for key, value in row.items() if value}
                if not is_number(entry["step"], 0, 1e12):
                    raise Refused(f"step {entry['step']}")
                logs.setdefault(stage, []).append(entry)
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise Refused(f"{path} line {number} is no logged step ({error}); {AGAIN}") from error
    return logs


def read_wall_times(warmup: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table in `record.md`."""
    path = warmup / "record.md"
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.startswith("|")]
    if len(lines) < 2 or len({line.count("|") for line in lines}) > 1:
        raise Refused(f"{path} holds no table of wall times; {AGAIN}")
    header, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]]
    return header, rows


def read_settings(run: str | Path) -> dict[str, dict]:
    """By phase of each warm-up, the settings that all its stages share, from their manifests; without paths."""
    phases: dict[str, list[dict]] = {}
    for warmup in warmups(run):
        name = "" if warmup == Path(run) else f"{warmup.name}: "
        folders = [*rounds(warmup), warmup / "grpo"]
        for path in (path for folder in folders for path in sorted(folder.glob(f"*/{MANIFEST}"))):
            record = read_manifest(path.parent, "phase", "settings")
            settings = {key: value for key, value in record["settings"].items() if key not in PATHS}
            phases.setdefault(name + record["phase"], []).append(settings)
    return {
        phase: {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
        for phase, (first, *others) in phases.items()
    }
