"""
Hostile inputs to everything that this package reads, each made by a seeded mutation of a valid one.

    python tests/fuzz.py --seed 0 --count 10000             # all kinds, in their shares; exits 1 if anything was found
    python tests/fuzz.py --kind http --count 500
    python tests/fuzz.py --kind http --show 17              # number 17 again, with its traceback

An input may succeed, or be refused (`Refused`; over HTTP a 4xx or 502 in OpenAI's form). Anything else is a violation:
another exception, over 10 s of processor time (or 60 s by the clock), over 2 GB of memory, a file that was changed
though it is none of ours. Inputs run in a worker that is killed and replaced when it hangs or grows, in a folder that
is salted with foreign files and made anew each time; `output_dir` is absent, empty, a link, a file, full, `.`, ...
"""

import argparse
import asyncio
import base64
import faulthandler
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from pkgutil import resolve_name
from threading import Thread

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import httpx
import psutil
import pyarrow
import pyarrow.parquet
import yaml
from tiny import tiny_model
from transformers import AutoTokenizer

import abscot_trl
from abscot_trl.checkpoint import extend_model, save_checkpoint
from abscot_trl.data.prepare import load_prepared
from abscot_trl.data.problems import load_problems, with_instruction
from abscot_trl.data.toy import chain_arithmetic, toy_tokenizer
from abscot_trl.errors import Refused
from abscot_trl.evaluation import evaluate as evaluation
from abscot_trl.evaluation.alpaca import AlpacaArguments, alpaca
from abscot_trl.evaluation.grading import extract_answer, is_correct, normal_form, score
from abscot_trl.evaluation.statistics import own_scores
from abscot_trl.loop.baselines import BaselinesArguments, baselines
from abscot_trl.loop.demo import DemoArguments, demo
from abscot_trl.loop.plan import PlanArguments, describe_plan, plan
from abscot_trl.loop.sweep import SweepArguments, models, sweep
from abscot_trl.loop.warmup import WarmupArguments, warmup
from abscot_trl.phases import PHASES, parse, run_phase
from abscot_trl.report.make import ReportArguments, report
from abscot_trl.serving.chat import Chat, chat_app
from abscot_trl.serving.server import ServeArguments, engine_flags, load_chat
from abscot_trl.traces.files import read_traces
from abscot_trl.vocabulary import AbstractVocabulary

SECONDS, CLOCK, BYTES = 10, 60, 2 * 10**9
WORDY = 2000  # characters of a refusal that nobody reads
PACKAGE = Path(abscot_trl.__file__).parent
FIXED = "../fixed"  # of the box that an input runs in


class Wrong(Exception):
    """The target ended, but not as it promises."""


# Hostile values

# fmt: off
DEEP = {"@[@": "[" * 100_000 + "]" * 100_000, "@{@": '{"a":' * 100_000 + "1" + "}" * 100_000, "@9@": "9" * 5000}
NUMBERS = [0, -1, 1, 3, 2**31, 2**63, 10**400, -0.0, 0.5, 1e308, 1e-320, math.inf, -math.inf, math.nan, True, False]
TEXTS = ["", " ", "x", "0", "-1", "nan", "1e999", "null", "a\x00b", "\ud800", "é\u202e\u2028\x85", "\U0001f600" * 9,
         "sub", ".", "loop", "none/such", "rows.jsonl", f"{FIXED}/model", "<script>&|`[x](y)", "{{7*7}}{% for",
         "<beginabstract><TOKEN_A>", "<think>", "</think>", "\\boxed{", "auto", "all", "own", "hotpotqa", "http://["]
SHAPES = [None, [], {}, [[]], [None], [0], ["x"], {"": None}, {"a": {"b": [1]}}, [1, "x", None, {}], {"x": math.nan}]
HUGE = ["@[@", "@{@", "@9@", "y" * 1_000_000, "\\frac{" * 10_000, "(" * 10_000, list(range(50_000)), ["x"] * 10_000]
KEYS = ["x", "", "id", "env", "model", "\ud800", "a\x00", "trust_remote_code", "gold", "answer"]
INSIDE = [b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\r\n", b"\n\n", b"\x1b[2J", b"{", b'"', b"\\u12", b"NaN", b","]
WHOLE = [b"", b"\n", b" ", b"null", b"[]", b"{}", b"0", b'"x"', b"\x00" * 99, b"PAR1", bytes(range(128, 256))]
RAW = ["!!python/object/apply:os.system ['touch pwned']", "!!python/name:os.system", "&a [*a]", "&a {k: *a}", "*none",
       "2024-01-01", "2024-99-99", "!!timestamp x", "0o17", "017", "190:20:30", "1_000", "0x1F", ".inf", ".nan", "yes",
       "!!int ''", "!!float ''", "!!binary x", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a]", "!!str 1", "!!bool 2",
       "{? [a, b] : c}", "{[1]: 2}", "{1: 2, null: 3}", "{<<: [1]}", "{<<: {a: 1}, a: 2}", "{a: 1, a: 2}", "@x", "\t1",
       "|\n  block", ">-\n  folded", "[1, 2", "{a: ", "'x", '"\\q"', "1e5", "2e-5", "+1", "~", "=", "<<", "&b", "? x",
       "[" * 100_000, "[" * 500 + "]" * 500, "1:" * 2000, "9" * 5000, "*laugh", "*laugh", "- " * 3000, "%TAG", "- -"]
LINES = ["---", "...", "<<: *x", "<<: {seed: 1}", "%YAML 9.9", "- x", "? ", "\tx: 1", "seed: 1", "x"]
LAUGH = ["x0: &l0 [ha, ha]", *(f"x{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 10))]
# fmt: on


def atom(rng):
    """Any value where another is wanted."""
    return rng.choice(rng.choices([NUMBERS, TEXTS, SHAPES, HUGE], [8, 8, 5, 1])[0])


def near(value, rng):
    """A value of another type or size that looks like `value`."""
    tries = [[value], {"a": value}, [value, value], str(value)[:10_000], None]
    if isinstance(value, str):
        tries += [value + rng.choice(TEXTS), rng.choice(TEXTS) + value, value[: len(value) // 2], value * 3, 5]
    elif isinstance(value, (int, float)):
        tries += [-value, value + 1, value * 10**9, value // 3, str(value)]
    return rng.choice(tries)


def mutated(value, rng):
    """`value` with one thing wrong somewhere in it."""
    if not (isinstance(value, (dict, list)) and value and rng.random() < 0.92):
        return atom(rng) if rng.random() < 0.7 else near(value, rng)
    keys, chance = list(value) if isinstance(value, dict) else list(range(len(value))), rng.random()
    key, new = rng.choice(keys), value.copy()
    if chance < 0.1:
        new.pop(key)
    elif chance < 0.18 and isinstance(value, dict):
        new[rng.choice([*KEYS, *keys])] = atom(rng)
    elif chance < 0.22 and isinstance(value, dict):
        new[rng.choice(KEYS)] = new.pop(key)
    elif chance < 0.3 and isinstance(value, list):
        new.insert(key, rng.choice([atom(rng), value[0], value[-1]]))
    else:
        new[key] = mutated(value[key], rng)
    return new


def some_mutated(items: list, rng) -> list:
    """None, one or two of them wrong."""
    items = list(items)
    for at in rng.choices(range(len(items)), k=rng.choice([0, 1, 1, 1, 2])):
        items[at] = mutated(items[at], rng)
    return items


def as_json(value, rng) -> str:
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7)
    for mark, raw in DEEP.items():
        text = text.replace(f'"{mark}"', raw)
    return text


def as_lines(values: list, rng) -> str:
    return "".join(as_json(value, rng) + "\n" for value in values)


def damaged(text: str, rng, chance: float = 0.1) -> bytes:
    """The bytes of a text, at times not whole, not UTF-8 or with more in it."""
    content = text.encode("utf-8", "surrogatepass")
    if rng.random() > chance:
        return content
    at = rng.randrange(len(content) + 1)
    whole = [content[:at], content[at:], content * 2, text.encode("utf-16", "replace"), b"\xef\xbb\xbf" + content]
    whole += [
        content.replace(b": ", b': 1, "id": ', 1),
        content.replace(b'"', b"'"),
        content.rstrip(),
        content + b"\x00",
    ]
    whole += [content.replace(b"\n", b"\r\n"), content.replace(b"\n", b"\r"), rng.choice(WHOLE), rng.randbytes(200)]
    whole += [content[:at] + rng.choice(INSIDE) + content[at:]] * 6
    return rng.choice(whole)


def put(path: str | Path, content: bytes | str, rng=None) -> str:
    """A file where `path` says; with `rng` at times a folder, a dangling link, a loop, a pipe, or nothing."""
    path, kinds = Path(path), ["file", "folder", "dangling", "loop", "pipe", "nothing"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    kind = rng.choices(kinds, [95, 1, 1, 1, 1, 1])[0] if rng else "file"
    content = content if isinstance(content, bytes) else content.encode()
    if kind == "file":
        path.write_bytes(content)
    elif kind == "folder":
        put(path / "inside.jsonl", content)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "nothing":
        path.symlink_to("none/such" if kind == "dangling" else path.name)
    return str(path)


def as_yaml(settings, rng) -> str:
    """One line a field, as JSON is YAML too; one field may be YAML's own trouble."""
    if not isinstance(settings, dict):
        return as_json(settings, rng)
    lines = {k: as_json(v, rng).replace("Infinity", ".inf").replace("NaN", ".nan") for k, v in settings.items()}
    if lines and rng.random() < 0.3:
        lines[rng.choice(list(lines))] = rng.choice(RAW)
    text = [f"{key if key.isidentifier() else json.dumps(key)}: {value}" for key, value in lines.items()]
    if "*laugh" in lines.values():
        text = [*LAUGH, *(line.replace("*laugh", "*l9") for line in text)]
    if rng.random() < 0.05:
        text.insert(rng.randrange(len(text) + 1), rng.choice(LINES))
    return "\n".join(text) + "\n"


# The box

SALT = (".notes.2024", "report.md", "train.jsonl", "test.jsonl", "mine.arrow", "sub/.backup.2024-11-01.tar")
SALT += ("sub/checkpoint-7/notes.txt", "sub/evaluate.yaml", "out.parts/.hidden", "new.judge/notes.txt")
SALT += ("run/.notes.2024", "run/sub/.a.1", "run/round1/.distill-mine/notes")
OUTPUTS = ["deep/er", "empty", ".", "./", "link", "link/", "loop", "sub", "sub/..", "report.md", "out", "out"]
OUTPUTS += ["", "report.md/x", "n" * 300, "a\x00b", "new\n", "é\ud800", " "]


def output(rng) -> str:
    return "new" if rng.random() < 0.5 else rng.choice(OUTPUTS)


def fill_box(box: Path) -> None:
    """The folder that an input runs in, with nothing in it but files that are not ours."""
    shutil.rmtree(box, ignore_errors=True)
    for name in SALT:
        put(box / name, f"foreign: {name}\n")
    (box / "empty").mkdir()
    (box / "link").symlink_to("sub")
    (box / "loop").symlink_to("loop")
    os.chdir(box)


def check_box(box: Path, before: list) -> None:
    """Raises `Wrong` if a foreign file of the box, or one of the fixed inputs, is not what it was."""
    os.chdir(box)
    for path in (box / name for name in SALT):
        words = f"foreign: {path.relative_to(box)}\n"
        if not path.is_file() or path.read_bytes() != words.encode():
            raise Wrong(f"foreign file {'changed' if path.is_file() else 'gone'}: {path.relative_to(box)}")
    if not ((box / "link").is_symlink() and (box / "loop").is_symlink()):
        raise Wrong("foreign link gone")
    if stamps(box.parent / "fixed") != before:
        shutil.rmtree(box.parent / "fixed")
        shutil.copytree(box.parent / "spare", box.parent / "fixed")
        raise Wrong("an input was changed")


def stamps(folder: Path) -> list:
    names = sorted(os.path.join(path, name) for path, _, names in os.walk(folder) for name in names)
    return [(name, (stat := os.lstat(name)).st_size, stat.st_mtime_ns) for name in names]


TRAINING = {"max_length": 128, "max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "bf16": False}
TRAINING |= {"use_cpu": True, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
EVALUATION = {
    "problems": f"{FIXED}/rows.jsonl",
    "instruction": False,
    "max_new_tokens": 4,
    "limit": 4,
    "task": "chain",
}
RUN = {"run_dir": "run", "model": f"{FIXED}/model", "data": f"{FIXED}/data", "launch": "inline", "rounds": 1}
RUN |= {"rows_per_phase": 4, "seed": 0}
RUN |= {phase: f"{FIXED}/{phase}.yaml" for phase in ("bottleneck", "distill", "evaluate")}
WARMUP = RUN | {"initial": "uniform", "distill_from": "cot", "rehearsal": 1.0}
BASELINES = RUN | {"names": ["base", "sft"], "recipes": str(PACKAGE.parent / "recipes" / "baselines")}
EVALUATE = {"config": f"{FIXED}/evaluate.yaml", "model": f"{FIXED}/model"}


def build(root: Path) -> None:
    """The valid inputs, in `root/fixed`: model, rows, prepared data, traces, an evaluation, a finished warm-up."""
    fill_box(root / "box")
    tokenizer, vocabulary, model = toy_tokenizer(), AbstractVocabulary(8, 1, 6), tiny_model(vocabulary=40)
    for part in (model, tokenizer):
        part.save_pretrained(f"{FIXED}/base")
    vocabulary.extend(tokenizer)
    extend_model(model, vocabulary.all_ids(tokenizer))
    Path(FIXED, "model").mkdir()
    save_checkpoint(model, tokenizer, vocabulary, f"{FIXED}/model")
    put(f"{FIXED}/rows.jsonl", as_lines(TOY, random.Random(0)))
    for phase, recipe in {"bottleneck": TRAINING, "distill": TRAINING, "evaluate": EVALUATION}.items():
        put(
            f"{FIXED}/{phase}.yaml",
            yaml.safe_dump(recipe | ({"swaps": ["own", "other"]} if recipe is EVALUATION else {})),
        )
    rows = {"data": f"{FIXED}/rows.jsonl", "data_format": "problems", "tokenizer": f"{FIXED}/model"}
    run_phase("data", flags(rows | {"output_dir": f"{FIXED}/data"}))
    traces = {"model": f"{FIXED}/model", "data": f"{FIXED}/data", "method": "uniform"}
    run_phase("traces", flags(traces | {"output_dir": f"{FIXED}/traces"}))
    run_phase("evaluate", flags(EVALUATE | {"output_dir": f"{FIXED}/evaluation"}))
    join, evaluation.Evaluation.join = evaluation.Evaluation.join, lambda self: None  # killed before it joined them
    run_phase("evaluate", flags(EVALUATE | {"output_dir": f"{FIXED}/unfinished"}))
    evaluation.Evaluation.join = join
    shutil.rmtree("run")
    warmup(WarmupArguments(**WARMUP))
    shutil.copytree("run", f"{FIXED}/run")
    shutil.copytree(FIXED, root / "spare")


def flags(settings: dict) -> list[str]:
    """Fields as a command line."""
    found = []
    for key, value in settings.items():
        found += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return found


@cache
def fixed_text(name: str) -> str:
    return Path(FIXED, name).read_text()


def fixed_lines(name: str) -> list[dict]:
    return [json.loads(line) for line in fixed_text(name).splitlines()]


# Rows and problems

TOY = [{**asdict(row), "prompt": row.prompt[0]["content"]} for row in chain_arithmetic(12, 2, 5, seed=0)]
WRONG = {f"Incorrect Answer {i}": str(i) for i in (1, 2, 3)}
CONTEXT = {"title": ["A"], "sentences": [["b. ", "c."]]}
PROBLEMS = [
    TOY,
    [{"question": f"How many {i}?", "answer": "1+1 = <<1+1=2>>2\n#### 2"} for i in range(3)],
    [{"problem": "What?", "solution": "So \\boxed{4}.", "answer": "4", "unique_id": f"test/{i}.json"} for i in (1, 2)],
    [{"problem": "What?", "answer": 4, "id": 3}],
    [{"question": "Who?", "context": CONTEXT, "answer": "d", "id": i} for i in "ab"],
    [{"Question": f"Which {i}?", "Correct Answer": "a", "Record ID": i, **WRONG} for i in "ab"],
    [{"instruction": "Say x.", "dataset": "helpful_base", "output": "x", "generator": "y"} for _ in range(2)],
]


def dolci(row: dict) -> dict:
    said = f"<think>{row['cot']}</think>{row['answer']}"
    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": said}]
    return {"messages": messages, "dataset_source": "toy", "id": row["id"]}


def parquet(rows: list[dict], rng) -> bytes | None:
    """`None` where Arrow has no column for them."""
    sink = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    except Exception:
        return None
    content, at = sink.getvalue(), rng.randrange(1, 400)
    cut = [content[:-at], content[at:], content[:at] + b"\xff" * 9 + content[at + 9 :], content[:-4], b"PAR1"]
    return content if rng.random() < 0.6 else rng.choice(cut)


def csv(rows: list) -> str:
    rows = [row for row in rows if isinstance(row, dict)] or [{}]
    cells = [list(map(str, line)) for line in [rows[0], *(row.values() for row in rows)]]
    return "\n".join(",".join('"' + cell[:10_000].replace('"', '""') + '"' for cell in line) for line in cells)


def rows_file(rows: list[dict], suffix: str, rng) -> str:
    """Rows, some of them mutated, in one of the formats that are read."""
    rows = some_mutated(rows, rng)
    if suffix == ".parquet" and (content := parquet(rows, rng)) is not None:
        return put("rows.parquet", content, rng)
    if suffix == ".csv":
        return put("rows.csv", damaged(csv(rows), rng), rng)
    text = f"[{','.join(as_json(row, rng) for row in rows)}]" if suffix == ".json" else as_lines(rows, rng)
    return put("rows.json" if suffix == ".json" else "rows.jsonl", damaged(text, rng), rng)


def fuzz_rows(rng) -> None:
    """`abscot data` on mutated rows."""
    thoughts = rng.random() < 0.6
    rows = [dolci(row) for row in TOY[: rng.choice([1, 12])]] if thoughts else rng.choice(PROBLEMS[:4])
    settings = {"data": [rows_file(rows, rng.choice([".jsonl", ".jsonl", ".parquet"]), rng)]}
    settings |= {"data_format": "dolci" if thoughts else "problems", "output_dir": output(rng)}
    more = {"shuffle_buffer": 0, "limit": 2, "max_total_tokens": 30, "overlong": "cut_cot_middle", "sources": ["toy"]}
    settings |= {key: more[key] for key in rng.sample(list(more), 2)}
    if rng.random() < 0.1:
        settings["data"] = rng.choice(
            [["."], ["sub"], ["loop"], ["empty"], ["a/b"], [""], ["a\x00"], settings["data"] * 2]
        )
    function, (cls,) = resolve_name(PHASES["data"].function), PHASES["data"].classes
    function(cls(tokenizer=f"{FIXED}/model", **settings))


def fuzz_problems(rng) -> None:
    """The problems of an evaluation, up to its first answer."""
    path = rows_file(rng.choice(PROBLEMS), rng.choice([".jsonl", ".json", ".csv", ".parquet"]), rng)
    problems = load_problems(path, limit=rng.choice([None, 1]))
    args = PHASES["evaluate"].classes[0](model=f"{FIXED}/model", problems=path, output_dir="new")
    evaluation.check_problems(problems, args)
    for problem in problems:
        with_instruction(problem, "verbal")


# Fields and recipes

CLASSES = [phase.classes for phase in PHASES.values()]
# what would reach out of the box, or leave something behind in this process
LEFT_OUT = {"push_to_hub", "report_to", "deepspeed", "local_rank", "python", "torch_compile"}


def plausible(one, rng):
    """A value of the kind that a field's annotation names, at times an odd one."""
    kind = str(one.type)
    if rng.random() < 0.2:
        numbers = [n for n in NUMBERS if isinstance(n, float if "float" in kind else int)]
        return rng.choice(numbers if "int" in kind or "float" in kind else TEXTS)
    if one.metadata.get("choices"):
        return rng.choice(list(one.metadata["choices"]))
    if "bool" in kind:
        return rng.random() < 0.5
    if "list" in kind:
        return rng.choice([["abstract"], ["own", "other"], ["x"], ["sft"], [f"{FIXED}/rows.jsonl"]])
    number = 1 if "int" in kind else 0.5 if "float" in kind else None
    return number or ({"a": 1} if "dict" in kind else rng.choice(["x", "hf", "http://x", f"{FIXED}/model"]))


def fuzz_yaml(rng) -> None:
    """The fields of any command, from a recipe and a command line."""
    classes = rng.choice(CLASSES)
    found = {one.name: one for cls in classes for one in fields(cls) if one.init}
    required = [name for name, one in found.items() if one.default is MISSING and one.default_factory is MISSING]
    others = sorted(found.keys() - {*required, *LEFT_OUT})
    chosen = [*required, *rng.sample(others, min(len(others), rng.choice([1, 4])))]
    settings = {name: plausible(found[name], rng) for name in chosen}
    settings |= {"output_dir": "new"} if "output_dir" in found else {}
    content = as_yaml(mutated(settings, rng) if rng.random() < 0.7 else settings, rng)
    arguments = ["--config", put("recipe.yaml", damaged(content, rng, 0.05), rng)]
    if rng.random() < 0.2:
        name, text = rng.choice(list(found)), str(atom(rng))[:9999]
        tries = [[f"--{name}"], [f"--{name}", text], [f"--{name}={text}"], ["--config"], ["--config", text], ["x"]]
        arguments += rng.choice([*tries, ["--", "x"], ["--config=recipe.yaml"], ["--no_such", "1"]])
    args, *_ = parse(classes, arguments)
    if isinstance(args, ServeArguments):
        engine_flags(args.engine)


ACCELERATE = {
    "distributed_type": "DEEPSPEED",
    "num_processes": 2,
    "deepspeed_config": {"zero_stage": 2},
    "use_cpu": True,
}
TUNING = {"packing": True, "global_batch_size": 4, "use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}
TUNING |= {"num_train_epochs": 1.5, "warmup_steps": 3, "save_total_limit": 1, "max_steps": 0, "rehearsal": 0.5}


def fuzz_recipes(rng) -> None:
    """A warm-up, its baselines or its plan, dry, with a recipe that is wrong."""
    recipes = {"bottleneck": TRAINING, "distill": TRAINING, "evaluate": EVALUATION | {"swaps": ["own"]}}
    what = {
        WarmupArguments: warmup,
        BaselinesArguments: baselines,
        PlanArguments: lambda args: describe_plan(plan(args)),
    }
    cls = rng.choice(list(what))
    settings = BASELINES if cls is BaselinesArguments else WARMUP
    recipes |= {"accelerate": ACCELERATE, "warmup": settings | {"accelerate_config": "accelerate.yaml"}}
    recipes["warmup"] |= {phase: f"{phase}.yaml" for phase in ("bottleneck", "distill", "evaluate")}
    which = rng.choice(list(recipes))
    if which in ("bottleneck", "distill"):
        recipes[which] = recipes[which] | {key: TUNING[key] for key in rng.sample(list(TUNING), 3)}
    for name, recipe in recipes.items():
        put(f"{name}.yaml", yaml.safe_dump(recipe))
    put(f"{which}.yaml", damaged(as_yaml(mutated(recipes[which], rng), rng), rng, 0.05), rng)
    (args,) = parse((cls,), ["--config", "warmup.yaml"])
    args.dry_run = True
    what[cls](args)


# Results, answers, traces, splits


def result_rows() -> list[dict]:
    """Rows with every figure that a row may hold."""
    rows = json.loads(fixed_text("evaluation/results.json"))
    more = dict.fromkeys(("em", "maj", "pass"), 50.0) | {
        f"{name}_ci95": [40.0, 60.0] for name in ("em", "maj", "pass")
    }
    rows += [row | more | {"round": 2, "task": "hotpotqa", "metric": "f1", "samples": 2} for row in rows]
    rows += [
        rows[0] | {"mode": "verbal", "model": "base", "round": 1},
        rows[0] | {"stage": "round1/distill", "round": 1},
    ]
    return [*rows, rows[0] | {"metric": "lc_win_rate", "win_rate": 50.0, "win_rate_ci95": [1, 2], "truncated": 2}]


def run_report(rng, runs: list[str]) -> None:
    title, chance = rng.choice(["Results", *TEXTS]), rng.choice([None, None, 20.0, 0, 100])
    report(ReportArguments(runs, rng.choice([None, output(rng)]), title, chance))


def fuzz_results(rng) -> None:
    """`abscot report` on a mutated results.json."""
    rows = rng.choice([result_rows(), result_rows()[:1], rng.sample(result_rows(), 4)])
    path = put("results/results.json", damaged(as_json(mutated(rows, rng), rng), rng, 0.05), rng)
    put("other/results.json", json.dumps(rows))
    run_report(
        rng, rng.choice([["results"], [path], ["results", "other"], ["other", path], ["results", "results"], ["."]])
    )


def fuzz_answers(rng) -> None:
    """`abscot report`, and a warm-up's comparison of rounds, on mutated answers."""
    shutil.copytree(f"{FIXED}/evaluation", "evaluation")
    lines = some_mutated(fixed_lines("evaluation/answers.jsonl"), rng)
    if rng.random() < 0.15:  # every answer alike in one thing
        same = {rng.choice(["trace", "answer", "gold", "id", "task", "score", "sample", "problem"]): atom(rng)}
        lines = [line | same if isinstance(line, dict) else line for line in lines]
    path = put("evaluation/answers.jsonl", damaged(as_lines(lines, rng), rng, 0.05), rng)
    with suppress(Refused):
        if Path(path).is_file():
            own_scores(Path(path))
    run_report(rng, ["evaluation"])


def fuzz_splits(rng) -> None:
    """Traces, a warm-up and baselines by a mutated splits.json."""
    content = damaged(as_json(mutated(json.loads(fixed_text("run/splits.json")), rng), rng), rng)
    path, what = put("run/splits.json", content, rng), rng.choice(["traces", "traces", "warmup", "baselines"])
    if what == "warmup":
        warmup(WarmupArguments(**WARMUP, dry_run=True))
    elif what == "baselines":
        beside = {"run_dir": "new", "warmup": "run", "steps": 1}
        baselines(BaselinesArguments(**BASELINES | beside, dry_run=True))
    else:
        function, (cls,) = resolve_name(PHASES["traces"].function), PHASES["traces"].classes
        method, part = (
            rng.choice(["uniform", "cycle", "power_law"]),
            rng.choice(["1.bottleneck", "1.distill", "2.distill"]),
        )
        where = {"model": f"{FIXED}/model", "data": f"{FIXED}/data", "output_dir": output(rng)}
        function(cls(**where, splits=path, part=part, method=method))


@cache
def served() -> tuple:
    """Tokenizer, codebook and the ids of the prepared rows."""
    ids = list(load_prepared(f"{FIXED}/data")[0]["id"])
    return AutoTokenizer.from_pretrained(f"{FIXED}/model"), AbstractVocabulary.load(f"{FIXED}/model"), ids


def fuzz_traces(rng) -> None:
    """Mutated traces.jsonl: their rows, and at times a training phase on them."""
    text = as_lines(some_mutated(fixed_lines("traces/traces.jsonl"), rng), rng)
    path = put("traces/traces.jsonl", damaged(text, rng), rng)
    if rng.random() < 0.7:
        _, vocabulary, ids = served()
        read_traces(rng.choice(["traces", "traces", "traces", path]), ids, vocabulary)
        return
    phase = rng.choice(["bottleneck", "distill", "baseline"])
    inputs = {
        "data": f"{FIXED}/data",
        "model_name_or_path": f"{FIXED}/model",
        "traces": "traces",
        "output_dir": output(rng),
    }
    if phase == "baseline":
        inputs["splits"] = f"{FIXED}/run/splits.json"
        del inputs["traces"]
    if rng.random() < 0.3:
        inputs[rng.choice(list(inputs))] = rng.choice(["none/such", "sub", "", "traces", "report.md", "loop"])
    more = [{}, {}, {"resume_from_checkpoint": "true"}, {"learning_rate": 1e30}, {"max_length": 8}, {"packing": True}]
    put("train.yaml", yaml.safe_dump(TRAINING | inputs | rng.choice(more)))
    run_phase(phase, ["--config", "train.yaml"])


# Damaged files of our own


def damage_file(path: Path, rng) -> None:
    """One of our files, mutated as what it is."""
    content = path.read_bytes()
    if path.suffix == ".json":
        new = damaged(as_json(mutated(json.loads(content), rng), rng), rng)
    elif path.suffix == ".jsonl":
        new = damaged(as_lines(some_mutated(list(map(json.loads, content.splitlines())), rng), rng), rng, 0.2)
    elif path.suffix == ".arrow":
        at = rng.randrange(len(content))
        new = rng.choice([b"", content[:at], content[:at] + rng.randbytes(9) + content[at + 9 :], rng.randbytes(99)])
    else:
        lines = content.decode().split("\n")
        at = rng.randrange(len(lines))
        lines[at] = rng.choice(
            [lines[at].replace(",", ",x", 1), str(atom(rng))[:9999], "", lines[at].replace("|", "", 1)]
        )
        new = damaged("\n".join(lines), rng, 0.2)
    put(path, new, rng)


def our_files(folder: str, suffixes: tuple[str, ...]) -> list[Path]:
    """What this package wrote there, less the models' own."""
    found = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.suffix in suffixes]
    others = ("config.json", "generation_config.json", "README.md", "tokenizer.json", "tokenizer_config.json")
    return [path for path in found if path.name not in others and str(path) not in SALT]


def fuzz_run(rng) -> None:
    """A finished warm-up with one damaged file: the same command, and what reads the run."""
    shutil.copytree(f"{FIXED}/run", "run", dirs_exist_ok=True)
    manifest = rng.choice(sorted(Path("run").rglob("manifest.json")))
    if rng.random() < 0.25:  # killed after its work, before its manifest
        running = manifest.parent.with_name(manifest.parent.name + ".running")
        record = json.loads(manifest.read_text()) | {"attempt": 1}
        put(running, damaged(as_json(mutated(record, rng), rng), rng), rng)
        manifest.unlink()
        warmup(WarmupArguments(**WARMUP))
        return
    damage_file(rng.choice([manifest, rng.choice(our_files("run", (".json", ".jsonl", ".csv", ".md")))]), rng)
    what = rng.choice(["warmup", "warmup", "report", "models", "baselines"])
    if what == "warmup":
        warmup(WarmupArguments(**WARMUP))
    elif what == "report":
        run_report(rng, ["run"])
    elif what == "models":
        models(Path("run"))
    else:
        baselines(BaselinesArguments(**BASELINES | {"run_dir": "new", "warmup": "run"}, dry_run=True))


def fuzz_data(rng) -> None:
    """Prepared data with one damaged file."""
    shutil.copytree(f"{FIXED}/data", "data")
    damage_file(rng.choice(sorted(Path("data").iterdir())), rng)
    if rng.random() < 0.5:
        describe_plan(plan(PlanArguments(**WARMUP | {"data": "data"})))
    else:
        run_phase(
            "traces", flags({"model": f"{FIXED}/model", "data": "data", "output_dir": "new", "method": "uniform"})
        )


def fuzz_parts(rng) -> None:
    """The finished parts of an evaluation, or of a preparation, with one damaged file; the command goes on."""
    if rng.random() < 0.5:
        shutil.copytree(f"{FIXED}/unfinished.parts", "unfinished.parts")
        damage_file(rng.choice(our_files("unfinished.parts", (".json", ".jsonl"))), rng)
        run_phase("evaluate", flags(EVALUATE | {"output_dir": "unfinished"}))
        return
    for name in ("settings.json", "00000.json"):
        counts = {"kept": 3, "seed": 0, "rejected.no_think": 1}
        put(f"new.parts/{name}", damaged(as_json(mutated(counts, rng), rng), rng), rng)
    Path("new.parts/rows").mkdir()
    rows = {"data": f"{FIXED}/rows.jsonl", "tokenizer": f"{FIXED}/model", "data_format": "problems"}
    run_phase("data", flags(rows | {"output_dir": "new"}))


def fuzz_vocabulary(rng) -> None:
    """A checkpoint with a damaged codebook file."""
    shutil.copytree(f"{FIXED}/model", "model")
    damage_file(Path("model/abstract_vocabulary.json"), rng)
    run_phase("traces", flags({"model": "model", "data": f"{FIXED}/data", "output_dir": "new", "method": "cycle"}))


def fuzz_outputs(rng) -> None:
    """What `abscot alpaca` reads, up to the judge, who is not there."""
    outputs = [{"instruction": f"Say {i}.", "output": "x", "generator": "y"} for i in range(3)]
    row = json.loads(fixed_text("evaluation/results.json"))[0]
    files = {"graded/outputs.json": outputs, "graded/ungraded.json": row, "reference.json": outputs}
    which = rng.choice(list(files))
    for name, content in files.items():
        put(name, json.dumps(content))
    put(which, damaged(as_json(mutated(files[which], rng), rng), rng), rng)
    alpaca(AlpacaArguments("graded", "reference.json", "http://127.0.0.1:9", "judge", output(rng), python="none/such"))


def fuzz_manifest(rng) -> None:
    """A file that this package wrote is damaged."""
    choices = [fuzz_run, fuzz_data, fuzz_parts, fuzz_vocabulary, fuzz_outputs]
    rng.choices(choices, [4, 2, 2, 1, 1])[0](rng)


# Commands on good inputs, or none, and a folder that they must not touch

INPUTS = {"model": f"{FIXED}/model", "data": f"{FIXED}/data"}
TRAINED = {"model_name_or_path": f"{FIXED}/model", "data": f"{FIXED}/data", "traces": f"{FIXED}/traces"}
JUDGED = {"outputs": "sub", "reference_outputs": "train.jsonl", "judge": "http://127.0.0.1:9", "judge_model": "x"}
MISSING_INPUTS = ["none/such", "sub", "", "report.md", "loop", f"{FIXED}/rows.jsonl"]
GOOD = {
    "init": {"base_model": f"{FIXED}/base", "codebook_size": 4, "m_max": 4},
    "data": {"data": f"{FIXED}/rows.jsonl", "data_format": "problems", "tokenizer": f"{FIXED}/model"},
    "traces": INPUTS | {"method": "policy", "temperature": 0.0},
    "concise": INPUTS | {"samples": 1, "temperature": 0.0, "max_new_tokens": 2},
    "evaluate": EVALUATION | {"model": f"{FIXED}/model", "swaps": ["own"]},
    "bottleneck": TRAINING | TRAINED,
    "merge": {"adapter": f"{FIXED}/model"},
    "alpaca": JUDGED,
    "demo": {"recipes": "none/such", "rows_per_phase": 2, "test_rows": 2, "models": ["sft"]},
    "report": {"runs": [f"{FIXED}/evaluation"]},
    "warmup": WARMUP | {"until": "round1/bottleneck-traces"},
    "baselines": BASELINES | {"names": ["base"]},
    "sweep": {"evaluate": f"{FIXED}/evaluate.yaml", "launch": "inline"},
}
MAINS = {"alpaca": (alpaca, AlpacaArguments), "demo": (demo, DemoArguments), "report": (report, ReportArguments)}
MAINS |= {"warmup": (warmup, WarmupArguments), "baselines": (baselines, BaselinesArguments)}
MAINS |= {"sweep": (sweep, SweepArguments)}


def fuzz_folders(rng) -> None:
    """Any command whose folder is not its own, or whose inputs are not there."""
    name, place = rng.choice(list(GOOD)), rng.choice(["new", *OUTPUTS])
    key = {"warmup": "run_dir", "baselines": "run_dir", "sweep": "run"}.get(name, "output_dir")
    settings = GOOD[name] | {key: place}
    if name == "sweep" or rng.random() < 0.1:
        with suppress(OSError, ValueError):  # a run is there already
            shutil.copytree(f"{FIXED}/run", place, dirs_exist_ok=True)
    if rng.random() < 0.4:
        paths = [at for at, value in settings.items() if isinstance(value, str) and value.startswith(FIXED)]
        if paths:
            settings |= {rng.choice(paths): rng.choice(MISSING_INPUTS)}
    put("recipe.yaml", yaml.safe_dump(settings))
    if name in MAINS:
        function, cls = MAINS[name]
        function(*parse((cls,), ["--config", "recipe.yaml"]))
    else:
        run_phase(name, ["--config", "recipe.yaml"])


# HTTP

USER = {"role": "user", "content": "7+4-2="}
PARTS = [{"type": "text", "text": "3+"}, {"type": "text", "text": "+4="}]
TURNS = [{"role": "system", "content": "1+1="}, USER, {"role": "assistant", "content": "9", "reasoning_content": "x"}]
TURNS += [{"role": "user", "content": PARTS}]
BODY = {
    "model": "tiny",
    "max_tokens": 9,
    "temperature": 0.5,
    "trace_temperature": 1.0,
    "top_p": 0.9,
    "seed": 3,
    "n": 2,
}
BODY |= {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "logprobs": True, "store": False, "ignore_eos": True}
BODY |= {"max_completion_tokens": 9, "reasoning_effort": "medium", "modalities": ["text"], "service_tier": "auto"}
BODY |= {"stop": ["x"], "stream_options": {"include_usage": True}, "presence_penalty": 0.1, "frequency_penalty": 0}
BODY |= {"user": "me", "metadata": {"a": "b"}, "logit_bias": {}, "response_format": {"type": "text"}, "tools": []}
PATHS = ["/v1/completions", "/tokenize", "/health", "/v1/models", "/none", "/v1/chat/completions/", "/metrics"]
TYPES = ["application/json", "text/plain", "multipart/form-data", "", "application/json; charset=x"]
ERRORS = [
    httpx.ConnectError("refused"),
    httpx.ReadTimeout("late"),
    httpx.ReadError("reset"),
    httpx.PoolTimeout("pool"),
]
ERRORS += [httpx.RemoteProtocolError("odd"), httpx.DecodingError("gzip")]
EVENTS = [
    b": ping\n\n",
    b"\xff\xfe\n",
    b"data:{}\n\n",
    b"event: error\n",
    b"data: \n\n",
    b'data: {"error": "dead"}\n\n',
]
EVENTS += [b'data: {"error": {"message": 5}}\n\n', b"data: null\n\n", b"x" * 10**6, b"data: [DONE]\n\n"]


class Pieces(httpx.AsyncByteStream):
    """A stream in pieces, one of which may be an exception."""

    def __init__(self, pieces):
        self.pieces = pieces

    async def __aiter__(self):
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece


def completion(ids: list[int], text: str = "7", finish: str | None = "stop") -> dict:
    names = [f"token_id:{token}" for token in ids]
    logprobs = {"tokens": names, "token_logprobs": [-0.5] * len(ids), "top_logprobs": [{n: -0.5} for n in names]}
    choice = {"index": 0, "text": text, "token_ids": ids, "finish_reason": finish, "logprobs": logprobs}
    return {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": len(ids), "total_tokens": 9}}


def odd_reply(ids: list[int], streamed: bool, rng, odd: float) -> httpx.Response:
    """What stands for vLLM's reply; `odd` is how often something is wrong with it."""
    status = 200 if rng.random() > odd / 4 else rng.choice([204, 301, 400, 401, 404, 413, 422, 429, 500, 503])
    if rng.random() < odd / 6:
        raise rng.choice(ERRORS)

    def written(content: dict) -> bytes:
        return damaged(as_json(mutated(content, rng) if rng.random() < odd else content, rng), rng, odd / 4)

    if not streamed:
        return httpx.Response(status, content=written(completion(ids)), headers={"content-type": rng.choice(TYPES)})
    events = [completion([8], "7", None), completion([9], "+"), completion([1]) | {"choices": []}]
    pieces = [b"data: " + written(event) + b"\n\n" if rng.random() < 0.7 else event for event in events]
    pieces = [b"data: " + json.dumps(p).encode() + b"\n\n" if isinstance(p, dict) else p for p in pieces]
    pieces += [b"data: [DONE]\n\n"] if rng.random() > odd / 4 else []
    if rng.random() < odd / 2:
        pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(ERRORS + EVENTS))
    return httpx.Response(status, stream=Pieces(pieces))


def check_error(error) -> None:
    """OpenAI's error object."""
    fits = isinstance(error, dict) and {"param", "code"} <= error.keys()
    if not (fits and all(isinstance(error.get(key), str) and error[key] for key in ("message", "type"))):
        raise Wrong("an error that is not in OpenAI's form")


def check_response(response: httpx.Response) -> None:
    """A reply, a stream of events or an error, as OpenAI's API has them."""
    status = response.status_code
    if not (200 <= status < 300 or 400 <= status < 500 or status in (502, 503, 504)):
        raise Wrong(f"status {status}")
    if "event-stream" not in response.headers.get("content-type", ""):
        content = response.json()
        if status >= 400:
            check_error(content.get("error"))
        elif not isinstance(content["choices"][0]["message"]["content"], str):
            raise Wrong("a reply whose content is no text")
        return
    *events, last = [line.removeprefix("data: ") for line in response.text.split("\n") if line]
    deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
    if not all(isinstance(delta.get("content", ""), str) for delta in deltas):
        raise Wrong("a delta whose content is no text")
    if last != "[DONE]":
        check_error(json.loads(last).get("error"))


def body_of(rng, odd: float) -> bytes:
    body = {key: BODY[key] for key in rng.sample(list(BODY), 4)}
    body |= {"messages": rng.choice([[USER], TURNS]), "stream": rng.random() < 0.4}
    if rng.random() < 0.01:
        body["messages"] = [{"role": "user", "content": rng.choice(["7+", "é"]) * rng.choice([10**6, 10**7])}]
    wrong = rng.random() < (0.2 if odd else 0.9)
    return damaged(as_json(mutated(body, rng) if wrong else body, rng), rng, 0.02 if odd else 0.15)


def fuzz_http(rng) -> None:
    """A request to `abscot serve` over a vLLM that may be odd."""
    odd = rng.choice([0.0, 0.6])
    content = body_of(rng, odd)

    def vllm(request: httpx.Request) -> httpx.Response:
        ids = rng.choice([[40, 49], [49], [40] * 6, *([[], [3], [10**9]] if odd else [])])
        streamed = b'"stream":true' in request.content.replace(b" ", b"")
        return odd_reply(ids if b"allowed_token_ids" in request.content else [8, 9, 1], streamed, rng, odd)

    async def ask() -> httpx.Response:
        tokenizer, vocabulary, _ = served()
        upstream = httpx.AsyncClient(transport=httpx.MockTransport(vllm), base_url="http://vllm")
        app = chat_app(Chat(upstream, "tiny", tokenizer, vocabulary, 256, [1]))
        method, path, headers = "POST", "/v1/chat/completions", {"content-type": rng.choice(TYPES)}
        if rng.random() < 0.05:
            method, path = rng.choice(["GET", "POST", "PUT"]), rng.choice(PATHS)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test", timeout=None
        ) as client:
            return await client.request(method, path, content=content, headers=headers)

    response = asyncio.run(ask())
    if response.request.url.path == "/v1/chat/completions" and response.request.method == "POST":
        check_response(response)
    if not response.is_success:
        raise Refused(f"{response.status_code}: {response.text}")


def fuzz_upstream(rng) -> None:
    """`abscot serve --upstream` over a server that may not be a vLLM, or not this checkpoint's."""
    model = {"id": "tiny", "object": "model", "max_model_len": 256, "root": f"{FIXED}/model"}
    forced = completion([49], "<endabstract>")
    forced["choices"][0] |= {"logprobs": {"token_logprobs": [0.0], "tokens": ["<endabstract>"]}}
    answers = {"/v1/models": {"object": "list", "data": [model]}, "/v1/completions": forced}
    which, status = rng.choice(list(answers)), rng.choice([200] * 9 + [204, 400, 404, 500, 503])
    wrong = damaged(as_json(mutated(answers[which], rng), rng), rng)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("content-length") or 0))
            reply = wrong if self.path == which else json.dumps(answers.get(self.path, {})).encode()
            self.send_response(status if self.path == which else 200)
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(reply)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            load_chat(ServeArguments(f"{FIXED}/model", upstream=url), url)
        finally:
            server.shutdown()


# Grading

# fmt: off
LATEX = ["\\frac{1}{2}", "3", "-3.5", "1,000", "10^{10}", "\\sqrt{2}", "x^2+1", "(1,2)", "[1,2)", "\\{1,2\\}", "5!",
         "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "1\\pm 2", "x=3", "12_{8}", "50\\%", "\\$3", "\\infty", "\\pi",
         "10^{10^{10}}!", "9^{9^{9^{9}}}", "\\sum_{i=1}^{10^9} i", "\\int_0^1 x^x dx", "\\prod_{k=1}^{99999} k", "1/0",
         "\\binom{10^9}{5}", "10^{999999}", "\\sin(10^{10^{6}})", "\\lim_{x\\to 0} 1/x", "\\log 0", "(x+1)^{500}",
         "2^{2^{2^{2^{5}}}}", "99999!!!", "5 \\text{ cm}", "e^{i\\pi}", "2^{100}!", "x^{x^{x^{x}}}", "0^0", "1=2=5"]
JOINTS = ["\\frac{%s}{%s}", "%s^{%s}", "%s=%s", "%s,%s", "\\sqrt[%s]{%s}", "%s+%s", "%s%s", "\\left(%s\\right)^{%s}"]
NESTS = [("", "1", ""), ("\\frac{", "", ""), ("{", "1", "}"), ("(", "1", ")"), ("", "3", "!"), ("1^{", "1", "}"),
         ("-", "1", ""), ("\\sqrt{", "2", "}"), ("\\frac{1}{1+", "1", "}"), ("1+", "1", ""), ("x_{", "", ""),
         ("\\", "", ""), ("", "9", "9"), ("x", "", ""), ("\\left(", "1", ""), ("\\text{", "1", "}"), ("10^", "3", "")]
FRAMES = ["So \\boxed{%s}.", "The answer is %s.", "%s", "\\boxed{%s", "%s\\boxed{1}", "Answer: %s\n%s", "$%s$"]
# fmt: on


def latex(rng, depth: int = 0) -> str:
    """An answer, or trouble."""
    if depth == 0 and rng.random() < 0.25:
        before, middle, after = rng.choice(NESTS)
        n = rng.choice([30, 100, 160, 10_000])
        return before * n + middle + after * n
    if depth < 3 and rng.random() < 0.5:
        return rng.choice(JOINTS) % (latex(rng, depth + 1), latex(rng, depth + 1))
    return rng.choice(LATEX)


def fuzz_grading(rng) -> None:
    """Responses and golds that are mathematics, or look like it."""
    gold = rng.choice([latex(rng), rng.choice(LATEX), "3"])
    response = rng.choice(FRAMES).replace("%s", latex(rng))
    if rng.random() < 0.2:
        more = [response * 2000, response[: len(response) // 2], response + rng.choice(TEXTS), "\\boxed{" * 20_000]
        response = rng.choice([*more, "answer is " * 50_000])
    source = rng.choice(["math", "gpqa", "hotpotqa", "alpacaeval/x", ""])
    normal_form(extract_answer(response, source), source)
    score(response, gold, source)
    is_correct(response, gold)


KINDS = {  # and the share of each in 100
    "rows": (fuzz_rows, 11),
    "problems": (fuzz_problems, 11),
    "yaml": (fuzz_yaml, 24),
    "recipes": (fuzz_recipes, 7),
    "results": (fuzz_results, 7),
    "answers": (fuzz_answers, 6),
    "splits": (fuzz_splits, 5),
    "traces": (fuzz_traces, 4),
    "manifest": (fuzz_manifest, 7),
    "folders": (fuzz_folders, 4),
    "http": (fuzz_http, 10),
    "upstream": (fuzz_upstream, 2),
    "grading": (fuzz_grading, 2),
}


# The worker and who watches it


def where_in(frames: list[tuple[str, int]]) -> str:
    """The innermost frame of this package, `serving/chat.py:93`; else of the fuzzer."""
    for file, line in reversed(frames):
        if Path(file).is_relative_to(PACKAGE):
            return f"{Path(file).relative_to(PACKAGE)}:{line}"
    return next((f"tests/fuzz.py:{line}" for file, line in reversed(frames) if file == __file__), "?")


def outcome_of(kind: str, function, *arguments) -> tuple[str, str, str, str]:
    """(`succeeded`, `refused` or `violation`; the exception's name; where; why) of a call."""
    try:
        function(*arguments)
    except Refused as refusal:
        return "refused", "", "", str(refusal)
    except BaseException as error:
        if not isinstance(error, SystemExit) or error.code:
            traceback.print_exc(limit=-40)
            frames = [
                (frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__, limit=-2000)
            ]
            where = kind if isinstance(error, Wrong) else where_in(frames)
            return "violation", type(error).__name__, where, " ".join(str(error).split())[:200]
    return "succeeded", "", "", ""


def run_one(kind: str, number: int, root: Path) -> tuple[str, str, str, str]:
    """What becomes of one input, and of the files around it."""
    light_figures(number)
    fill_box(root / "box")
    environment, before = dict(os.environ), stamps(root / "fixed")
    found = outcome_of(kind, KINDS[kind][0], random.Random(f"{kind} {number}"))
    os.environ.clear()
    os.environ.update(environment)
    left = outcome_of(kind, check_box, root / "box", before)
    return left if left[0] == "violation" and found[0] != "violation" else found


DOT = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=")


def light_figures(number: int) -> None:
    """A figure is drawn, but only for one input of thirty put to paper: that takes two seconds a report."""
    from matplotlib.figure import Figure

    if not hasattr(Figure, "to_paper"):
        Figure.to_paper = Figure.savefig

    def savefig(self, file, *args, **settings):
        if number % 30 == 0:
            self.to_paper(file, *args, **settings)
        elif hasattr(file, "write"):
            file.write(DOT)
        else:
            Path(file).write_bytes(DOT)

    Figure.savefig = savefig


def in_silence(root: Path) -> int:
    """What is said goes to a file."""
    log = os.open(root / "log", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    return log


def worker(connection, kind: str, numbers: list[int], root: Path) -> None:
    """Runs inputs one after another and says before and after each where it is."""
    log, stacks = in_silence(root), open(root / "stacks", "w")
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=False)
    for number in numbers:
        connection.send((number, None))
        result = run_one(kind, number, root)
        os.ftruncate(log, 0)
        connection.send((number, result))
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(0)


def used(process: psutil.Process) -> tuple[float, int]:
    """Processor seconds and bytes of a process and its children."""
    seconds = size = 0
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.Error):
            times = one.cpu_times()
            seconds += times.user + times.system
            size += one.memory_full_info().pss  # what forks share counts once
    return seconds, size


def stack_of(pid: int, root: Path) -> str:
    """Where a worker is that hangs or grows."""
    os.kill(pid, signal.SIGUSR1)
    time.sleep(0.5)
    lines = [line.split('"') for line in (root / "stacks").read_text().splitlines() if line.startswith("  File ")]
    return where_in([(file, int(rest.split()[2])) for _, file, rest in reversed(lines)])


def watch(here, process, results: dict, root: Path) -> None:
    """Collects what a worker says, until it has ended or must be."""
    watched, current, begun, base = psutil.Process(process.pid), None, 0.0, None
    try:
        while True:
            if here.poll(0.05):
                number, result = here.recv()
                if result is None:
                    current, begun, base = number, time.monotonic(), None
                else:
                    results[number], current = result, None
                continue
            base = base or used(watched)
            seconds, size = (now - then for now, then in zip(used(watched), base, strict=True))
            clock = time.monotonic() - begun
            if current is not None and (seconds > SECONDS or clock > CLOCK or size > BYTES):
                words = f"{size / 1e9:.1f} GB" if size > BYTES else f"{seconds:.0f} s, {clock:.0f} s by the clock"
                name = "memory" if size > BYTES else "hang"
                results[current] = ("violation", name, stack_of(process.pid, root), words)
                break
    except (EOFError, ConnectionError, psutil.NoSuchProcess):
        process.join(5)
        if current is not None:
            results[current] = ("violation", "died", "?", f"exit code {process.exitcode}")
    with suppress(psutil.NoSuchProcess):
        for one in [*watched.children(recursive=True), watched]:
            with suppress(psutil.Error):
                one.kill()
    process.join()


def run_kind(kind: str, numbers: list[int], root: Path) -> dict[int, tuple[str, str, str, str]]:
    """All inputs of a kind, in as many workers as it takes."""
    results, context = {}, multiprocessing.get_context("fork")
    while len(results) < len(numbers):
        here, there = context.Pipe()
        process = context.Process(target=worker, args=(there, kind, numbers[len(results) :], root))
        process.start()
        there.close()
        watch(here, process, results, root)
        here.close()
    return results


@dataclass
class Findings:
    """Results by kind and number."""

    results: dict[str, dict[int, tuple[str, str, str, str]]] = field(default_factory=dict)

    def violations(self) -> dict[tuple[str, str], list[tuple[str, int, str]]]:
        """By (exception, where): the inputs that show it, the smallest number first."""
        found = defaultdict(list)
        for kind, results in self.results.items():
            for number, (outcome, name, where, why) in sorted(results.items()):
                if outcome == "violation":
                    found[f"{name}: {why}" if name == "Wrong" else name, where].append((kind, number, why))
        return found

    def __str__(self) -> str:
        lines = ["| kind | inputs | succeeded | refused | violations |", "|---|---:|---:|---:|---:|"]
        names, total = ("succeeded", "refused", "violation"), Counter()
        for kind, results in [*self.results.items(), ("all", None)]:
            counts = total if results is None else Counter(outcome for outcome, *_ in results.values())
            lines.append(f"| {kind} | {counts.total()} | " + " | ".join(str(counts[name]) for name in names) + " |")
            total = total + counts
        found = self.violations()
        lines += ["", f"{len(found)} distinct violations:", ""]
        lines += ["| exception | where | times | kind and number | reason |", "|---|---|---:|---|---|"]
        for (name, where), inputs in sorted(found.items(), key=lambda item: (item[0][1], item[0][0])):
            kind, number, why = inputs[0]
            why = "" if name.startswith("Wrong") else why[:120].replace("|", "/")
            lines.append(f"| {name} | {where} | {len(inputs)} | {kind} {number} | {why} |")
        wordy = [
            f"{kind} {number} ({len(why)})"
            for kind, results in self.results.items()
            for number, (outcome, *_, why) in sorted(results.items())
            if outcome == "refused" and len(why) > WORDY
        ]
        if wordy:
            lines += ["", f"{len(wordy)} refusals of over {WORDY} characters: {', '.join(wordy[:12])}"]
        return "\n".join(lines)


def fixed_inputs() -> Path:
    """A new folder with the valid inputs, built in a process of its own: the workers are forks of this one."""
    import matplotlib.figure  # noqa: F401 (once, here)
    import trl.generation.vllm_client  # noqa: F401

    root = Path(tempfile.mkdtemp(prefix="abscot-fuzz-"))
    builder = multiprocessing.get_context("fork").Process(target=lambda: (in_silence(root), build(root)))
    builder.start()
    builder.join()
    if builder.exitcode:
        raise RuntimeError((root / "log").read_text()[-3000:])
    return root


def fuzz(count: int, seed: int = 0, kinds: list[str] | None = None, progress: bool = False) -> Findings:
    """`count` inputs over `kinds`, numbered from `seed` million on, in a temporary folder."""
    kinds, findings, root = kinds or list(KINDS), Findings(), fixed_inputs()
    shares = sum(KINDS[kind][1] for kind in kinds)
    try:
        for kind in kinds:
            start, n = time.monotonic(), math.ceil(count * KINDS[kind][1] / shares)
            findings.results[kind] = run_kind(kind, list(range(seed * 10**6, seed * 10**6 + n)), root)
            if progress:
                print(f"{kind}: {n} inputs, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="numbers begin at so many millions")
    parser.add_argument("--count", type=int, default=10_000, help="inputs over all kinds, or of the kinds given")
    parser.add_argument("--kind", nargs="+", choices=KINDS)
    parser.add_argument("--show", type=int, metavar="NUMBER", help="one input again, in this process; nothing ends it")
    args = parser.parse_args()
    if args.show is None:
        findings = fuzz(args.count, args.seed, args.kind, progress=True)
        print(findings)
        sys.exit(bool(findings.violations()))
    root = fixed_inputs()
    outcome, name, where, why = run_one(args.kind[0], args.show, root)
    print(f"\n{args.kind[0]} {args.show}: {outcome} {name} {where} {why[:3000]}\nits files: {root / 'box'}")


if __name__ == "__main__":
    main()
