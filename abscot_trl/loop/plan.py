"""
`abscot plan`: what a warm-up will take, before it is started. Reads configurations only; writes nothing.

Steps are counted as transformers counts them, of packed rows by packing the prepared rows' lengths. Memory and hours
are those of `loop/memory.py` and `loop/duration.py`.
"""

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from abscot_trl.checkpoint import empty_model
from abscot_trl.data.prepare import COUNTS_FILE, load_prepared, row_lengths
from abscot_trl.data.splits import PHASES as PARTS
from abscot_trl.data.splits import staged_splits
from abscot_trl.errors import Refused
from abscot_trl.examples import best_fit
from abscot_trl.loop.duration import GPUS, Card, batch_seconds, card_of, reading_seconds, this_cpu
from abscot_trl.loop.launch import check_batches, launcher_of
from abscot_trl.loop.lengths import check_lengths, row_tokens
from abscot_trl.loop.memory import (
    GIB,
    Shape,
    saved_bytes,
    shape_of,
    shape_of_model,
    trained_parameters,
    training_disk,
    training_memory,
)
from abscot_trl.loop.plan_grpo import grpo_line
from abscot_trl.loop.stages import Stage
from abscot_trl.loop.warmup import WarmupArguments, stages
from abscot_trl.phases import TRAINING, read_yaml
from abscot_trl.traces.initial import RANDOM_METHODS
from abscot_trl.training.steps import accumulation_of, few_steps, probes, steps_of
from abscot_trl.units import count_words, size_words, time_words
from abscot_trl.vocabulary import AbstractVocabulary

PACKED = 0.97  # how full packed rows are, while nothing is known of their lengths


@dataclass
class PlanArguments(WarmupArguments):
    """
    What `--config WARMUP.yaml` will take.

    Args:
        gpu (`str`, *optional*): for which card to plan, by name or by its memory, as `24gb` (no hours then); the one
            that is here when left out, or an h100 without one.
        gpus (`int`, *optional*): how many; those of the accelerate configuration when left out.
        model_config (`str`, *optional*): a config.json, while `model` is not there yet; left out, that of the base
            model of the `init.yaml` beside the phases' recipes.
    """

    gpu: str | None = field(
        default=None, metadata={"help": f"Which GPU: {', '.join(GPUS)}, or its memory, 24gb; the one here otherwise."}
    )
    gpus: int | None = field(default=None, metadata={"help": "How many; the accelerate configuration's otherwise."})
    model_config: str | None = field(default=None, metadata={"help": "A config.json, while model is not there yet."})

    def __post_init__(self):
        super().__post_init__()
        if self.gpu is not None:
            card_of(self.gpu)
        if self.gpus is not None and self.gpus < 1:
            raise Refused(f"gpus must be at least 1, got {self.gpus}")
        if self.gpus is not None and self.num_processes is not None:
            raise Refused("gpus and num_processes say the same thing; leave one of the two out")


def _init(args: PlanArguments) -> dict:
    """The recipe of `abscot init` beside the phases' recipes; empty without one."""
    path = Path(args.bottleneck).with_name("init.yaml")
    return read_yaml(path) if path.is_file() else {}


def _model(args: PlanArguments) -> tuple[Shape, AbstractVocabulary]:
    """The model's shape and vocabulary; while it is not there, those that the recipe of `abscot init` makes."""
    if (Path(args.model) / "config.json").is_file():
        return shape_of(str(args.model)), AbstractVocabulary.load(args.model)
    init = _init(args)
    made = str(init.get("output_dir", args.model))
    if not args.model_config and (Path(made) / "config.json").is_file():
        return shape_of(made), AbstractVocabulary.load(made)
    names = {"codebook_size": "size", "m_min": "m_min", "m_max": "m_max"}
    vocabulary = AbstractVocabulary(**{name: init[key] for key, name in names.items() if key in init})
    if args.model_config or "base_model" not in init:
        return shape_of(args.model_config or str(args.model)), vocabulary
    try:
        return shape_of_model(empty_model(init["base_model"])), vocabulary
    except Refused as error:
        raise Refused(f"{error}; run `abscot init` first, or give model_config") from error


def _lengths(args: PlanArguments, longest: int) -> tuple[dict[str, np.ndarray], dict | None]:
    """
    Tokens of prompt, CoT and answer of each row, and the prepared data's counts; without it one row, assumed, and
    shortened to `longest` tokens.
    """
    if not (Path(args.data) / COUNTS_FILE).is_file():
        assumed = {"prompt": args.prompt_tokens, "cot": args.cot_tokens, "answer": args.answer_tokens}
        share = min(1, longest / sum(assumed.values()))
        return {name: np.array([max(1, int(share * length))]) for name, length in assumed.items()}, None
    data, counts = load_prepared(args.data)
    return row_lengths(data), counts


def _launcher(args: PlanArguments) -> tuple[int, int, dict]:
    """GPUs, ZeRO stage (FSDP counts as 3) and the accelerate configuration."""
    config = launcher_of(args)
    stage = config.get("deepspeed_config", {}).get("zero_stage", 3 if config.get("fsdp_config") else 0)
    return args.gpus or config.get("num_processes", 1), stage, config


@dataclass
class Setting:
    """What all stages of a plan share."""

    shape: Shape
    vocabulary: AbstractVocabulary
    lengths: dict[str, np.ndarray]  # tokens of prompt, cot, answer, and trace with its delimiters, of all rows
    counts: dict | None  # of the prepared data
    parts: dict[str, np.ndarray]  # the rows of each phase
    gpus: int
    zero: int
    launcher: dict  # the accelerate configuration
    card: Card


def plan(args: PlanArguments) -> dict:
    """
    Compute the plan.

    Returns:
        `dict` with `stages` (name, phase, rows, steps, tokens, trained, memory, disk, hours), `assumptions` and
        `warnings` (sentences).

    Raises:
        Refused: as the warm-up itself would, of a model's configuration, recipes, or rows that are too long for them.
    """
    shape, vocabulary = _model(args)
    gpus, zero, launcher = _launcher(args)
    todo, table, warnings = list(stages(args)), [], []
    on_cpu = args.gpu is None and any(stage.settings.get("use_cpu") for stage in todo)
    card = this_cpu() if on_cpu else card_of(args.gpu)
    room = min(stage.settings.get("max_length") or 8192 for stage in todo if stage.phase in PARTS)
    lengths, counts = _lengths(args, room - vocabulary.m_max - 2)
    share = args.ratio if args.initial == "content" else 2  # CoT tokens a trace token
    lengths["trace"] = np.minimum(vocabulary.m_max, lengths["cot"] // share).astype(int) + 2
    n_rows, needed = len(lengths["cot"]), len(PARTS) * args.rounds * args.rows_per_phase
    if n_rows >= needed:
        parts = staged_splits(n_rows, args.rounds, args.rows_per_phase, args.seed)
    else:  # assumed, or too few, which is warned of
        rows = np.arange(args.rows_per_phase) % n_rows
        parts = {f"{t}.{phase}": rows for t in range(1, args.rounds + 1) for phase in PARTS}
    setting = Setting(shape, vocabulary, lengths, counts, parts, gpus, zero, launcher, card)
    check_batches(todo, gpus)
    if counts:
        warnings += check_lengths(todo, lengths, parts, vocabulary, args.model)
    for stage in todo:
        line = {"name": stage.name, "phase": stage.phase}
        if stage.phase == "traces":
            line |= _sampling(stage.settings, setting)
        elif stage.phase == "grpo":
            about, words = grpo_line(stage.settings, lengths, vocabulary, shape, card, gpus, zero, launcher)
            line |= about
            warnings.append(f"{stage.name}: {words}")
        elif stage.phase in TRAINING:
            line |= _training(stage, setting)
            if on_cpu:
                del line["memory"]
            warnings += _recipe_warnings(line, stage.settings, setting)
        elif stage.phase in ("merge", "init"):
            line["disk"] = 2 * shape.parameters
        table.append(line)
    if launcher.get("use_cpu") and not on_cpu:
        warnings.append(f"accelerate_config {args.accelerate_config} is one of a CPU")
    warnings += _data_warnings(args, setting) + _disk_warnings(args, table)
    known = "the prepared data" if counts else "prompt_tokens, cot_tokens, answer_tokens; no data there yet"
    assumptions = [
        f"{count_words(shape.parameters)} parameters; {gpus} x {card.name}, ZeRO stage {zero}",
        "mean tokens "
        + ", ".join(f"{name} {values.mean():.0f}" for name, values in lengths.items())
        + f" with its two delimiters: {known}",
        "hours: as measured on an H100, to other cards by their data sheets (abscot_trl/loop/duration.py); what GPUs "
        "wait for each other, evaluations and loading are not counted"
        if card.peak
        else "memory and time are reckoned of GPUs only: not of a CPU"
        if on_cpu
        else f"hours are not reckoned: of {card.name} no peak is known; `gpu` takes another's ({', '.join(GPUS)})",
        "~ steps of packed rows depend on the traces' lengths; FSDP is taken for ZeRO-3, it was not measured",
    ]
    return {"stages": table, "assumptions": assumptions, "warnings": list(dict.fromkeys(warnings))}


def _sampling(settings: dict, setting: Setting) -> dict:
    """Tokens read and hours of a trace stage; random traces read nothing."""
    seen = ["prompt", "trace"] + ["cot"] * (settings["given"] == "cot")
    reads = settings["method"] not in RANDOM_METHODS
    part = setting.parts[settings["part"]]
    tokens, rows = int(sum(setting.lengths[name][part].sum() for name in seen)) * reads, len(part)
    disk = 2 * rows * (4 * setting.vocabulary.m_max + 150)
    line = {"rows": rows, "tokens": tokens, "disk": disk}
    if setting.card.peak:
        line["hours"] = reading_seconds(setting.shape, tokens, setting.card) / setting.gpus / 3600
    return line


def _training(stage: Stage, setting: Setting) -> dict:
    """Rows, steps, tokens, memory, disk and hours of a training stage."""
    recipe, shape, (round_, phase) = stage.settings, setting.shape, stage.name.split("/")
    part = setting.parts[f"{round_.removeprefix('round')}.{phase}"]
    part = np.delete(part, probes(len(part), recipe))
    lengths = {name: lengths[part] for name, lengths in setting.lengths.items()}
    longest = recipe.get("max_length") or 8192
    every = row_tokens(lengths, lengths["trace"], stage.phase, recipe)
    fitting = every[every <= longest]  # the others are refused, or dropped
    documents = fitting if recipe.get("overlong") == "drop" and len(fitting) else np.minimum(every, longest)
    packed, rows = bool(recipe.get("packing")), len(documents)
    if packed and setting.counts:
        rows = len(best_fit(documents.tolist(), longest))
    elif packed:
        rows = math.ceil(documents.sum() / (PACKED * longest))
    trained = trained_parameters(shape, recipe, setting.vocabulary.size)
    at_once = longest * recipe.get("per_device_train_batch_size", 8)
    steps, epochs = steps_of(rows, recipe, setting.gpus), recipe.get("num_train_epochs", 3)
    at_batch = recipe.get("per_device_train_batch_size", 8) * setting.gpus
    if recipe.get("max_steps", -1) > 0:
        epochs = steps * accumulation_of(recipe, setting.gpus) * at_batch / rows
    tokens = float(documents.sum() * epochs)
    line = {
        "rows": len(every),
        "steps": steps,
        "packed": packed,
        "tokens": tokens,
        "trained": trained,
        "memory": training_memory(shape, recipe, trained, at_once, setting.zero, setting.gpus),
        "disk": training_disk(shape, recipe, trained, setting.launcher),
        "stays": saved_bytes(recipe, setting.launcher)[0] * trained,
    }
    if setting.card.peak:
        length = float((documents.astype(float) ** 2).sum() / documents.sum())  # of the document a token stands in
        batches = rows * epochs / at_batch
        batch = tokens / setting.gpus / batches
        line["hours"] = batches * batch_seconds(shape, recipe, batch, length, setting.card, setting.zero) / 3600
    return line


def _recipe_warnings(line: dict, recipe: dict, setting: Setting) -> list[str]:
    """What makes no sense in a training recipe."""
    warnings, phase, rate = [], line["phase"], recipe.get("learning_rate", 2e-5)
    lora = bool(recipe.get("use_peft"))
    if lora and rate <= 2e-5:
        warnings.append(f"{phase}: learning_rate {rate} is one of full fine-tuning; LoRA wants about 1.0e-4")
    if not lora and rate >= 5e-5 and setting.shape.parameters > 1e9:  # smaller ones take ten times as much
        warnings.append(f"{phase}: learning_rate {rate} is one of LoRA; full fine-tuning wants about 1.0e-5")
    if lora and setting.zero == 3:
        warnings.append(f"{phase}: LoRA with token rows is refused on ZeRO-3 and FSDP; use single, ddp or zero2")
    if recipe.get("warmup_steps", 0) >= max(line["steps"], 1):
        warnings.append(f"{phase}: warmup_steps {recipe['warmup_steps']} is not under its {line['steps']} steps")
    if few := few_steps(line["steps"], recipe, setting.gpus):
        warnings.append(f"{phase}: {line['steps']} steps, {few}")
    memory, there = line.get("memory", 0) / GIB, setting.card.gib
    if memory > there:
        warnings.append(f"{phase}: about {memory:.0f} GiB a GPU, which has {there:.0f}; more GPUs, ZeRO or LoRA")
    return warnings


def _disk(table: list[dict]) -> int:
    """Bytes of the whole run at most: models and traces that stay, and the checkpoints of one phase at a time."""
    stays = [line.get("stays", line.get("disk", 0)) for line in table]
    return sum(stays) + max(line.get("disk", 0) - size for line, size in zip(table, stays, strict=True))


def _disk_warnings(args: PlanArguments, table: list[dict]) -> list[str]:
    run = Path(args.run_dir).absolute()
    there = next(path for path in [run, *run.parents] if path.exists())
    needed, free = _disk(table), shutil.disk_usage(there).free
    if needed <= free:
        return []
    return [f"the run writes about {size_words(needed)}, {size_words(free)} are free at {there}; `keep: last`?"]


def _data_warnings(args: PlanArguments, setting: Setting) -> list[str]:
    warnings, needed = [], len(PARTS) * args.rounds * args.rows_per_phase
    made = _init(args).get("output_dir", args.model)
    if made != args.model and not (Path(args.model) / "config.json").is_file():
        warnings.append(
            f"{args.model} is not there; `abscot init` makes {made}, what trains that one comes before this"
        )
    m_max, cot, counts = setting.vocabulary.m_max, setting.lengths["cot"].mean(), setting.counts
    if m_max > cot:
        warnings.append(f"m_max {m_max} is over the CoT's {cot:.0f} tokens: a trace should be shorter")
    if counts and counts["rows_kept"] < needed:
        warnings.append(
            f"{needed} rows are needed (2 x {args.rounds} x {args.rows_per_phase}), {counts['rows_kept']} kept"
        )
    return warnings


def describe_plan(planned: dict) -> str:
    """The plan as a Markdown table, a stage a line, with totals, assumptions and warnings; without empty columns."""
    stages = planned["stages"]
    columns = {  # title, and words of a value
        "name": ("stage", str), "rows": ("rows", "{:,}".format), "steps": ("steps", "{:,}".format),
        "tokens": ("tokens", count_words), "trained": ("trained", count_words), "memory": ("memory a GPU", size_words),
        "disk": ("disk", size_words), "hours": ("time", lambda hours: time_words(3600 * hours)),
    }  # fmt: skip
    columns = {name: column for name, column in columns.items() if any(name in line for line in stages)}
    rows = [{name: words(line[name]) for name, (_, words) in columns.items() if name in line} for line in stages]
    for row, line in zip(rows, stages, strict=True):
        if line.get("packed"):
            row["steps"] = f"~{row['steps']}"
    sums = {name: sum(line.get(name, 0) for line in stages) for name in ("steps", "hours")}
    tokens = sum(line.get("tokens", 0) for line in stages if line["phase"] in TRAINING)
    total = {"name": "total", "tokens": f"{count_words(tokens)} trained", "disk": size_words(_disk(stages))}
    total |= {name: columns[name][1](value) for name, value in sums.items() if name in columns}
    lines = [f"| {' | '.join(title for title, _ in columns.values())} |", "|---|" + "---:|" * (len(columns) - 1)]
    lines += [f"| {' | '.join(row.get(name, '') for name in columns)} |" for row in [*rows, total]]
    lines += ["", *(f"- {sentence}" for sentence in planned["assumptions"])]
    lines += [f"- WARNING: {sentence}" for sentence in planned["warnings"]]
    return "\n".join(lines)
