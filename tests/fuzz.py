"""
Hostile inputs to everything that this package reads, each made by a seeded mutation of a valid one.

    python tests/fuzz.py --seed 0 --count 10000             # all kinds, in their shares; exits 1 if anything was found
    python tests/fuzz.py --kind http --count 500
    python tests/fuzz.py --kind http --show 17              # number 17 again, with its traceback

An input may succeed, or be refused (`Refused`; over HTTP a 4xx or 502 in OpenAI's form). Anything else is a violation:
another exception, over 10 s of processor time (or 30 s by the clock), over 2 GB of memory, a file that was changed
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
from threading import Thread

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import httpx
import psutil
import pyarrow
import pyarrow.parquet
import yaml
from conftest import tiny_model

import abscot_trl
from abscot_trl.checkpoint import extend_model, save_checkpoint
from abscot_trl.data.toy import chain_arithmetic, toy_tokenizer
from abscot_trl.errors import Refused
from abscot_trl.phases import PHASES, parse
from abscot_trl.vocabulary import AbstractVocabulary

SECONDS, CLOCK, BYTES = 10, 30, 2 * 10**9
WORDY = 2000  # characters of a refusal that nobody reads
PACKAGE = Path(abscot_trl.__file__).parent
FIXED = "../fixed"  # of the box that an input runs in


class Wrong(Exception):
    """What the target did is not what it promises."""


# Hostile values


DEEP = {"@[@": "[" * 100_000 + "]" * 100_000, "@{@": '{"a":' * 100_000 + "1" + "}" * 100_000, "@9@": "9" * 5000}
NUMBERS = [0, -1, 1, 3, 2**31, 2**63, 10**400, -0.0, 0.5, 1e308, 1e-320, math.inf, -math.inf, math.nan, True, False]
TEXTS = [
    "",
    " ",
    "x",
    "0",
    "1",
    "-1",
    "nan",
    "1e999",
    "null",
    "a\x00b",
    "\ud800",
    "é\u202e\u2028\x85",
    "\U0001f600" * 9,
]
TEXTS += [
    "sub",
    ".",
    "./",
    "loop",
    "none/such",
    "rows.jsonl",
    f"{FIXED}/model",
    "<script>&|`[x](y)",
    "{{7*7}}{% for",
    "%s{0}",
]
TEXTS += [
    "<beginabstract><TOKEN_A>",
    "<think>",
    "</think>",
    "\\boxed{",
    "auto",
    "all",
    "own",
    "hotpotqa",
    "http://[",
    "=1+1",
]
SHAPES = [None, [], {}, [[]], [None], [0], ["x"], {"": None}, {"a": {"b": [1]}}, [1, "x", None, {}], {"x": math.nan}]
HUGE = ["@[@", "@{@", "@9@", "y" * 1_000_000, "\\frac{" * 10_000, "(" * 10_000, list(range(50_000)), ["x"] * 10_000]


def atom(rng):
    """Any value where another is wanted."""
    return rng.choice(rng.choices([NUMBERS, TEXTS, SHAPES, HUGE], [8, 8, 5, 1])[0])


def near(value, rng):
    """A value of another type or size that looks like `value`."""
    tries = [[value], {"a": value}, [value, value], str(value)[:10_000], None]
    if isinstance(value, str):
        tries += [
            value + rng.choice(TEXTS),
            rng.choice(TEXTS) + value,
            value[: len(value) // 2],
            value * 3,
            len(value),
        ]
    elif isinstance(value, (int, float)) and value == value:
        tries += [-value, value + 1, value * 10**9, float(value), str(value)]
    return rng.choice(tries)


def mutated(value, rng):
    """`value` with one thing wrong somewhere in it."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        keys, chance = list(value) if isinstance(value, dict) else list(range(len(value))), rng.random()
        key, new = rng.choice(keys), value.copy()
        if chance < 0.1:
            new.pop(key)
        elif chance < 0.2 and isinstance(value, dict):
            new[
                rng.choice(["x", "", "id", "env", "model", "\ud800", "a\x00", "trust_remote_code", *map(str, keys)])
            ] = atom(rng)
        elif chance < 0.25 and isinstance(value, dict):
            new[rng.choice(["x", key + "_", "gold", "answer"])] = new.pop(key)
        elif chance < 0.3 and isinstance(value, list):
            new.insert(key, rng.choice([atom(rng), value[0], value[-1]]))
        else:
            new[key] = mutated(value[key], rng)
        return new
    return atom(rng) if rng.random() < 0.7 else near(value, rng)


def as_json(value, rng) -> str:
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7)
    for mark, raw in DEEP.items():
        text = text.replace(f'"{mark}"', raw)
    return text


def damaged(text: str, rng, chance: float = 0.15) -> bytes:
    """The bytes of a text, at times not whole, not UTF-8 or with more in it."""
    content = text.encode("utf-8", "surrogatepass")
    if rng.random() > chance:
        return content
    at = rng.randrange(len(content) + 1)
    twice = content.replace(b": ", b': 1, "id": ', 1)
    inside = rng.choice(
        [b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\r\n", b"\n\n", b"\x1b[2J", b"{", b'"', b"\\u12", b"NaN", b","]
    )
    whole = [
        b"",
        b"\n",
        b" ",
        b"null",
        b"[]",
        b"{}",
        b"0",
        b'"x"',
        b"\x00" * 99,
        rng.randbytes(200),
        b"\xef\xbb\xbf" + content,
    ]
    whole += [
        content[:at],
        content + content,
        content[at:],
        text.encode("utf-16", "replace"),
        twice,
        content + b"\x00",
    ]
    whole += [
        content.replace(b"\n", b"\r\n"),
        content.replace(b"\n", b"\r"),
        content.replace(b'"', b"'"),
        content.rstrip(),
    ]
    whole += [content[:at] + inside + content[at:]] * 6
    return rng.choice(whole)


def put(path: str, content: bytes, rng) -> str:
    """A file where `path` says; at times a folder, a dangling link, a loop, a pipe, or nothing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        path.unlink()
    kind = rng.choices(["file", "folder", "dangling", "loop", "pipe", "nothing"], [60, 1, 1, 1, 1, 1])[0]
    if kind == "file":
        path.write_bytes(content)
    elif kind == "folder":
        path.mkdir()
        (path / "inside.jsonl").write_bytes(content)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "nothing":
        path.symlink_to("none/such" if kind == "dangling" else path.name)
    return str(path)


# YAML


RAW = ["!!python/object/apply:os.system ['touch pwned']", "!!python/name:os.system", "&a [*a]", "&a {k: *a}", "*none"]
RAW += [
    "2024-01-01",
    "2024-99-99",
    "!!timestamp x",
    "0o17",
    "017",
    "190:20:30",
    "1_000",
    "0x1F",
    ".inf",
    ".nan",
    "-.inf",
    "yes",
]
RAW += [
    "!!int ''",
    "!!float ''",
    "!!binary x",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!pairs [a]",
    "!!str 1",
    "!!bool 2",
    "!!null x",
]
RAW += [
    "{? [a, b] : c}",
    "{[1]: 2}",
    "{1: 2, null: 3}",
    "{<<: [1]}",
    "{<<: {a: 1}, a: 2}",
    "{a: 1, a: 2}",
    "@x",
    "%TAG",
    "\t1",
    "- -",
]
RAW += [
    "|\n  block",
    ">-\n  folded",
    "[1, 2",
    "{a: ",
    "'x",
    '"\\q"',
    "1e5",
    "2e-5",
    "+1",
    "~",
    "=",
    "<<",
    "&b",
    "? x",
    "[" * 100_000,
]
RAW += ["[" * 500 + "]" * 500, "1:" * 2000, "9" * 5000, "*laugh", "*laugh", "- " * 3000]
LAUGH = ["x0: &l0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
LAUGH += [f"x{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 9)]


def as_yaml(settings, rng) -> str:
    """One line a field, as JSON is YAML too; one field may be YAML's own trouble."""
    if not isinstance(settings, dict):
        return as_json(settings, rng)
    lines = {
        key: as_json(value, rng).replace("Infinity", ".inf").replace("NaN", ".nan") for key, value in settings.items()
    }
    if lines and rng.random() < 0.3:
        lines[rng.choice(list(lines))] = rng.choice(RAW)
    text = [f"{key if key.isidentifier() else json.dumps(key)}: {value}" for key, value in lines.items()]
    if "*laugh" in lines.values():
        text = [*LAUGH, *(line.replace("*laugh", "*l8") for line in text)]
    if rng.random() < 0.05:
        text.insert(
            rng.randrange(len(text) + 1),
            rng.choice(["---", "...", "<<: *x", "<<: {seed: 1}", "%YAML 9.9", "- x", "? ", "\tx: 1"]),
        )
    return "\n".join(text) + "\n"


# The box


SALT = {
    name: f"foreign: {name}\n".encode()
    for name in (".notes.2024", "report.md", "train.jsonl", "test.jsonl", "mine.arrow")
}
SALT |= {name: f"foreign: {name}\n".encode() for name in ("sub/.backup.2024-11-01.tar", "sub/checkpoint-7/notes.txt")}
SALT |= {
    name: f"foreign: {name}\n".encode() for name in ("sub/evaluate.yaml", "out.parts/.hidden", "new.judge/notes.txt")
}
SALT |= {
    name: f"foreign: {name}\n".encode()
    for name in ("run/.notes.2024", "run/sub/.a.1", "run/round1/.distill-mine/notes")
}
OUTPUTS = [
    "new",
    "new",
    "new",
    "new",
    "deep/er",
    "empty",
    ".",
    "./",
    "link",
    "link/",
    "loop",
    "sub",
    "sub/..",
    "report.md",
    "out",
]
OUTPUTS += ["", "report.md/x", "n" * 300, "a\x00b", "new\n", "é\ud800", " "]


def fill_box(box: Path) -> None:
    """The folder that an input runs in, with nothing in it but files that are not ours."""
    shutil.rmtree(box, ignore_errors=True)
    for name, content in SALT.items():
        (box / name).parent.mkdir(parents=True, exist_ok=True)
        (box / name).write_bytes(content)
    (box / "empty").mkdir()
    (box / "link").symlink_to("sub")
    (box / "loop").symlink_to("loop")
    os.chdir(box)


def check_box(box: Path, before: list) -> None:
    """Raises `Wrong` if a foreign file of the box, or one of the fixed inputs, is not what it was."""
    os.chdir(box)
    for name, content in SALT.items():
        path = box / name
        if not path.is_file() or path.read_bytes() != content:
            raise Wrong(f"foreign file {'changed' if path.is_file() else 'gone'}: {name}")
    if not ((box / "link").is_symlink() and (box / "loop").is_symlink()):
        raise Wrong("foreign link gone")
    if stamps(box.parent / "fixed") != before:
        shutil.rmtree(box.parent / "fixed")
        shutil.copytree(box.parent / "spare", box.parent / "fixed", symlinks=True)
        raise Wrong("an input was changed")


def stamps(folder: Path) -> list:
    found = []
    for path, _, names in os.walk(folder):
        for name in sorted(names):
            stat = os.lstat(os.path.join(path, name))
            found.append((os.path.relpath(os.path.join(path, name), folder), stat.st_size, stat.st_mtime_ns))
    return found


TRAINING = {"max_length": 128, "max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "bf16": False}
TRAINING |= {
    "use_cpu": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}
EVALUATION = {
    "problems": f"{FIXED}/rows.jsonl",
    "instruction": False,
    "max_new_tokens": 4,
    "limit": 4,
    "task": "chain",
}
WARMUP = {"run_dir": "run", "model": f"{FIXED}/model", "data": f"{FIXED}/data", "launch": "inline", "rounds": 1}
WARMUP |= {"rows_per_phase": 4, "seed": 0, "initial": "uniform", "evaluate": f"{FIXED}/evaluate.yaml"}
WARMUP |= {phase: f"{FIXED}/{phase}.yaml" for phase in ("bottleneck", "distill")}


def problem_rows() -> list[dict]:
    return [{**asdict(row), "prompt": row.prompt[0]["content"]} for row in chain_arithmetic(12, 2, 5, seed=0)]


def build(root: Path) -> None:
    """The valid inputs, in `root/fixed`: model, rows, prepared data, traces, an evaluation, a finished warm-up."""
    from abscot_trl.evaluation import evaluate as evaluation
    from abscot_trl.loop.warmup import WarmupArguments, warmup
    from abscot_trl.phases import run_phase

    fixed = root / "fixed"
    (fixed / "model").mkdir(parents=True)
    fill_box(root / "box")
    tokenizer, vocabulary, model = toy_tokenizer(), AbstractVocabulary(8, 1, 6), tiny_model(vocabulary=40)
    vocabulary.extend(tokenizer)
    extend_model(model, vocabulary.all_ids(tokenizer))
    save_checkpoint(model, tokenizer, vocabulary, fixed / "model")
    (fixed / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problem_rows()))
    for phase in ("bottleneck", "distill"):
        (fixed / f"{phase}.yaml").write_text(yaml.safe_dump(TRAINING))
    (fixed / "evaluate.yaml").write_text(yaml.safe_dump(EVALUATION | {"swaps": ["own", "other"]}))
    arguments = {"data": f"{FIXED}/rows.jsonl", "data_format": "problems", "tokenizer": f"{FIXED}/model"}
    run_phase("data", flags(arguments | {"output_dir": f"{FIXED}/data"}))
    arguments = {"model": f"{FIXED}/model", "data": f"{FIXED}/data", "method": "uniform"}
    run_phase("traces", flags(arguments | {"output_dir": f"{FIXED}/traces"}))
    arguments = EVALUATION | {"model": f"{FIXED}/model", "config": f"{FIXED}/evaluate.yaml"}
    run_phase("evaluate", flags(arguments | {"output_dir": f"{FIXED}/evaluation"}))
    join, evaluation.Evaluation.join = evaluation.Evaluation.join, lambda self: None  # killed before it joined them
    run_phase("evaluate", flags(arguments | {"output_dir": f"{FIXED}/unfinished"}))
    evaluation.Evaluation.join = join
    shutil.rmtree("run")
    warmup(WarmupArguments(**WARMUP))
    shutil.copytree("run", fixed / "run")
    shutil.copytree(fixed, root / "spare", symlinks=True)


def flags(settings: dict) -> list[str]:
    parts = ((f"--{key}", *map(str, value if isinstance(value, list) else [value])) for key, value in settings.items())
    return [part for parts_of_one in parts for part in parts_of_one]


def copied(name: str, to: str) -> None:
    """A copy of one of the fixed inputs, beside what is foreign there."""
    shutil.copytree(f"{FIXED}/{name}", to, dirs_exist_ok=True)


# The kinds: each makes one input from `rng` and gives it to what the command calls


TOY = problem_rows()
DOLCI = [
    {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": f"<think>{row['cot']}</think>{row['answer']}"},
        ],
        "dataset_source": "toy",
        "id": row["id"],
    }
    for row in TOY
]
PROBLEMS = [
    TOY,
    [{"question": "How many?", "answer": "1+1 = <<1+1=2>>2\n#### 2"}] * 3,
    [{"problem": "What?", "solution": "So \\boxed{4}.", "answer": "4", "unique_id": "test/1.json"}] * 2,
    [{"problem": "What?", "answer": 4, "id": 3}],
    [{"question": "Who?", "context": {"title": ["A"], "sentences": [["b. ", "c."]]}, "answer": "d", "id": "h"}] * 2,
    [{"Question": "Which?", "Correct Answer": "a", **{f"Incorrect Answer {i}": str(i) for i in (1, 2, 3)}}] * 2,
    [{"instruction": "Say x.", "dataset": "helpful_base", "output": "x", "generator": "y"}] * 2,
]


def rows_file(rows: list[dict], suffix: str, rng) -> str:
    """Rows, some of them mutated, in one of the formats that are read."""
    rows = [mutated(row, rng) if rng.random() < 0.4 else row for row in rows]
    if suffix == ".parquet":
        with suppress(Exception):  # Arrow has no columns of several types
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink := io.BytesIO())
            content, at = sink.getvalue(), rng.randrange(400)
            if rng.random() < 0.4:
                content = rng.choice(
                    [
                        content[:-at],
                        content[at:],
                        content[:at] + b"\xff" * 9 + content[at + 9 :],
                        b"PAR1",
                        content[:-4],
                    ]
                )
            return put("rows.parquet", content, rng)
    if suffix == ".csv":
        text = (
            "\n".join(
                ",".join('"' + str(cell).replace('"', '""') + '"' for cell in line)
                for line in [rows[0], *map(dict.values, (r for r in rows if isinstance(r, dict)))]
                if line
            )
            if isinstance(rows[0], dict)
            else "x"
        )
    else:
        lines = [as_json(row, rng) for row in rows]
        text = f"[{','.join(lines)}]" if suffix == ".json" else "\n".join(lines) + "\n"
    return put(f"rows{'.jsonl' if suffix == '.parquet' else suffix}", damaged(text, rng), rng)


def fuzz_rows(rng) -> None:
    """`abscot data` on mutated rows."""
    dolci = rng.random() < 0.6
    settings = {
        "data": [
            rows_file(
                rng.choice([DOLCI, DOLCI[:1]]) if dolci else rng.choice(PROBLEMS[:4]),
                rng.choice([".jsonl", ".jsonl", ".parquet"]),
                rng,
            )
        ]
    }
    settings |= {
        "tokenizer": f"{FIXED}/model",
        "output_dir": rng.choice(OUTPUTS),
        "data_format": "dolci" if dolci else "problems",
    }
    more = {
        "shuffle_buffer": 0,
        "limit": 2,
        "max_total_tokens": 30,
        "overlong": "cut_cot_middle",
        "sources": ["toy"],
        "max_cot_tokens": 4,
    }
    settings |= {key: more[key] for key in rng.sample(list(more), 2)}
    if rng.random() < 0.1:
        settings["data"] = rng.choice(
            [
                ["."],
                ["sub"],
                ["loop"],
                ["empty"],
                ["none"],
                ["a/b"],
                [""],
                settings["data"] * 2,
                ["rows.jsonl", "a\x00"],
            ]
        )
    function, classes = PHASES["data"]
    function(classes[0](**settings))


def fuzz_problems(rng) -> None:
    """The problems of an evaluation, up to its first answer."""
    from abscot_trl.data.problems import load_problems, with_instruction
    from abscot_trl.evaluation.evaluate import check_problems

    path = rows_file(rng.choice(PROBLEMS), rng.choice([".jsonl", ".json", ".csv", ".parquet"]), rng)
    problems = load_problems(path, limit=rng.choice([None, 1]))
    args = PHASES["evaluate"][1][0](model=f"{FIXED}/model", problems=path, output_dir="new")
    check_problems(problems, args)
    for problem in problems:
        with_instruction(problem, "verbal")


@cache
def argument_classes() -> dict[str, tuple[type, ...]]:
    """The fields of every command."""
    from abscot_trl.evaluation.alpaca import AlpacaArguments
    from abscot_trl.loop.baselines import BaselinesArguments
    from abscot_trl.loop.plan import PlanArguments
    from abscot_trl.loop.sweep import SweepArguments
    from abscot_trl.loop.warmup import WarmupArguments
    from abscot_trl.report.report import ReportArguments
    from abscot_trl.scripts.demo import DemoArguments

    more = (
        AlpacaArguments,
        BaselinesArguments,
        PlanArguments,
        SweepArguments,
        WarmupArguments,
        ReportArguments,
        DemoArguments,
    )
    return {name: classes for name, (_, classes) in PHASES.items()} | {cls.__name__: (cls,) for cls in more}


def plausible(one, rng):
    """A value of the kind that a field's annotation names."""
    kind = str(one.type)
    if one.metadata.get("choices"):
        return rng.choice(one.metadata["choices"])
    if "bool" in kind:
        return rng.random() < 0.5
    if "list" in kind:
        return rng.choice([["abstract"], ["own", "other"], ["x"], ["sft"], [f"{FIXED}/rows.jsonl"]])
    return (
        1
        if "int" in kind
        else 0.5
        if "float" in kind
        else {"a": 1}
        if "dict" in kind
        else rng.choice(["x", "hf", "http://x", f"{FIXED}/model"])
    )


def fuzz_yaml(rng) -> None:
    """The fields of any phase, from a recipe and a command line."""
    classes = rng.choice(list(argument_classes().values()))
    found = {one.name: one for cls in classes for one in fields(cls) if one.init}
    required = [name for name, one in found.items() if one.default is MISSING and one.default_factory is MISSING]
    # what would reach out of the box or leave threads behind is not asked for
    others = sorted(
        found.keys() - {*required, "push_to_hub", "report_to", "deepspeed", "local_rank", "python", "torch_compile"}
    )
    settings = {name: plausible(found[name], rng) for name in [*required, *rng.sample(others, min(len(others), 4))]}
    if "output_dir" in found:
        settings["output_dir"] = "new"
    content = damaged(as_yaml(mutated(settings, rng) if rng.random() < 0.8 else settings, rng), rng, 0.1)
    arguments = ["--config", put("recipe.yaml", content, rng)]
    if rng.random() < 0.2:
        name = rng.choice(list(found))
        arguments += rng.choice(
            [
                [f"--{name}"],
                [f"--{name}", str(atom(rng))[:9999]],
                ["--config"],
                ["--config", rng.choice(TEXTS)],
                ["x"],
                ["--", "x"],
                [f"--{name}={atom(rng)!s:.99}"],
                ["--config=recipe.yaml"],
                ["--no_such", "1"],
            ]
        )
    parse(classes, arguments)


def fuzz_recipes(rng) -> None:
    """A warm-up, its baselines or its plan, dry, with recipes that are wrong."""
    from abscot_trl.loop.baselines import BaselinesArguments, baselines
    from abscot_trl.loop.plan import PlanArguments, describe_plan, plan
    from abscot_trl.loop.warmup import WarmupArguments, warmup

    recipes = {"bottleneck": dict(TRAINING), "distill": dict(TRAINING), "evaluate": EVALUATION | {"swaps": ["own"]}}
    recipes["accelerate"] = {
        "distributed_type": "MULTI_CPU",
        "num_processes": 2,
        "deepspeed_config": {"zero_stage": 2},
        "use_cpu": True,
    }
    recipes["warmup"] = (
        WARMUP | {"name": "x", "accelerate_config": "accelerate.yaml"} | {k: f"{k}.yaml" for k in list(recipes)[:3]}
    )
    which = rng.choice(list(recipes))
    more = {
        "packing": True,
        "global_batch_size": 4,
        "use_peft": True,
        "lora_r": 4,
        "lora_target_modules": "all-linear",
        "num_train_epochs": 1.5,
        "warmup_steps": 3,
        "save_total_limit": 1,
    }
    if which in ("bottleneck", "distill"):
        recipes[which] |= {key: more[key] for key in rng.sample(list(more), 3)}
    for name, recipe in recipes.items():
        text = as_yaml(mutated(recipe, rng), rng) if name == which else yaml.safe_dump(recipe)
        put(
            f"{name}.yaml",
            damaged(text, rng, 0.05) if name == which else text.encode(),
            rng if name == which else random.Random(1),
        )
    cls, function = rng.choice(
        [
            (WarmupArguments, warmup),
            (PlanArguments, lambda args: describe_plan(plan(args))),
            (BaselinesArguments, baselines),
        ]
    )
    arguments = ["--config", "warmup.yaml"] + (
        ["--names", "sft", "base", "--recipes", str(PACKAGE.parent / "recipes" / "baselines")]
        if cls is BaselinesArguments
        else []
    )
    (args,) = parse((cls,), arguments)
    args.dry_run = True
    function(args)


@cache
def fixed_text(name: str) -> str:
    return Path(FIXED, name).read_text()


def result_rows() -> list[dict]:
    """Rows with every figure that a row may hold."""
    rows = json.loads(fixed_text("evaluation/results.json"))
    more = dict.fromkeys(("em", "maj", "pass"), 50.0) | {
        f"{name}_ci95": [40.0, 60.0] for name in ("em", "maj", "pass")
    }
    rows += [row | more | {"round": 2, "task": "hotpotqa", "metric": "f1", "samples": 2} for row in rows]
    verbal = rows[0] | {"mode": "verbal", "model": "base", "round": 1}
    return [
        *rows,
        verbal,
        rows[0] | {"stage": "round1/distill", "round": 1, "truncated": 2},
        rows[0] | {"metric": "lc_win_rate", "win_rate": 50.0, "win_rate_ci95": [1, 2]},
    ]


def run_report(rng, runs: list[str]) -> None:
    from abscot_trl.report.report import ReportArguments, report

    title, chance = rng.choice(["Results", *TEXTS]), rng.choice([None, None, 20.0, 0, 100])
    report(ReportArguments(runs, rng.choice([None, *OUTPUTS]), title, chance))


def fuzz_results(rng) -> None:
    """`abscot report` on a mutated results.json."""
    rows = result_rows()
    rows = rng.choice([rows, rows[:1], rng.sample(rows, 4)])
    path = put("results/results.json", damaged(as_json(mutated(rows, rng), rng), rng, 0.1), rng)
    other = put("other/results.json", as_json(rows, rng).encode(), random.Random(1))
    run_report(
        rng, rng.choice([["results"], [path], ["results", "other"], [other, path], ["results", "results"], ["."]])
    )


def fuzz_answers(rng) -> None:
    """`abscot report`, and a warm-up's comparison of rounds, on mutated answers."""
    from abscot_trl.evaluation.statistics import own_scores

    copied("evaluation", "evaluation")
    lines = [json.loads(line) for line in fixed_text("evaluation/answers.jsonl").splitlines()]
    for _ in range(rng.choice([1, 1, 3])):
        at = rng.randrange(len(lines))
        lines[at] = mutated(lines[at], rng)
    if rng.random() < 0.1:  # every answer alike in one thing
        key, value = rng.choice(["trace", "answer", "gold", "id", "task", "score", "sample"]), atom(rng)
        lines = [line | {key: value} if isinstance(line, dict) else line for line in lines]
    text = "\n".join(as_json(line, rng) for line in lines) + "\n"
    path = put("evaluation/answers.jsonl", damaged(text, rng, 0.1), rng)
    with suppress(Refused):
        if Path(path).is_file():
            own_scores(Path(path))
    run_report(rng, ["evaluation"])


def fuzz_splits(rng) -> None:
    """Traces, a warm-up and baselines by a mutated splits.json."""
    from abscot_trl.loop.warmup import WarmupArguments, warmup

    content = json.loads(fixed_text("run/splits.json"))
    path = put(
        "splits.json" if (dry := rng.random() < 0.3) is False else "run/splits.json",
        damaged(as_json(mutated(content, rng), rng), rng),
        rng,
    )
    if dry:
        warmup(WarmupArguments(**WARMUP, dry_run=True))
        return
    settings = {"model": f"{FIXED}/model", "data": f"{FIXED}/data", "output_dir": rng.choice(OUTPUTS), "splits": path}
    function, classes = PHASES["traces"]
    part = rng.choice(["1.bottleneck", "1.distill", "2.distill", "", "x"])
    function(classes[0](**settings, part=part, method=rng.choice(["uniform", "cycle", "power_law"])))


def fuzz_traces(rng) -> None:
    """Mutated traces.jsonl: their rows, and at times a training phase on them."""
    from transformers import AutoTokenizer

    from abscot_trl.traces.files import read_traces

    records = [json.loads(line) for line in fixed_text("traces/traces.jsonl").splitlines()]
    for _ in range(rng.choice([0, 1, 1, 2])):
        at = rng.randrange(len(records))
        records[at] = mutated(records[at], rng)
    text = "\n".join(as_json(record, rng) for record in records) + "\n"
    path = put("traces/traces.jsonl", damaged(text, rng), rng)
    if rng.random() < 0.75:
        ids = [row["id"] for row in TOY] if rng.random() < 0.1 else data_ids()
        read_traces(rng.choice(["traces", "traces", "traces", path]), ids, AbstractVocabulary.load(f"{FIXED}/model"))
        return
    AutoTokenizer.from_pretrained(f"{FIXED}/model")
    phase, data = (
        rng.choice(["bottleneck", "distill", "baseline"]),
        rng.choice([f"{FIXED}/data"] * 9 + ["none", "sub", ""]),
    )
    settings = TRAINING | {
        "data": data,
        "output_dir": rng.choice(OUTPUTS),
        "model_name_or_path": rng.choice([f"{FIXED}/model"] * 9 + ["none", "sub"]),
    }
    settings |= rng.choice(
        [{}, {}, {"resume_from_checkpoint": "true"}, {"learning_rate": 1e30}, {"max_length": 8}, {"packing": True}]
    )
    settings |= (
        {"splits": f"{FIXED}/run/splits.json"}
        if phase == "baseline"
        else {"traces": rng.choice(["traces"] * 9 + ["none", "sub", path])}
    )
    put("train.yaml", as_yaml(settings, random.Random(1)).encode(), random.Random(1))
    function, classes = PHASES[phase]
    function(*parse(classes, ["--config", "train.yaml"]))


@cache
def data_ids() -> list[str]:
    from abscot_trl.data.prepare import load_prepared

    return list(load_prepared(f"{FIXED}/data")[0]["id"])


def damage_file(path: Path, rng) -> None:
    """One of our files, mutated as what it is."""
    text = path.read_bytes()
    if path.suffix == ".json":
        content = damaged(as_json(mutated(json.loads(text), rng), rng), rng, 0.2)
    elif path.suffix == ".jsonl":
        lines = text.decode().splitlines()
        at = rng.randrange(len(lines))
        lines[at] = as_json(mutated(json.loads(lines[at]), rng), rng)
        content = damaged("\n".join(lines) + "\n", rng, 0.3)
    elif path.suffix == ".arrow":
        at = rng.randrange(len(text))
        content = rng.choice([b"", text[:at], text[:at] + rng.randbytes(9) + text[at + 9 :], rng.randbytes(99)])
    else:
        lines = [
            rng.choice([line, line, line, line.replace(",", rng.choice([";", ",x"]), 1), str(atom(rng))[:9999], ""])
            for line in text.decode().split("\n")
        ]
        content = damaged("\n".join(lines), rng, 0.3)
    put(path, content, rng)


def fuzz_manifest(rng) -> None:
    """A finished run, prepared data, a checkpoint or unfinished parts with one damaged file; the command again."""
    from abscot_trl.data.prepare import load_prepared
    from abscot_trl.loop.baselines import BaselinesArguments, baselines
    from abscot_trl.loop.plan import PlanArguments, plan
    from abscot_trl.loop.sweep import SweepArguments, models
    from abscot_trl.loop.warmup import WarmupArguments, warmup

    kind = rng.choice(["run", "run", "run", "killed", "data", "parts", "shards", "vocabulary", "outputs"])
    if kind in ("run", "killed"):
        copied("run", "run")
        ours = [
            path
            for path in sorted(Path("run").rglob("*"))
            if path.is_file() and path.suffix in (".json", ".jsonl", ".csv", ".md", ".yaml")
        ]
        ours = [
            path
            for path in ours
            if "oken" not in path.name and path.name not in ("config.json", "generation_config.json", "README.md")
        ]
        ours = [
            path
            for path in ours
            if path.relative_to("run").as_posix() not in {name.removeprefix("run/") for name in SALT}
        ]
        manifests = [path for path in ours if path.name == "manifest.json"]
        if kind == "killed":  # after its work, before its manifest
            path = rng.choice(manifests)
            running = path.parent.with_name(path.parent.name + ".running")
            path.replace(running)
            content = json.loads(running.read_text()) | {"attempt": 1}
            put(running, damaged(as_json(mutated(content, rng), rng), rng, 0.1), rng)
            warmup(WarmupArguments(**WARMUP))
            return
        damage_file(rng.choice(manifests if rng.random() < 0.4 else ours), rng)
        what = rng.choice(["warmup", "warmup", "report", "models", "baselines", "plan"])
        if what == "warmup":
            warmup(WarmupArguments(**WARMUP))
        elif what == "report":
            run_report(rng, ["run"])
        elif what == "models":
            models(Path(SweepArguments("run", f"{FIXED}/evaluate.yaml").run))
        elif what == "plan":
            plan(PlanArguments(**WARMUP))
        else:
            baselines(
                BaselinesArguments(
                    **WARMUP
                    | {
                        "run_dir": "new",
                        "warmup": "run",
                        "names": ["sft"],
                        "recipes": str(PACKAGE.parent / "recipes" / "baselines"),
                    },
                    dry_run=True,
                )
            )
    elif kind == "data":
        copied("data", "data")
        damage_file(rng.choice(sorted(path for path in Path("data").iterdir())), rng)
        data, counts = load_prepared("data")
        plan(PlanArguments(**WARMUP | {"data": "data"}))
        data[0]
        function, classes = PHASES["traces"]
        function(classes[0](model=f"{FIXED}/model", data="data", output_dir="new", method="uniform"))
    elif kind == "parts":
        copied("unfinished.parts", "unfinished.parts")
        damage_file(rng.choice(sorted(path for path in Path("unfinished.parts").iterdir() if path.suffix)), rng)
        function, classes = PHASES["evaluate"]
        function(
            *parse(
                classes,
                flags(
                    EVALUATION
                    | {"model": f"{FIXED}/model", "config": f"{FIXED}/evaluate.yaml", "output_dir": "unfinished"}
                ),
            )
        )
    elif kind == "shards":
        for name in ("settings.json", "00000.json"):
            put(
                f"new.parts/{name}",
                damaged(as_json(mutated({"kept": 3, "seed": 0, "rejected.no_think": 1}, rng), rng), rng),
                rng,
            )
        Path("new.parts/rows").mkdir(exist_ok=True)
        function, classes = PHASES["data"]
        function(
            classes[0](
                data=f"{FIXED}/rows.jsonl", tokenizer=f"{FIXED}/model", output_dir="new", data_format="problems"
            )
        )
    elif kind == "vocabulary":
        copied("model", "model")
        damage_file(Path("model/abstract_vocabulary.json"), rng)
        from transformers import AutoTokenizer

        AbstractVocabulary.load("model").ids(AutoTokenizer.from_pretrained("model"))
    else:
        alpaca_files(rng)


def alpaca_files(rng) -> None:
    from abscot_trl.evaluation.alpaca import AlpacaArguments, alpaca

    outputs = [
        {"instruction": f"Say {i}.", "output": "x", "generator": "y", "dataset": "helpful_base"} for i in range(3)
    ]
    row = json.loads(fixed_text("evaluation/results.json"))[0]
    for name, content in {"out/outputs.json": outputs, "out/ungraded.json": row, "reference.json": outputs}.items():
        put(name, damaged(as_json(mutated(content, rng) if rng.random() < 0.5 else content, rng), rng, 0.1), rng)
    alpaca(
        AlpacaArguments(
            "out", "reference.json", "http://127.0.0.1:9", "judge", rng.choice(OUTPUTS), python="none/such"
        )
    )


# HTTP


USER = {"role": "user", "content": "7+4-2="}
BODY = {
    "model": "tiny",
    "messages": [USER],
    "max_tokens": 9,
    "temperature": 0.5,
    "trace_temperature": 1.0,
    "top_p": 0.9,
    "seed": 3,
}
BODY |= {
    "stop": ["x"],
    "stream": False,
    "stream_options": {"include_usage": True},
    "presence_penalty": 0.1,
    "n": 1,
    "tools": [],
}
BODY |= {
    "user": "me",
    "metadata": {"a": "b"},
    "logit_bias": {},
    "response_format": {"type": "text"},
    "frequency_penalty": 0,
}
THREAD = [
    {"role": "system", "content": "1+1="},
    USER,
    {"role": "assistant", "content": "9", "reasoning_content": "<TOKEN_A>"},
]
THREAD += [{"role": "user", "content": [{"type": "text", "text": "3+"}, {"type": "text", "text": "+4="}]}]


class Pieces(httpx.AsyncByteStream):
    """A stream in pieces, one of which may be an exception."""

    def __init__(self, pieces):
        self.pieces = pieces

    async def __aiter__(self):
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece


ERRORS = [
    httpx.ConnectError("refused"),
    httpx.ReadTimeout("late"),
    httpx.ReadError("reset"),
    httpx.RemoteProtocolError("odd"),
]
ERRORS += [httpx.DecodingError("gzip"), httpx.PoolTimeout("pool")]


def completion_of(ids: list[int]) -> dict:
    choice = {"index": 0, "text": "x" * len(ids), "token_ids": ids, "finish_reason": "stop"}
    return {
        "id": "cmpl-1",
        "choices": [choice],
        "usage": {"prompt_tokens": 3, "completion_tokens": len(ids), "total_tokens": 9},
    }


def odd_reply(content: dict, streamed: bool, rng, odd: float):
    """What stands for vLLM's reply; `odd` is the chance that something is wrong with it."""
    status = 200 if rng.random() > odd / 4 else rng.choice([204, 301, 400, 401, 404, 413, 422, 429, 500, 503])
    if rng.random() < odd / 6:
        return rng.choice(ERRORS)
    if not streamed:
        text = as_json(mutated(content, rng) if rng.random() < odd else content, rng)
        headers = {"content-type": rng.choice(["application/json", "text/html", "application/json; charset=latin-9"])}
        return httpx.Response(status, content=damaged(text, rng, odd / 3), headers=headers)
    events = [
        content | {"choices": [content["choices"][0] | {"text": text, "finish_reason": end}]}
        for text, end in (("7", None), ("+", "stop"))
    ]
    events += [content | {"choices": []}]
    pieces = [
        b"data: " + damaged(as_json(mutated(e, rng) if rng.random() < odd / 2 else e, rng), rng, odd / 6) + b"\n\n"
        for e in events
    ]
    pieces += [b"data: [DONE]\n\n"] if rng.random() > odd / 4 else []
    if rng.random() < odd / 2:
        pieces.insert(
            rng.randrange(len(pieces) + 1),
            rng.choice(
                [
                    *ERRORS,
                    b": ping\n\n",
                    b"\xff\xfe\n",
                    b"data:{}\n\n",
                    b"event: error\n",
                    b"data: \n\n",
                    b'data: {"error": "dead"}\n\n',
                    b'data: {"error": {"message": 5}}\n\n',
                    b"data: null\n\n",
                    b"x" * 10**6,
                ]
            ),
        )
    return httpx.Response(status, stream=Pieces(pieces))


def check_error(error) -> None:
    """OpenAI's error object."""
    wanted = isinstance(error, dict) and isinstance(error.get("message"), str) and isinstance(error.get("type"), str)
    if not (wanted and error["message"] and {"param", "code"} <= error.keys()):
        raise Wrong(f"an error that is not in OpenAI's form: {error!r:.100}")


def check_response(response: httpx.Response) -> None:
    status = response.status_code
    if not (200 <= status < 300 or 400 <= status < 500 or status in (502, 503, 504)):
        raise Wrong(f"status {status}: {response.text[:100]}")
    if "event-stream" not in response.headers.get("content-type", ""):
        content = response.json()
        if status >= 400:
            check_error(content.get("error"))
        elif not isinstance(content["choices"][0]["message"]["content"], str):
            raise Wrong(f"content is no text: {content['choices'][0]['message']['content']!r:.100}")
        return
    *events, last = [line.removeprefix("data: ") for line in response.text.split("\n") if line]
    for event in [json.loads(event) for event in events]:
        deltas = [choice["delta"] for choice in event["choices"]]
        if not all(isinstance(delta.get("content", ""), str) for delta in deltas):
            raise Wrong(f"content is no text: {deltas!r:.100}")
    if last != "[DONE]":
        check_error(json.loads(last).get("error"))


def fuzz_http(rng) -> None:
    """A request to `abscot serve` over a vLLM that may be odd."""
    from abscot_trl.serving.chat import chat_app

    odd = rng.choice([0.0, 0.8])
    body = {key: BODY[key] for key in rng.sample(list(BODY), 5)} | {
        "messages": rng.choice([[USER], THREAD]),
        "stream": rng.random() < 0.4,
    }
    content = as_json(mutated(body, rng) if rng.random() < (0.3 if odd else 0.9) else body, rng)
    content = damaged(content, rng, 0.03 if odd else 0.2)
    if rng.random() < 0.01:
        size = rng.choice([4, 20]) * 10**6
        content = as_json(
            {"messages": [{"role": "user", "content": rng.choice(["7+", "é"]) * (size // 2)}]}, rng
        ).encode()
    calls = Counter()

    def vllm(request: httpx.Request) -> httpx.Response:
        calls["n"] += 1
        streamed = calls["n"] > 1 and b'"stream":true' in request.content.replace(b" ", b"")
        reply = odd_reply(
            completion_of(
                rng.choice([[40, 49], [49], [40] * 6, *([[], [3], [10**9]] if odd else [])])
                if calls["n"] == 1
                else [8, 9, 1]
            ),
            streamed,
            rng,
            odd,
        )
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def post() -> httpx.Response:
        chat = chat_over(httpx.AsyncClient(transport=httpx.MockTransport(vllm), base_url="http://vllm"))
        transport = httpx.ASGITransport(chat_app(chat))
        headers = {
            "content-type": rng.choice(
                ["application/json", "text/plain", "multipart/form-data", "", "application/json; charset=x"]
            )
        }
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=None) as client:
            if rng.random() < 0.05:
                path = rng.choice(
                    ["/v1/completions", "/tokenize", "/health", "/v1/models", "/none", "/v1/chat/completions/"]
                )
                return await client.request(rng.choice(["GET", "POST"]), path, content=content, headers=headers)
            return await client.post("/v1/chat/completions", content=content, headers=headers)

    response = asyncio.run(post())
    if response.request.url.path == "/v1/chat/completions":
        check_response(response)
    if not response.is_success:
        raise Refused(f"{response.status_code}: {response.text}")


def chat_over(client: httpx.AsyncClient):
    """The protocol over a client that stands for vLLM."""
    from abscot_trl.serving.chat import Chat

    tokenizer, vocabulary = served()
    return Chat(client, "tiny", tokenizer, vocabulary, 256, [1])


@cache
def served():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(f"{FIXED}/model"), AbstractVocabulary.load(f"{FIXED}/model")


def fuzz_upstream(rng) -> None:
    """`abscot serve --upstream`, and a server that samples traces, over one that may not be a vLLM."""
    from abscot_trl.serving.server import ServeArguments, load_chat

    model = {"id": "tiny", "object": "model", "max_model_len": 256, "root": f"{FIXED}/model"}
    answers = {"/v1/models": {"object": "list", "data": [model]}, "/v1/completions": completion_of([49])}
    answers["/v1/completions"]["choices"][0] |= {
        "text": "<endabstract>",
        "logprobs": {"token_logprobs": [0.0], "tokens": ["x"]},
    }
    which = rng.choice(list(answers))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("content-length") or 0))
            answer = answers.get(self.path.partition("?")[0], {})
            reply = as_json(answer, rng).encode()
            if self.path == which:
                reply = damaged(as_json(mutated(answer, rng), rng), rng)
            self.send_response(rng.choice([200] * 9 + [204, 400, 404, 500, 503]) if self.path == which else 200)
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


LATEX = [
    "\\frac{1}{2}",
    "3",
    "-3.5",
    "1,000",
    "10^{10}",
    "\\sqrt{2}",
    "x^2+1",
    "(1,2)",
    "[1,2)",
    "\\{1,2\\}",
    "5!",
    "5 \\text{ cm}",
]
LATEX += [
    "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}",
    "1\\pm 2",
    "x=3",
    "12_{8}",
    "50\\%",
    "\\$3",
    "\\infty",
    "\\pi",
    "e^{i\\pi}",
    "2^{100}!",
]
LATEX += [
    "10^{10^{10}}!",
    "9^{9^{9^{9}}}",
    "\\sum_{i=1}^{10^9} i",
    "\\int_0^1 x^x dx",
    "\\prod_{k=1}^{99999} k",
    "x^{x^{x^{x}}}",
    "1/0",
    "0^0",
]
LATEX += [
    "\\binom{10^9}{5}",
    "10^{999999}",
    "\\sin(10^{10^{6}})",
    "\\lim_{x\\to 0} 1/x",
    "\\log 0",
    "(x+1)^{500}",
    "2^{2^{2^{2^{5}}}}",
    "99999!!!",
]


def latex(rng, depth: int = 0) -> str:
    """An answer, or trouble."""
    one = rng.choice(LATEX)
    if depth < 3 and rng.random() < 0.5:
        other = latex(rng, depth + 1)
        one = rng.choice(
            [
                f"\\frac{{{one}}}{{{other}}}",
                f"{one}^{{{other}}}",
                f"({one})!",
                f"{one}={other}",
                f"{one},{other}",
                f"\\sqrt[{one}]{{{other}}}",
                f"{one}+{other}",
                f"{one}{other}",
                f"\\text{{{one}}}",
                f"\\left({one}\\right)^{{{other}}}",
            ]
        )
    if depth == 0 and rng.random() < 0.25:
        n = rng.choice([30, 100, 480, 10_000])
        one = rng.choice(
            [
                one * n,
                "\\frac{" * n,
                "{" * n + one + "}" * n,
                "(" * n + one + ")" * n,
                one + "!" * n,
                "1^{" * n + "1" + "}" * n,
                "9" * n,
                "x" * n,
                "-" * n + "1",
                "\\sqrt{" * n + "2" + "}" * n,
                "\\frac{1}{1+" * n + "1" + "}" * n,
                "1+" * n + "1",
                "x_{" * n,
                "\\" * n,
                one + rng.choice(TEXTS),
            ]
        )
    return one


def fuzz_grading(rng) -> None:
    """Responses and golds that are mathematics, or look like it."""
    from abscot_trl.evaluation.grading import extract_answer, is_correct, normal_form, score

    said, gold = latex(rng), rng.choice([latex(rng), rng.choice(LATEX), "3"])
    response = rng.choice(
        [
            f"So \\boxed{{{said}}}.",
            f"The answer is {said}.",
            said,
            f"\\boxed{{{said}",
            f"{said}\\boxed{{1}}" * 3,
            f"Answer: {said}\n{said}",
            f"${said}$",
        ]
    )
    if rng.random() < 0.2:
        response = rng.choice(
            [
                response * 2000,
                response[: len(response) // 2],
                response + rng.choice(TEXTS),
                "\\boxed{" * 20_000,
                "answer is " * 50_000,
            ]
        )
    source = rng.choice(["math", "gpqa", "hotpotqa", "alpacaeval/x", ""])
    normal_form(extract_answer(response, source), source)
    score(response, gold, source)
    is_correct(response, gold)


KINDS = {
    "rows": (fuzz_rows, 10),
    "problems": (fuzz_problems, 15),
    "yaml": (fuzz_yaml, 24),
    "recipes": (fuzz_recipes, 6),
    "results": (fuzz_results, 8),
    "answers": (fuzz_answers, 6),
    "splits": (fuzz_splits, 5),
    "traces": (fuzz_traces, 5),
    "manifest": (fuzz_manifest, 6),
    "http": (fuzz_http, 10),
    "upstream": (fuzz_upstream, 2),
    "grading": (fuzz_grading, 3),
}


# The worker


def where_in(frames: list[tuple[str, int]]) -> str:
    """The innermost frame of this package, `serving/chat.py:93`; else of the fuzzer."""
    for file, line in reversed(frames):
        if Path(file).is_relative_to(PACKAGE):
            return f"{Path(file).relative_to(PACKAGE)}:{line}"
    return next((f"tests/fuzz.py:{line}" for file, line in reversed(frames) if file == __file__), "?")


def run_one(kind: str, number: int, root: Path, show: bool = False) -> tuple[str, str, str, str]:
    """(`succeeded`, `refused` or `violation`; the exception's name; where; why) of one input."""
    function, rng, box = KINDS[kind][0], random.Random(f"{kind} {number}"), root / "box"
    fill_box(box)
    environment, before, found = dict(os.environ), stamps(root / "fixed"), ("succeeded", "", "", "")
    try:
        try:
            function(rng)
        finally:
            os.environ.clear()
            os.environ.update(environment)
            check_box(box, before)
    except Refused as refusal:
        found = ("refused", "", "", str(refusal))
        if show:
            print(f"refused: {str(refusal)[:3000]}")
    except BaseException as error:
        if show:
            traceback.print_exc(limit=-40)
        if isinstance(error, SystemExit) and not error.code:
            return found
        frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__, limit=-2000)]
        if isinstance(error, Wrong) and error.__context__ is not None:  # where it went wrong, if that is known
            frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__context__.__traceback__)] + frames
        found = ("violation", type(error).__name__, where_in(frames), " ".join(str(error).split())[:200])
    return found


def worker(connection, kind: str, numbers: list[int], root: Path) -> None:
    """Runs inputs one after another and says before and after each where it is."""
    os.setpgid(0, 0)
    log = os.open(root / "log", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    stacks = open(root / "stacks", "w")
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=False)
    light_figures()
    for number in numbers:
        connection.send((number, None))
        result = run_one(kind, number, root)
        os.ftruncate(log, 0)
        connection.send((number, result))
    os._exit(0)


def light_figures() -> None:
    """A figure is drawn, but only one of thirty is put to paper: that takes two seconds a report."""
    from matplotlib.figure import Figure

    whole, count = Figure.savefig, Counter()
    image = base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
    )

    def savefig(self, file, *args, **settings):
        count["n"] += 1
        if count["n"] % 30 == 0:
            return whole(self, file, *args, **settings)
        file.write(image) if hasattr(file, "write") else Path(file).write_bytes(image)

    Figure.savefig = savefig


def used(process: psutil.Process) -> tuple[float, int]:
    """Processor seconds and bytes of a process and its children."""
    seconds = total = 0
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.Error):
            times = one.cpu_times()
            seconds += times.user + times.system
            total += one.memory_info().rss
    return seconds, total


def run_kind(kind: str, numbers: list[int], root: Path) -> dict[int, tuple[str, str, str, str]]:
    """All inputs of a kind, in as many workers as it takes."""
    results, context = {}, multiprocessing.get_context("fork")
    while len(results) < len(numbers):
        here, there = context.Pipe()
        left = numbers[len(results) :]
        process = context.Process(target=worker, args=(there, kind, left, root), daemon=False)
        process.start()
        there.close()
        watched, current, begun, base = psutil.Process(process.pid), None, time.monotonic(), (0.0, 0)
        with suppress(EOFError, ConnectionError, psutil.NoSuchProcess):
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
                if seconds > SECONDS or clock > CLOCK or size > BYTES:
                    what = "memory" if size > BYTES else "hang"
                    words = (
                        f"{size / 1e9:.1f} GB"
                        if size > BYTES
                        else f"{seconds:.0f} s of the processor, {clock:.0f} s by the clock"
                    )
                    results[current] = ("violation", what, stack_of(process.pid, root), words)
                    current = None
                    break
        if current is not None:
            process.join(5)
            results[current] = ("violation", "died", "?", f"exit code {process.exitcode}")
        for one in [*watched.children(recursive=True), watched] if watched.is_running() else []:
            with suppress(psutil.Error):
                one.kill()
        process.join()
        here.close()
    return results


def stack_of(pid: int, root: Path) -> str:
    """Where a worker that hangs is."""
    os.kill(pid, signal.SIGUSR1)
    time.sleep(0.5)
    frames = []
    for line in (root / "stacks").read_text().splitlines():
        if line.startswith("  File "):
            _, file, rest = line.split('"')
            frames.append((file, int(rest.split()[2])))
    return where_in(frames[::-1])


@dataclass
class Findings:
    """Results by kind and number."""

    results: dict[str, dict[int, tuple[str, str, str, str]]] = field(default_factory=dict)

    def violations(self) -> dict[tuple[str, str], list[tuple[str, int, str]]]:
        """By (exception, where): the inputs that show it."""
        found = defaultdict(list)
        for kind, results in self.results.items():
            for number, (outcome, name, where, why) in sorted(results.items()):
                if outcome == "violation":
                    found[name + (f" ({why})" if name == "Wrong" else ""), where].append((kind, number, why))
        return found

    def __str__(self) -> str:
        lines = ["| kind | inputs | succeeded | refused | violations |", "|---|---:|---:|---:|---:|"]
        total, wordy = Counter(), []
        for kind, results in self.results.items():
            counts = Counter(outcome for outcome, *_ in results.values()) | Counter()
            total += counts
            lines.append(
                f"| {kind} | {len(results)} | {counts['succeeded']} | {counts['refused']} | {counts['violation']} |"
            )
            wordy += [
                f"{kind} {n} ({len(why)})"
                for n, (outcome, *_, why) in results.items()
                if outcome == "refused" and len(why) > WORDY
            ]
        lines.append(f"| all | {total.total()} | {total['succeeded']} | {total['refused']} | {total['violation']} |")
        found = self.violations()
        lines += [
            "",
            f"{len(found)} distinct violations",
            "",
            "| exception | where | times | kind and number | reason |",
            "|---|---|---:|---|---|",
        ]
        for (name, where), inputs in sorted(found.items(), key=lambda item: (item[0][1], item[0][0])):
            kind, number, why = inputs[0]
            lines.append(f"| {name} | {where} | {len(inputs)} | {kind} {number} | {why[:120].replace('|', '/')} |")
        if wordy:
            lines += ["", f"{len(wordy)} refusals of over {WORDY} characters: {', '.join(wordy[:8])}"]
        return "\n".join(lines)


def fuzz(count: int, seed: int = 0, kinds: list[str] | None = None, progress: bool = False) -> Findings:
    """`count` inputs over `kinds`, numbered from `seed` million on, in a temporary folder."""
    kinds, findings, root = kinds or list(KINDS), Findings(), Path(tempfile.mkdtemp(prefix="abscot-fuzz-"))
    shares, here = sum(KINDS[kind][1] for kind in kinds), Path.cwd()
    argument_classes()  # imported once, here: the workers are forks
    import trl.generation.vllm_client  # noqa: F401

    try:
        builder = multiprocessing.get_context("fork").Process(target=in_silence, args=(build, root))
        builder.start()
        builder.join()
        if builder.exitcode:
            raise RuntimeError((root / "log").read_text()[-3000:])
        for kind in kinds:
            start, n = time.monotonic(), math.ceil(count * KINDS[kind][1] / shares)
            findings.results[kind] = run_kind(kind, list(range(seed * 10**6, seed * 10**6 + n)), root)
            if progress:
                print(f"{kind}: {n} inputs, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    finally:
        os.chdir(here)
        shutil.rmtree(root, ignore_errors=True)
    return findings


def in_silence(function, root: Path) -> None:
    log = os.open(root / "log", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    function(root)


def show(kind: str, number: int) -> None:
    """One input again, in this process; nothing ends it."""
    root = Path(tempfile.mkdtemp(prefix="abscot-fuzz-"))
    build(root)
    print(f"in {root / 'box'}, which stays", flush=True)
    outcome, name, where, why = run_one(kind, number, root, show=True)
    print(f"\n{kind} {number}: {outcome} {name} {where} {why}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="numbers begin at so many millions")
    parser.add_argument("--count", type=int, default=10_000, help="inputs over all kinds, or of the kind")
    parser.add_argument("--kind", nargs="+", choices=KINDS)
    parser.add_argument("--show", type=int, help="the number of one input to run again")
    args = parser.parse_args()
    if args.show is not None:
        show(args.kind[0], args.show)
        return
    findings = fuzz(args.count, args.seed, args.kind, progress=True)
    print(findings)
    sys.exit(bool(findings.violations()))


if __name__ == "__main__":
    main()
