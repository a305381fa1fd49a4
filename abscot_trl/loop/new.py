"""
`abscot new`: the recipe folder of a model, its rows and a machine, by the plan's own arithmetic (`loop/forms.py`).

The shipped recipes are written by it too (tests/test_new.py holds them equal). Its texts are templates of YAML in
`templates/`: a field without a value is left out of the file.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from abscot_trl.checkpoint import check_base
from abscot_trl.data.dolci import is_hub_id
from abscot_trl.errors import Refused
from abscot_trl.loop.duration import GPUS
from abscot_trl.loop.forms import CODEBOOK, FUSED, RANK, Form, Hardware, choose, hardware_of
from abscot_trl.loop.memory import GIB, Shape, shape_of_model
from abscot_trl.loop.new_rows import EPOCHS, Rows, power_of_two, rows_of
from abscot_trl.storage import check_folder, write_whole
from abscot_trl.training.steps import ROWS_A_PROBE, few_steps, probes, steps_of
from abscot_trl.units import count_words
from abscot_trl.vocabulary import AbstractVocabulary

TEMPLATES = Path(__file__).parent / "templates"
# Of the templates' values: what a machine says, and what a tuning does.
CPU = {
    "sampler": "transformers, a CPU", "one": "a CPU", "sampling_dtype": "float32", "backend": "hf",
    "dtype_words": "as a CPU computes", "attention": "sdpa", "pad": 8, "use_cpu": True, "bf16": False,
    "workers": None, "shared": "", "use_vllm": None, "vllm_share": None, "vllm_length": None, "generations": 4,
    "rl_steps": 20,
}  # fmt: skip
GPU = {
    "sampler": "vLLM, one GPU", "one": "one GPU", "sampling_dtype": "bfloat16", "backend": "vllm",
    "attention": "flex_attention", "pad": None, "use_cpu": None, "bf16": True, "workers": 4,
    "shared": " that vLLM shares", "use_vllm": True, "vllm_share": 0.3, "generations": 8, "rl_steps": 500,
}  # fmt: skip
LORA = {
    "form": "LoRA with token rows", "trained": "bottleneck-merged", "distilled": "distill-merged", "peft": True,
    "lora_r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0,
    "dtype_words": "of the frozen weights; the adapters are float32",
}  # fmt: skip
ALL = {
    "form": "full fine-tuning", "trained": "bottleneck", "distilled": "distill", "peft": None,
    "lora_r": None, "lora_alpha": None, "lora_dropout": None,
    "dtype_words": "the optimiser keeps 32-bit weights; bf16: true computes in bf16",
}  # fmt: skip


@dataclass
class NewArguments:
    """
    A recipe folder for a model of your own, which `init`, `data`, `plan` and `warmup` run as it stands.

    Args:
        model (`str`): folder or hub id of an instruction-tuned decoder.
        data (`str`): rows with a chain of thought: a .jsonl or .parquet file, a folder of them, or a hub id.
        output_dir (`str`): the recipe folder; its name is also that of the folder below `runs`.
        data_format (`str`, *optional*): as of `abscot data`; told from the first row when left out.
        problems (`str`, *optional*): what is evaluated: a file or hub id. When left out, a tenth of a local file of
            problems is held out (500 at most), in `runs/<name>/problems.jsonl`, the others go to
            `runs/<name>/train.jsonl`; of other data MATH-500.
        hardware (`str`): `cpu`, GPUs such as `1x80gb` or `8x80gb`, or `auto`: the GPUs that are here, without one cpu.
    """

    model: str = field(metadata={"help": "Folder or hub id of an instruction-tuned decoder."})
    data: str = field(metadata={"help": "Rows with a chain of thought: a file, a folder of files or a hub id."})
    output_dir: str = field(metadata={"help": "The recipe folder to write, e.g. recipes/mine."})
    data_format: str | None = field(
        default=None, metadata={"help": "Told from the first row when left out.", "choices": ["dolci", "problems"]}
    )
    problems: str | None = field(
        default=None, metadata={"help": "Evaluated: a file or hub id; else held out of local problems, or MATH-500."}
    )
    hardware: str = field(default="auto", metadata={"help": "cpu, 1x80gb, 8x80gb, .. or auto: what is here."})


def recipe_files(
    recipe: str, runs: str, model: str, family: str, shape: Shape, hardware: Hardware, rows: Rows
) -> tuple[dict[str, str], Form, str]:
    """
    The recipe's files, name to text, the form that the warm-up takes, and why in words.

    Args:
        recipe, runs (`str`): the folders that the files name.
        family (`str`): the config's `model_type`.
    """
    forms, chosen, why = choose(shape, family, hardware, rows)
    common = {"recipe": recipe, "runs": runs, "model": _quoted(model), "title": Path(model).name}
    common |= {"init_memory": max(1, round(5 * shape.parameters / 1e9))} | _values_of_rows(rows)
    shown = {tuning: common | _values_of_form(form, family, shape, rows) for tuning, form in forms.items()}
    files = {}
    for template in sorted(TEMPLATES.glob("*.yaml")):
        by_tuning = template.stem in ("bottleneck", "distill", "grpo")
        for tuning in shown if by_tuning else [chosen]:
            name = f"{template.stem}.{tuning}.yaml" if by_tuning else template.name
            files[name] = filled(template.read_text(), shown[tuning])
    return files, forms[chosen], why


def filled(text: str, values: dict[str, Any]) -> str:
    """A template with `values` in it: a field whose value is `None` is left out, comments are brought into line."""
    words = {name: "" if value is None else _yaml(value) for name, value in values.items()}
    lines = []
    for line in text.splitlines():
        field = re.match(r"\w+: \[?\$(\w+)", line)
        if field and values[field[1]] is None:
            continue
        code, mark, comment = Template(line).substitute(words).rstrip().partition(" # ")
        code = code.removesuffix(" #")  # of an empty comment
        lines.append(f"{code:<23} # {comment}" if mark and not line.startswith("#") else code + mark + comment)
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and 0 < value < 0.01:
        return re.sub(r"e-0?", "e-", f"{value:.1e}")
    return f"[{', '.join(value)}]" if isinstance(value, list) else str(value)


def _quoted(path: str) -> str:
    """As YAML, and a shell, takes it for one word."""
    return path if re.fullmatch(r"[\w./~-]+", path) else json.dumps(path)


def _values_of_rows(rows: Rows) -> dict[str, Any]:
    hub, remote, cot = is_hub_id(rows.data), is_hub_id(rows.prompts), rows.row - rows.bare
    return {
        "data": _quoted(rows.data), "data_format": rows.data_format, "problems": _quoted(rows.problems),
        "longest": rows.longest, "fits": rows.fits, "limit": rows.limit, "gauges": rows.gauges,
        "reading": "streams the hub; 16 processes, no GPU" if hub else f"{rows.data}, no GPU",
        "max_prompt": 2560 if rows.longest >= 8192 else None, "num_proc": 16 if rows.kept > 10_000 else None,
        "parts": f"2 phases x 3 rounds x {rows.kept // 6:,}", "shuffle": 20_000 if rows.dolci else None,
        "half": rows.kept // 2, "half_words": f"{rows.kept // 2:,}",
        "sixth": rows.kept // 6, "sixth_words": f"{rows.kept // 6:,}",
        "benchmark": Path(rows.problems).name if is_hub_id(rows.problems) else rows.problems,
        "task": re.sub(r"\W|_", "", Path(rows.problems).stem.lower()), "answer": rows.answer,
        "instruction": False if rows.data_format == "problems" else None, "concise": min(4096, rows.longest),
        "codebook": CODEBOOK, "added": CODEBOOK + 2, "epochs": EPOCHS, "m_max": rows.m_max, "ratio": rows.ratio,
        "cot": cot, "trace": round(cot / rows.ratio), "prompts": _quoted(rows.prompts),
        "prompt_words": "maths has a gold; other prompts are left out without a judge" if remote else None,
        "prompt_rows": 20_000 if remote else None, "max_rl_prompt": 2048 if remote else None,
        "not_in": [_quoted(rows.problems)] if remote else None, "overlap": "drop" if remote else None,
        "completion": (completion := min(2048, power_of_two(rows.answer + rows.m_max + 2))),
        "vllm_length": 2048 + completion + 8, "packing": rows.packed or None,
    } | {name: rows.lengths.get(name) for name in ("prompt_tokens", "cot_tokens", "answer_tokens")}  # fmt: skip


def _values_of_form(form: Form, family: str, shape: Shape, rows: Rows) -> dict[str, Any]:
    """What a tuning's files say."""
    lora, cpu, recipe, hardware = form.tuning == "lora", not form.hardware.gpus, form.recipe, form.hardware
    batch, compiles, processes = recipe["global_batch_size"], recipe["compile_layers"], form.processes
    size = f"packed rows of {rows.longest} tokens" if rows.packed else "rows"
    tokens, rate = batch * rows.longest, 1e-4 if lora or shape.parameters < 1e9 else 1e-5  # small models take more
    memory = f"{form.memory / GIB:.3g} GiB a GPU of {hardware.gib:.0f}, by abscot plan"
    if form.other:
        other, time = form.other
        memory += f"; {_yaml(not recipe['gradient_checkpointing'])}: {other / GIB:.3g}, {time:.2g} times the time"
    machine = CPU if cpu else GPU
    rl_batch = 16 if cpu else -(-256 // (8 * hardware.gpus)) * 8 * hardware.gpus
    return (LORA if lora else ALL) | machine | {
        "tuning": form.tuning, "hardware": hardware.words, "Hardware": hardware.words[0].upper() + hardware.words[1:],
        "accelerate": form.accelerate, "processes": processes,
        "launcher": form.accelerate + (f" --num_processes {processes}" if processes else ""),
        "engine": f"{{data_parallel_size: {hardware.gpus}}}" if hardware.gpus > 1 else None,
        "batch_words": f"{batch} {size} a step",
        "step_words": "rows a step"
        if not rows.packed
        else f"packed rows a step over all GPUs: {tokens // 1000}k tokens, about {tokens // rows.row} rows",
        "bare_words": f"A step holds about {tokens // rows.bare} rows without CoT." if rows.packed else "",
        "dtype": recipe["dtype"], "targets": recipe.get("lora_target_modules"),
        "micro": recipe["per_device_train_batch_size"], "batch": batch,
        "checkpointing": recipe["gradient_checkpointing"], "memory_words": None if cpu else memory,
        "compile": compiles or None, "liger": True if family in FUSED and form.accelerate == "zero3" else None,
        "rate": rate, "rl_rate": rate / 10, "rl_batch": rl_batch, "rl_prompts": rl_batch // machine["generations"],
    }  # fmt: skip


def new(args: NewArguments) -> str:
    """
    `abscot new`: write the recipe folder, and where problems are held out both parts of the rows below `runs`.

    Returns:
        `str`: what was chosen and why, and the next commands.

    Raises:
        Refused: the folder, or the one below `runs`, holds files of that name; a model that `abscot init` refuses, or
            one too large; no such hardware; data or problems that are not there, or none to train on.
    """
    check_folder(args.output_dir)
    folder = Path(args.output_dir)
    if not re.fullmatch(r"[\w./-]+", args.output_dir):
        raise Refused(f"output_dir {args.output_dir!r:.80} stands in commands: letters, digits, _ . / and - only")
    if folder.exists() and any(folder.iterdir()):
        raise Refused(f"{folder} holds files already ({min(folder.iterdir()).name}, ..); choose another output_dir")
    hardware = hardware_of(args.hardware)
    tokenizer, model = check_base(args.model, AbstractVocabulary(CODEBOOK, 1, 8))
    runs = Path("runs") / folder.absolute().name
    positions, shape = model.config.max_position_embeddings, shape_of_model(model)
    rows, parts = rows_of(args.data, args.data_format, args.problems, tokenizer, positions, runs, hardware.gpus)
    there = [path for path in parts if path.exists()]
    if there:
        raise Refused(f"{there[0]} is there already; remove it, or choose another name for output_dir")
    recipe, runs = str(folder), str(runs)
    files, form, why = recipe_files(recipe, runs, args.model, model.config.model_type, shape, hardware, rows)
    for path, text in [*parts.items(), *((folder / name, text) for name, text in files.items())]:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    chosen, gpus = form.recipe | {"num_train_epochs": EPOCHS}, max(hardware.gpus, 1)
    batch = f"{chosen['global_batch_size']}{' packs' if rows.packed else ' rows'} a step, "
    batch += f"{chosen['per_device_train_batch_size']} at once"
    if not rows.packed:  # of packs a plan says how many steps they make
        gauged = probes(rows.trained, {"gauge_rows": rows.gauges} if rows.gauges else {})
        steps = steps_of(rows.trained - len(gauged), chosen, gpus)
        batch += f": {steps} steps a phase" + (f", {few}" if (few := few_steps(steps, chosen, gpus)) else "")
    phases = {"init": "init", "data": "data", "plan": "warmup.informed", "warmup": "warmup.informed"}
    commands = [f"abscot {phase} --config {recipe}/{name}.yaml" for phase, name in phases.items()]
    if args.hardware != "auto" and hardware.gpus:  # without it a plan takes the card that is here
        known = [name for name in ("h100", "h200") if abs(GPUS[name].gib - hardware.gib) <= 1]
        commands[2] += f" --gpu {known[0] if known else f'{hardware.gib + 1:.0f}gb'}"
    no_gauges = f", under {2 * ROWS_A_PROBE}: too few to say, while they train, whether answers read their traces"
    lines = [
        f"{recipe}: {args.model} ({count_words(shape.parameters)} parameters) on {hardware.words}",
        f"- {why}",
        f"- accelerate configuration {form.accelerate}; {'vLLM' if hardware.gpus else 'transformers'} samples",
        f"- rows of up to {rows.longest} tokens; {batch}",
        f"- data: {rows.words}; {rows.kept // 2:,} rows a phase"
        + (no_gauges if rows.kept // 2 < 2 * ROWS_A_PROBE else ""),
        f"- evaluated on {rows.problems}",
        "next:",
        *commands,
        f"abscot report {runs}/informed",
        f"abscot serve --model {runs}/informed/round1/distill{'-merged' * (form.tuning == 'lora')}"
        + ("" if hardware.gpus else """ --engine '{"gpu_memory_utilization": 0.3}'"""),
    ]
    return "\n".join(lines)
