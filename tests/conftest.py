"""Inputs that several files of tests share, made once."""

import pytest
from tiny import make_checkpoint
from warmups import toy_fields

from abscot_trl.data.prepare import load_prepared
from abscot_trl.data.toy import chain_arithmetic, toy_tokenizer, write_problems
from abscot_trl.phases import run_phase
from abscot_trl.traces.files import write_traces
from abscot_trl.vocabulary import AbstractVocabulary

LONGEST = ("kill", "distributed", "rollout", "serve", "harness", "new", "make_traces", "evidence", "warmup", "vllm")
LONGEST += ("grpo", "fuzz", "sweep", "plan", "grpo_phase", "rl_report", "baselines", "content", "gauges")


def pytest_collection_modifyitems(items):
    """The files that take longest first: begun last, they would leave `make test` with one process at work."""
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`make_checkpoint` on disk."""
    folder = tmp_path_factory.mktemp("checkpoint") / "extended"
    make_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """One token a character, so that lengths can be counted by hand; a trace takes 6 + 2 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer, vocabulary = toy_tokenizer(), AbstractVocabulary(size=8, m_max=6)
    vocabulary.extend(tokenizer)
    tokenizer.save_pretrained(folder)
    vocabulary.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def inputs(checkpoint, tmp_path_factory) -> dict[str, str]:
    """Prepared data of 16 rows, and traces of them."""
    folder = tmp_path_factory.mktemp("inputs")
    problems = write_problems(folder / "rows.jsonl", chain_arithmetic(16, 3, 5, seed=0))
    found = {"data": problems, "data_format": "problems", "tokenizer": str(checkpoint), "output_dir": folder / "data"}
    run_phase("data", [part for key, value in found.items() for part in (f"--{key}", str(value))])
    ids = load_prepared(folder / "data")[0]["id"]
    write_traces(folder, [{"row": i, "id": name, "trace": [i % 8] * (1 + i % 6)} for i, name in enumerate(ids)])
    return {"data": str(folder / "data"), "traces": str(folder)}


@pytest.fixture
def toy(checkpoint, tmp_path):
    return toy_fields(checkpoint, tmp_path)
