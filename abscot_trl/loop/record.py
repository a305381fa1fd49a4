"""What a run keeps of itself: learning rate and losses a step, wall times by stage, where and with what it ran."""

import csv
import io
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

from abscot_trl.errors import Refused
from abscot_trl.evaluation.results import is_number
from abscot_trl.storage import MANIFEST, read_json, read_manifest, write_whole
from abscot_trl.training.resume import LOG_FILE

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "vllm", "datasets", "math-verify")
RECORDS = ("losses.csv", "losses.png", "record.md")
COLUMNS = ["step", "learning_rate", "loss", "loss_trace", "loss_end", "loss_answer", "grad_norm", "num_tokens"]
COLUMNS += ["padding", "sequences_per_step", "supervised_tokens_per_step"]
COLUMNS += ["useful_own", "useful_random", "useful_other", "useful_none", "predictable", "predictable_uniform"]
COLUMNS += ["useful_random_se", "useful_other_se", "useful_none_se", "useful_own_given_cot"]
COLUMNS += ["useful_random_given_cot", "useful_random_given_cot_se"]


def _output_of(*command: str) -> str | None:
    """What a command prints; `None` where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@cache
def environment() -> dict:
    """Versions, GPUs and this package's git commit (`-dirty`: with changes); what is not there is `None`."""
    here = str(Path(__file__).parents[1])
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    gpus = _output_of("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    return {
        "commit": _output_of("git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "gpus": gpus.splitlines() if gpus else [],
        "versions": versions,
    }


def _read_own(folder: Path, name: str, key: str, kind: type):
    return read_json(folder / name, f"remove {folder} and run the stage again", **{key: kind})[key]


def read_log(folder: Path) -> list[dict]:
    """The logged steps of a training stage; none of another stage."""
    if not (folder / LOG_FILE).is_file():
        return []
    log = _read_own(folder, LOG_FILE, "log", list)
    if not all(isinstance(entry, dict) and is_number(entry.get("step")) for entry in log):
        raise Refused(f"{folder / LOG_FILE} is damaged (no steps); remove {folder} and run the stage again")
    return [entry for entry in log if "loss" in entry]


def _row_count(folder: Path) -> int | None:
    """Rows that a stage made or trained on."""
    if (folder / LOG_FILE).is_file():
        return _read_own(folder, LOG_FILE, "rows", dict).get("rows")
    if (folder / "summary.json").is_file():
        return _read_own(folder, "summary.json", "traces", int)
    return None


def write_record(run: Path, stages: list) -> None:
    """
    Write `losses.csv`, `losses.png` and `record.md` of the `stages` that are done into `run`.
    """
    done = [stage for stage in stages if (stage.output / MANIFEST).is_file()]
    table, logs = io.StringIO(), {}
    writer = csv.DictWriter(table, ["stage", *COLUMNS], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    lines = ["| stage | rows | steps | wall s | attempts |", "|---|---:|---:|---:|---:|"]
    total = 0.0
    for stage in done:
        log, manifest = read_log(stage.output), read_manifest(stage.output, "wall_s", "attempts")
        if log:
            logs[stage.name] = log
        writer.writerows({"stage": stage.name, **entry} for entry in log)
        rows, steps = _row_count(stage.output), log[-1]["step"] if log else None
        cells = [stage.name, rows, steps, f"{manifest['wall_s']:.1f}", manifest["attempts"]]
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
        total += manifest["wall_s"]
    lines.append(f"| total | | | {total:.1f} | |")
    write_whole(run / "losses.csv", table.getvalue())
    if logs:
        from abscot_trl.report.plots import plot_losses  # matplotlib

        plot_losses(logs, run / "losses.png")
    about = environment()
    words = [
        f"commit {about['commit']}, Python {about['python']}, {about['platform']}",
        f"GPUs: {', '.join(about['gpus']) or 'none'}",
        ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
        "Wall times are of the last attempt of a stage; an attempt more for each time it was killed.",
    ]
    text = "\n".join(["# Wall time by stage", "", *lines, "", *(f"- {line}" for line in words)])
    write_whole(run / "record.md", text + "\n")
