"""
`abscot new`: the recipe folder of a model, its rows and a machine, by the plan's own arithmetic.

The shipped recipes are written by it too (tests/test_new.py holds them equal). Its texts are templates of YAML in
`templates/`: a field without a value is left out of the file.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import torch

from abscot_trl.checkpoint import check_base
from abscot_trl.cli import accelerate_config_path
from abscot_trl.data.dolci import is_hub_id
from abscot_trl.errors import Refused
from abscot_trl.loop.duration import GPUS, batch_seconds, this_cpu
from abscot_trl.loop.memory import GIB, Shape, shape_of_model, trained_parameters, training_memory
from abscot_trl.loop.new_rows import Rows, power_of_two, rows_of
from abscot_trl.phases import read_yaml
from abscot_trl.storage import check_folder, write_whole
from abscot_trl.vocabulary import AbstractVocabulary

CODEBOOK = 64
FULL = 0.5  # of a GPU's memory: full fine-tuning that takes no more leaves room for longer rows
MOST = 0.75  # of it: what a step may take, for allocators leave gaps
FUSED = ("llama", "qwen2", "qwen3")  # families whose compiled layers and Liger kernels were run
TEMPLATES = Path(__file__).parent / "templates"


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


@dataclass(frozen=True)
class Hardware:
    """`gpus` of `gib` GiB each (0: a CPU and its memory), in words."""

    gpus: int
    gib: float
    words: str


def hardware_of(text: str) -> Hardware:
    """
    Raises:
        Refused: neither cpu, auto nor a number of GPUs and their GB.
    """
    if text == "auto" and torch.cuda.is_available():
        n, card = torch.cuda.device_count(), torch.cuda.get_device_properties(0)
        return Hardware(n, card.total_memory / GIB, f"{n} x {card.name}" if n > 1 else f"one {card.name}")
    if text in ("auto", "cpu"):
        return Hardware(0, this_cpu().gib, "a CPU")
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)gb", text.lower())
    if not found:
        raise Refused(
            f"hardware {text!r:.80} is none of cpu, auto and GPUs with their memory, such as 1x80gb or 8x80gb"
        )
    n, size = map(int, found.groups())
    return Hardware(n, size - 1, f"{n} x {size} GB" if n > 1 else f"one {size} GB GPU")  # drivers keep some


@dataclass(frozen=True)
class Form:
    """A tuning on a machine: accelerate's configuration, processes, the recipe's fields, and bytes a GPU."""

    tuning: str
    hardware: Hardware
    accelerate: str
    recipe: dict[str, Any]
    memory: int
    other: tuple[int, float] | None  # with gradient checkpointing the other way: bytes, time

    @property
    def processes(self) -> int | None:
        """`num_processes`, where it is not the configuration's own."""
        gpus = max(self.hardware.gpus, 1)
        return None if read_yaml(accelerate_config_path(self.accelerate)).get("num_processes") == gpus else gpus


def form_of(tuning: str, shape: Shape, family: str, hardware: Hardware, rows: Rows) -> Form:
    """The fastest settings of `tuning` that fit, by the plan's arithmetic; the smallest where none does."""
    gpus, cpu, lora = max(hardware.gpus, 1), not hardware.gpus, tuning == "lora"
    leaves = dict.fromkeys(name.rpartition(".")[2] for name, *_ in shape.linear if name != "lm_head")
    fixed = {"use_peft": lora, "dtype": "bfloat16" if lora and not cpu else "float32", "max_length": rows.longest}
    fixed |= {"lora_r": 32, "lora_target_modules": list(leaves)} if lora else {}
    fixed["global_batch_size"] = -(-(8 if cpu else rows.packs) // gpus) * gpus
    least = min(4096 // rows.longest or 1, 8) if cpu else 1

    def option(checkpointing: bool, micro: int, stage: int) -> dict:
        compiles = family in FUSED and stage < 3 and not cpu  # ZeRO-3 gathers weights inside of a layer
        return fixed | {
            "gradient_checkpointing": checkpointing,
            "per_device_train_batch_size": micro,
            "compile_layers": compiles,
        }

    def memory(recipe: dict, stage: int) -> int:
        at_once = rows.longest * recipe["per_device_train_batch_size"]
        return training_memory(shape, recipe, trained_parameters(shape, recipe, CODEBOOK), at_once, stage, gpus)

    def seconds(recipe: dict) -> float:  # a token
        at_once = rows.longest * recipe["per_device_train_batch_size"]
        return batch_seconds(shape, recipe, at_once, min(rows.row, rows.longest), GPUS["h100"]) / at_once

    stage = 3 if not lora and gpus > 1 and memory(option(True, 1, 0), 0) > FULL * hardware.gib * GIB else 0
    name = "cpu" if cpu else "zero3" if stage else "ddp" if gpus > 1 else "single"
    if stage:  # one row at once and layers computed again: the same file serves two nodes, and few GPUs with offload
        recipe = option(True, 1, stage)
        return Form(tuning, hardware, name, recipe, memory(recipe, stage), None)
    micros = [least] if cpu else [m for m in (1, 2, 4, 8) if fixed["global_batch_size"] % (m * gpus) == 0]
    options = [option(again, micro, stage) for micro in micros for again in (False, True)]
    fitting = [recipe for recipe in options if memory(recipe, 0) <= MOST * hardware.gib * GIB] or [options[1]]
    best = min(map(seconds, fitting))
    recipe = next(recipe for recipe in fitting if seconds(recipe) <= 1.02 * best)
    turned = recipe | {"gradient_checkpointing": not recipe["gradient_checkpointing"]}
    return Form(
        tuning, hardware, name, recipe, memory(recipe, 0), (memory(turned, 0), seconds(turned) / seconds(recipe))
    )


def choose(shape: Shape, family: str, hardware: Hardware, rows: Rows) -> tuple[dict[str, Form], str]:
    """
    The forms of both tunings, and which of them this machine takes: full fine-tuning within half of its memory.

    Raises:
        Refused: not even LoRA fits.
    """
    forms = {tuning: form_of(tuning, shape, family, hardware, rows) for tuning in ("lora", "full")}
    if forms["full"].memory <= FULL * hardware.gib * GIB:
        return forms, "full"
    if forms["lora"].memory > MOST * hardware.gib * GIB:
        raise Refused(
            f"{shape.parameters / 1e9:.1f}B parameters and rows of {rows.longest} tokens take "
            f"{forms['lora'].memory / GIB:.0f} GiB with LoRA and gradient checkpointing, {hardware.words} has "
            f"{hardware.gib:.0f}; take a larger GPU or a smaller model"
        )
    if (
        0 < hardware.gpus < 8
    ):  # full fine-tuning stands beside it for the machine that accelerate_configs/zero3.yaml has
        size = hardware.words.rpartition(" x ")[2].removeprefix("one ").removesuffix(" GPU")
        forms["full"] = form_of("full", shape, family, Hardware(8, hardware.gib, f"8 x {size}"), rows)
    return forms, "lora"


def recipe_files(
    recipe: str, runs: str, model: str, family: str, shape: Shape, hardware: Hardware, rows: Rows
) -> tuple[dict[str, str], Form]:
    """
    The recipe's files, name to text, and the form that the warm-up takes.

    Args:
        recipe, runs (`str`): the folders that the files name.
        family (`str`): the config's `model_type`.
    """
    forms, chosen = choose(shape, family, hardware, rows)
    common = _common_values(recipe, runs, model, shape, hardware, rows)
    shown = {tuning: common | _form_values(form, family, shape, rows) for tuning, form in forms.items()}
    files = {}
    for template in sorted(TEMPLATES.glob("*.yaml")):
        by_tuning = template.stem in ("bottleneck", "distill", "grpo")
        for tuning in shown if by_tuning else [chosen]:
            name = f"{template.stem}.{tuning}.yaml" if by_tuning else template.name
            files[name] = filled(template.read_text(), shown[tuning])
    return files, forms[chosen]


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


def _common_values(recipe: str, runs: str, model: str, shape: Shape, hardware: Hardware, rows: Rows) -> dict:
    """What all files of a recipe say, whatever the tuning."""
    cpu, hub, remote = not hardware.gpus, is_hub_id(rows.data), is_hub_id(rows.prompts)
    gpus, completion = hardware.gpus, min(2048, power_of_two(rows.answer + rows.m_max + 2))
    benchmark = Path(rows.problems).name if is_hub_id(rows.problems) else rows.problems
    task = re.sub(r"\W|_", "", Path(rows.problems).stem.lower())
    rl_batch = 16 if cpu else -(-256 // (8 * gpus)) * 8 * gpus
    return {
        "recipe": recipe, "runs": runs, "model": model, "title": Path(model).name, "codebook": CODEBOOK,
        "added": CODEBOOK + 2, "init_memory": max(1, round(5 * shape.parameters / 1e9)), "m_max": rows.m_max,
        "Hardware": hardware.words[0].upper() + hardware.words[1:],
        "data": rows.data, "data_format": rows.data_format, "longest": rows.longest, "fits": rows.fits,
        "reading": "streams the hub; 16 processes, no GPU" if hub else f"{rows.data}, no GPU",
        "max_prompt": 2560 if rows.longest >= 8192 else None, "limit": rows.limit,
        "parts": f"2 phases x 3 rounds x {rows.kept // 6:,}", "num_proc": 16 if rows.kept > 10_000 else None,
        "shuffle": 20_000 if rows.dolci else None,
        "benchmark": benchmark, "problems": rows.problems, "task": task, "answer": rows.answer,
        "instruction": False if rows.data_format == "problems" else None,
        "sampler": "transformers, a CPU" if cpu else "vLLM, one GPU", "one": "a CPU" if cpu else "one GPU",
        "sampling_dtype": "float32" if cpu else "bfloat16", "backend": "hf" if cpu else "vllm",
        "concise": min(4096, rows.longest), "half": rows.kept // 2, "sixth": rows.kept // 6,
        "half_words": f"{rows.kept // 2:,}", "sixth_words": f"{rows.kept // 6:,}",
        "cot": rows.row - rows.bare, "trace": round((rows.row - rows.bare) / rows.ratio), "ratio": rows.ratio,
        "engine": f"{{data_parallel_size: {gpus}}}" if gpus > 1 else None,
        "attention": "sdpa" if cpu else "flex_attention", "packing": None if cpu else True, "pad": 8 if cpu else None,
        "use_cpu": True if cpu else None, "bf16": not cpu, "workers": None if cpu else 4,
        "gauges": rows.gauges, "shared": "" if cpu else " that vLLM shares",
        "prompts": rows.prompts,
        "prompt_words": "maths has a gold; other prompts are left out without a judge" if remote else None,
        "prompt_rows": 20_000 if remote else None, "max_rl_prompt": 2048 if remote else None,
        "not_in": f"[{rows.problems}]" if remote else None, "overlap": "drop" if remote else None,
        "use_vllm": None if cpu else True, "vllm_length": None if cpu else 2048 + completion + 8,
        "vllm_share": None if cpu else 0.3, "generations": 4 if cpu else 8, "completion": completion,
        "rl_steps": 20 if cpu else 500, "rl_batch": rl_batch, "rl_prompts": rl_batch // (4 if cpu else 8),
    }  # fmt: skip


def _form_values(form: Form, family: str, shape: Shape, rows: Rows) -> dict:
    """What a tuning's files say."""
    lora, cpu, recipe, gib = form.tuning == "lora", not form.hardware.gpus, form.recipe, form.memory / GIB
    batch, compiles = recipe["global_batch_size"], recipe["compile_layers"]
    tokens = batch * rows.longest
    memory = f"{gib:.3g} GiB a GPU of {form.hardware.gib:.0f}, by abscot plan"
    if form.other:
        other, time = form.other
        memory += f"; {_yaml(not recipe['gradient_checkpointing'])}: {other / GIB:.3g}, {time:.2g} times the time"
    step = f"packed rows a step on any number of GPUs: {tokens // 1000}k tokens, about {tokens // rows.row} rows"
    small = shape.parameters < 1e9  # which take ten times the rate
    rate = 1e-4 if lora or small else 1e-5
    processes = form.processes
    fused = True if family in FUSED and form.accelerate == "zero3" else None
    words = "a CPU computes in 32 bits" if cpu else "of the frozen weights; the adapters are float32"
    return {
        "tuning": form.tuning, "hardware": form.hardware.words, "accelerate": form.accelerate, "processes": processes,
        "launcher": form.accelerate + (f" --num_processes {processes}" if processes else ""),
        "form": "LoRA with token rows" if lora else "full fine-tuning",
        "trained": "bottleneck-merged" if lora else "bottleneck", "distilled": "distill-merged" if lora else "distill",
        "batch_words": f"{batch} rows a step" if cpu else f"{batch} packed rows of {rows.longest} tokens a step",
        "dtype": recipe["dtype"],
        "dtype_words": words if lora or cpu else "the optimiser keeps 32-bit weights; bf16: true computes in bf16",
        "peft": True if lora else None, "lora_r": 32 if lora else None, "lora_alpha": 64 if lora else None,
        "lora_dropout": 0.0 if lora else None,
        "targets": recipe.get("lora_target_modules"),
        "micro": recipe["per_device_train_batch_size"], "batch": batch, "step_words": "rows a step" if cpu else step,
        "checkpointing": recipe["gradient_checkpointing"], "memory_words": None if cpu else memory,
        "rate": rate, "rl_rate": rate / 10, "compile": compiles or None, "liger": fused,
        "bare_words": "" if cpu else f"A step holds about {tokens // rows.bare} rows without CoT.",
    }  # fmt: skip


def new(args: NewArguments) -> list[str]:
    """
    `abscot new`: write the recipe folder, and where problems are held out both parts of the rows below `runs`.

    Returns:
        `list[str]`: what was chosen and why, and the next commands, for the terminal.

    Raises:
        Refused: the folder, or the one below `runs`, holds files of that name; a model that `abscot init` refuses, or
            one too large; no such hardware; data or problems that are not there, or none to train on.
    """
    check_folder(args.output_dir)
    folder = Path(args.output_dir)
    if folder.exists() and any(folder.iterdir()):
        raise Refused(f"{folder} holds files already ({min(folder.iterdir()).name}, ..); choose another output_dir")
    hardware = hardware_of(args.hardware)
    tokenizer, model = check_base(args.model, AbstractVocabulary(CODEBOOK, 1, 8))
    runs = Path("runs") / folder.absolute().name
    positions, shape = model.config.max_position_embeddings, shape_of_model(model)
    rows, parts = rows_of(args.data, args.data_format, args.problems, tokenizer, positions, runs, not hardware.gpus)
    there = [path for path in parts if path.exists()]
    if there:
        raise Refused(f"{there[0]} is there already; remove it, or choose another name for output_dir")
    recipe, runs = str(folder), str(runs)
    files, form = recipe_files(recipe, runs, args.model, model.config.model_type, shape, hardware, rows)
    for path, text in [*parts.items(), *((folder / name, text) for name, text in files.items())]:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    return [*_reasons(recipe, args.model, shape, hardware, form, rows), *_next(recipe, runs, form)]


def _reasons(recipe: str, model: str, shape: Shape, hardware: Hardware, form: Form, rows: Rows) -> list[str]:
    chosen, gib = form.recipe, f"{form.memory / GIB:.3g} GiB of {hardware.gib:.0f} a GPU"
    half = "within" if form.tuning == "full" else "full fine-tuning would take over"
    again = "with" if chosen["gradient_checkpointing"] else "without"
    return [
        f"{recipe}: {model} ({shape.parameters / 1e9:.2f}B parameters) on {hardware.words}",
        f"- {form.tuning}: {half} half of the memory; about {gib}, {again} gradient checkpointing, by accelerate "
        f"configuration {form.accelerate}; {'vLLM' if hardware.gpus else 'transformers'} samples",
        f"- rows of up to {rows.longest} tokens, {chosen['per_device_train_batch_size']} at once, "
        f"{chosen['global_batch_size']}{' packs' * bool(hardware.gpus)} a step",
        f"- data: {rows.words}; {rows.kept // 2} rows a phase",
        f"- evaluated on: {rows.problems}",
    ]


def _next(recipe: str, runs: str, form: Form) -> list[str]:
    model = f"{runs}/informed/round1/distill" + "-merged" * (form.tuning == "lora")
    steps = {"init": "init", "data": "data", "plan": "warmup.informed", "warmup": "warmup.informed"}
    return [
        "next:",
        *(f"  abscot {phase} --config {recipe}/{name}.yaml" for phase, name in steps.items()),
        f"  abscot report {runs}/informed",
        f"  abscot serve --model {model}{'' if form.hardware.gpus else ' --backend hf'}",
    ]


def describe_new(lines: list[str]) -> str:
    return "\n".join(lines)
