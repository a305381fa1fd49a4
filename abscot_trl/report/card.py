"""The results on a model card: what a run's manifests and results say of one of its models."""

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import EvalResult

from abscot_trl.card import write_card
from abscot_trl.data.dolci import is_hub_id
from abscot_trl.data.prepare import COUNTS_FILE
from abscot_trl.evaluation.results import read_results
from abscot_trl.markdown import escaped, markdown_table
from abscot_trl.report.runs import read_log, rounds, row_count
from abscot_trl.report.tables import results_table
from abscot_trl.report.verdict import INTERVALS, measured, verdict_line, verdicts
from abscot_trl.storage import MANIFEST, PRUNED, read_json, read_manifest
from abscot_trl.vocabulary import AbstractVocabulary

MADE_FROM = ("base_model", "model_name_or_path", "model", "codes", "traces", "adapter")  # folders that stages made
FIELDS = ("method", "given", "ratio", "temperature", "channel", "rehearsal", "learning_rate")
FIELDS += ("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")
FIELDS += ("use_peft", "lora_r", "rewards", "num_generations", "beta", "seed")  # of a recipe, those that matter
UNKNOWN = "not known"


def lineage(folder: Path, seen: set[Path] | None = None) -> Iterator[tuple[Path, dict]]:
    """The stages that a stage's output was made by, each folder with its manifest, the first of all first."""
    seen = set() if seen is None else seen
    if folder in seen or not (folder / MANIFEST).is_file():
        return
    seen.add(folder)
    manifest = read_manifest(folder, "stage", "phase", "settings", "wall_s")
    for value in (manifest["settings"].get(key) for key in MADE_FROM):
        if isinstance(value, str):
            yield from lineage(Path(value), seen)
    yield folder, manifest


def evaluations(run: Path, model: Path) -> Iterator[tuple[str, list[dict]]]:
    """The run's evaluation of `model`; and from its sweep those of the base and the model, if they are there."""
    swept = []
    for folder in [*rounds(run), run / "grpo", *sorted((run / "sweep").glob("*/"))]:
        made = folder if folder.parent.name == "sweep" else folder / "evaluate"
        if not all((made / name).is_file() for name in (MANIFEST, "results.json")):
            continue
        manifest = read_manifest(made, "stage", "settings")
        mine, stage = Path(str(manifest["settings"].get("model"))) == model, manifest["stage"]
        if made is folder and (mine or stage.split(" ")[0] == "base"):
            swept += [(mine, {**row, "stage": stage}) for row in read_results(made)]
        elif mine:
            yield "Results", read_results(made)
    if any(mine for mine, _ in swept):
        yield "Sweep", [row for _, row in sorted(swept, key=lambda pair: pair[0])]


def _name(path: object) -> str:
    """A hub id as it is; of a path, which says where somebody's files lie, the last part alone."""
    return str(path) if is_hub_id(str(path)) else Path(str(path)).name


def _data(stages: list[tuple[Path, dict]]) -> tuple[list[str], list[str]]:
    """A line for each preparation of rows and each set of prompts, and what is named there."""
    lines, names, settings = [], [], [manifest["settings"] for _, manifest in stages]
    for folder in dict.fromkeys(str(each["data"]) for each in settings if each.get("data")):
        if not (Path(folder) / COUNTS_FILE).is_file():
            continue
        counts = read_json(Path(folder) / COUNTS_FILE, "prepare the data again", settings=dict, rows_kept=int)
        given = counts["settings"].get("data") or []
        dropped = {**(counts.get("rejected") or {}), **(counts.get("filtered") or {})}
        words = ", ".join(f"{reason} {n}" for reason, n in dropped.items()) or "none"
        read = counts.get("rows_read", UNKNOWN)
        lines.append(f"{', '.join(map(_name, given))}: {read} rows read, {counts['rows_kept']} kept; dropped: {words}")
        names += given
    for folder, manifest in stages:
        if prompts := manifest["settings"].get("prompts"):
            prompts = prompts if isinstance(prompts, list) else [prompts]
            lines.append(f"{', '.join(map(_name, prompts))}: {row_count(folder)} prompts ({manifest['stage']})")
            names += prompts
    return lines, [name for name in names if is_hub_id(str(name)) and "/" in name]


def _stages(stages: list[tuple[Path, dict]]) -> str:
    rows = []
    for folder, manifest in stages:
        settings, log = manifest["settings"], read_log(folder)
        given = ", ".join(f"{key} {settings[key]}" for key in FIELDS if settings.get(key) is not None)
        rows.append([manifest["stage"], given, str(row_count(folder) or ""), str(log[-1]["step"]) if log else ""])
        rows[-1].append(f"{manifest['wall_s'] / 3600:.2f}")
    return markdown_table(["stage", "settings", "rows", "steps", "hours"], rows)


def _machine(stages: list[tuple[Path, dict]]) -> list[str]:
    """Hours, cards, commit and versions, of the last of `stages` that says."""
    hours = sum(manifest["wall_s"] for _, manifest in stages) / 3600
    about = next((m["environment"] for _, m in reversed(stages) if isinstance(m.get("environment"), dict)), {})
    versions = about.get("versions") if isinstance(about.get("versions"), dict) else {}
    return [
        f"{hours:.2f} hours, without evaluations; GPUs: {', '.join(map(str, about.get('gpus') or [])) or 'none'}",
        f"abscot_trl at commit {about.get('commit') or UNKNOWN}; Python {about.get('python') or UNKNOWN}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version),
    ]


def _index(rows: list[dict]) -> list[EvalResult]:
    """What the hub shows beside the card: the answers in abstract mode after the model's own traces."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=row.get("task") or UNKNOWN,
            dataset_name=row.get("task") or UNKNOWN,
            metric_type=row.get("metric", "accuracy"),
            metric_name="{} in points, abstract mode (95 %: {:.1f} to {:.1f}, n = {})".format(
                row.get("metric", "accuracy"), *row["ci95"], row["n"]
            ),
            metric_value=round(row["accuracy"], 2),
        )
        for row in rows
        if (row["mode"], row["swap"]) == ("abstract", "own")
    ]


def write_results_card(run: str | Path, model: str | Path) -> bool | None:
    """
    Write the card of a model of `run` anew, with all that the run knows of it: results with intervals and swaps, the
    verdict, recipe, data, hours, versions.

    Returns:
        `bool | None`: `False` where a card that was edited, or is another's, stays; `None` where there is nothing to
        be told: no results, no model of a run, or weights that were removed.

    Raises:
        Refused: damaged manifests or results.
    """
    run, model = Path(run), Path(model)
    found = list(evaluations(run, model))
    if not found or not (model / MANIFEST).is_file() or (model / PRUNED).is_file():
        return None
    stages = list(lineage(model))
    data, datasets = _data(stages)
    name = found[0][1][-1]["model"]
    text = []
    for title, rows in found:
        verdict = [verdict_line(each) for each in verdicts(rows)]
        how = escaped(f"{INTERVALS} {measured(rows)}.")
        text += [f"## {title}", "", *verdict, "", results_table(rows), "", how, ""]
    text += ["## How it was trained", "", f"Recipe: {escaped(name)}, {escaped(stages[-1][1]['stage'])}.", ""]
    text += [_stages(stages), "", *(f"- {escaped(line)}" for line in [*data, *_machine(stages)]), ""]
    return write_card(
        model,
        AbstractVocabulary.load(model),
        "\n".join(text) + "\n",
        datasets=datasets or None,
        model_name=name,
        eval_results=_index(found[0][1]) or None,
    )
