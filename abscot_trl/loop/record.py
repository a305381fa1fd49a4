"""What a run keeps of itself: learning rate and losses a step, wall times by stage, where and with what it ran."""

import csv
import io
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

from abscot_trl.report.runs import read_log, row_count
from abscot_trl.storage import MANIFEST, read_manifest, write_whole

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "vllm", "datasets", "math-verify")
PACKAGES += ("reasoning-gym",)
RECORDS = ("losses.csv", "losses.png", "record.md")
COLUMNS = ["step", "learning_rate", "loss", "loss_trace", "loss_end", "loss_answer", "grad_norm", "num_tokens"]
COLUMNS += ["loss_trace_uniform", "padding", "sequences_per_step", "supervised_tokens_per_step"]
COLUMNS += ["useful_own", "useful_random", "useful_other", "useful_none", "predictable", "predictable_uniform"]
COLUMNS += ["useful_random_se", "useful_other_se", "useful_none_se", "useful_own_given_cot"]
COLUMNS += ["useful_random_given_cot", "useful_random_given_cot_se"]
# After these, of a run with GRPO: its rewards by part (`rewards/accuracy/mean`, ..), and
GRPO_COLUMNS = ["reward", "reward_std", "frac_reward_zero_std", "kl", "ratio/mean", "ratio/outside", "trace/length"]
GRPO_COLUMNS += ["trace/entropy", "trace/forced_end", "answer/length", "probe/own", "probe/random", "step_time"]
GRPO_COLUMNS += [f"time/{part}" for part in ("rollout", "rewards", "scoring", "update", "other", "probe")]


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


def _table(logs: dict[str, list[dict]]) -> str:
    """`losses.csv`: a line a logged step, columns by the log's names."""
    names = list(dict.fromkeys(key for log in logs.values() for entry in log for key in entry))
    rewards = [key for key in names if key.startswith("rewards/") and key.endswith("/mean")]
    columns = ["stage", *COLUMNS, *(rewards + GRPO_COLUMNS if "reward" in names else [])]
    writer = csv.DictWriter(text := io.StringIO(), columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({"stage": name, **entry} for name, log in logs.items() for entry in log)
    return text.getvalue()


def write_record(run: Path, stages: list) -> None:
    """
    Write `losses.csv`, `losses.png` and `record.md` of the `stages` that are done into `run`.
    """
    done = [stage for stage in stages if (stage.output / MANIFEST).is_file()]
    logs = {stage.name: log for stage in done if (log := read_log(stage.output))}
    lines = ["| stage | rows | steps | wall s | attempts |", "|---|---:|---:|---:|---:|"]
    total = 0.0
    for stage in done:
        manifest = read_manifest(stage.output, "wall_s", "attempts")
        rows, steps = row_count(stage.output), logs[stage.name][-1]["step"] if stage.name in logs else None
        cells = [stage.name, rows, steps, f"{manifest['wall_s']:.1f}", manifest["attempts"]]
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
        total += manifest["wall_s"]
    lines.append(f"| total | | | {total:.1f} | |")
    write_whole(run / "losses.csv", _table(logs))
    if logs := {name: log for name, log in logs.items() if not any("reward" in entry for entry in log)}:
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
