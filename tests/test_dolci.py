"""Rows of dialogues, and how files and the hub are read: what is kept, and what is refused."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import IterableDataset
from tiny import row, write_jsonl

from abscot_trl.data import dolci
from abscot_trl.data.dolci import RowRejected, iter_rows, parse_row
from abscot_trl.errors import Refused

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")

SHAPE_OUTCOMES = {
    "ok": "kept",
    "ok+system": "kept",
    "tool_role+system": "kept",
    "answer_truncated": "kept",
    "empty_think": "empty_think",
    "empty_answer": "empty_answer",
    "no_think_tags": "no_think",
    "no_close_think": "unclosed_think",
}


def outcome(value):
    try:
        parse_row(value)
    except RowRejected as rejection:
        return rejection.reason
    return "kept"


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@real_data
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_every_real_row_comes_out_as_its_shape_says(suffix):
    shapes = {meta["id"]: meta["shape"] for meta in read_jsonl(DATA / "think_sft_sample.meta.jsonl")}
    wrong = [
        (value["id"], shapes[value["id"]], outcome(value))
        for value in iter_rows(str(DATA / f"think_sft_sample.{suffix}"))
        if outcome(value) != SHAPE_OUTCOMES[shapes[value["id"]]]
    ]
    assert wrong == []


@real_data
@pytest.mark.parametrize("name", ["think_sft_sample", "think_sft_long_aime24"])
def test_real_rows_lose_no_text(name):
    kept = 0
    for value in read_jsonl(DATA / f"{name}.jsonl"):
        if outcome(value) != "kept":
            continue
        kept += 1
        example = parse_row(value)
        target = value["messages"][-1]["content"]
        rebuilt = f"<think>\n{example.cot}\n</think>\n\n{example.answer}"
        assert rebuilt.split() == target.removesuffix("</think>").split()
        assert [turn["role"] for turn in example.prompt] == [turn["role"] for turn in value["messages"][:-1]]
        assert "think>" not in json.dumps(example.prompt) + example.cot + example.answer
        assert (example.id, example.source) == (value["id"], value["dataset_source"])
    assert kept == {"think_sft_sample": 588, "think_sft_long_aime24": 128}[name]


def test_earlier_turns_stay_but_lose_their_thoughts():
    example = parse_row(
        row(
            earlier=[
                ("system", "Use <think> tags."),
                ("user", " hi "),
                ("assistant", "<think>greet</think>\n\nHello"),
                ("tool", "7"),
                ("assistant", "<think>never closed"),
                ("user", "1+1"),
            ]
        )
    )
    assert [turn["content"] for turn in example.prompt] == ["Use <think> tags.", " hi ", "Hello", "7", "", "1+1"]
    assert (example.cot, example.answer, example.gold) == ("1+1=2", "2", None)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("  <think>a</think>b  ", ("a", "b")),
        ("<think>a<think>b</think>c</think>d", ("abc", "d")),  # nested: nothing of the thought leaks into the answer
        ("<think>the tag <think> opens it</think>d", ("the tag  opens it", "d")),  # quoted, never balanced
        ("<think>a</think>b</think>", ("a", "b")),  # a stray closing tag
        ("2", "no_think"),
        ("a</think>b", "no_think"),
        ("Well. <think>a</think>b", "no_think"),
        ("<think>a", "unclosed_think"),
        ("<think>", "unclosed_think"),
        ("<think> \n </think>b", "empty_think"),
        ("<think></think>", "empty_think"),
        ("<think>a</think> \n", "empty_answer"),
        ("<think>a</think></think>", "empty_answer"),
        ("<think>a</think>b<think>c</think>d", "malformed"),  # a verbal thought must not become answer
        ("", "no_think"),
    ],
)
def test_think_tags(content, expected):
    if isinstance(expected, str):
        assert outcome(row(content)) == expected
    else:
        example = parse_row(row(content))
        assert (example.cot, example.answer) == expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({}, "malformed"),
        (None, "malformed"),
        ({"messages": []}, "malformed"),
        ({"messages": None}, "malformed"),
        ({"messages": "<think>a</think>b"}, "malformed"),
        ({"messages": ["hi"]}, "malformed"),
        ({"messages": [{"role": "user"}]}, "malformed"),
        (row(earlier=[("user", None)]), "malformed"),
        (row(earlier=[(None, "hi")]), "malformed"),
        (row(None), "malformed"),
        (row(earlier=[]), "no_user_turn"),
        (row(earlier=[("system", "hi")]), "no_user_turn"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no_assistant_turn"),
        ({"messages": [*row()["messages"], {"role": "user", "content": "thanks"}]}, "no_assistant_turn"),
    ],
)
def test_rows_without_a_dialogue(value, reason):
    assert outcome(value) == reason


def test_reading_keeps_or_shuffles_the_order(tmp_path):
    rows = [{"i": i} for i in range(60)]
    write_jsonl(tmp_path / "b.jsonl", rows[30:])
    write_jsonl(tmp_path / "a.jsonl", rows[:30])
    assert list(iter_rows(str(tmp_path), shuffle_buffer=0)) == rows
    first, again, other = (list(iter_rows(str(tmp_path), seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert first != rows
    assert sorted(first, key=lambda r: r["i"]) == rows


@real_data
def test_a_buffer_gets_past_the_first_source():
    path = str(DATA / "think_sft_sample.jsonl")
    in_order = Counter(outcome(value) for value in islice(iter_rows(path, shuffle_buffer=0), 10))
    shuffled = Counter(outcome(value) for value in islice(iter_rows(path), 100))
    assert in_order == {"empty_think": 10}
    assert shuffled["kept"] > 70


def test_hub_ids_are_streamed_and_shuffled(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return IterableDataset.from_generator(lambda: ({"i": i} for i in range(50)))

    monkeypatch.setattr(dolci, "load_dataset", load_dataset)
    rows = list(iter_rows("openai/gsm8k", "test", "main", seed=3))
    assert calls == [(("openai/gsm8k", "main"), {"split": "test", "streaming": True})]
    assert sorted(r["i"] for r in rows) == list(range(50)) != [r["i"] for r in rows]

    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(dolci, "load_dataset", offline)
    with pytest.raises(ValueError, match="'allenai/Dolci' is no file or folder here.*no network"):
        iter_rows("allenai/Dolci")


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("x.jsonl", '{"a": 1}\n\n{"a":\n', ValueError, r"x\.jsonl, line 3: not JSON"),
        ("x.jsonl", "[1]\n", ValueError, r"x\.jsonl, line 1: a list"),
        ("x.parquet", "PAR1 and no more", ValueError, r"x\.parquet: not a readable parquet file .*copy it again"),
        ("x.csv", "a,b\n", ValueError, r"x\.csv: cannot read \.csv"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, error, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        list(iter_rows(str(tmp_path / name)))


def test_a_truncated_parquet_file_is_named_before_any_row(tmp_path):
    for name in ("a.parquet", "b.parquet"):
        pa.parquet.write_table(pa.Table.from_pylist([{"i": i} for i in range(1000)]), tmp_path / name)
    whole = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"b\.parquet: not a readable parquet file .*copy it again"):
        iter_rows(str(tmp_path))


@pytest.mark.parametrize("name", ["nowhere/x.jsonl", "./nowhere", "/nowhere/at/all", "a/b/c"])
def test_missing_paths(name):
    with pytest.raises(Refused, match="no such file or folder"):
        iter_rows(name)


def test_a_folder_must_say_which_files_it_means(tmp_path):
    with pytest.raises(Refused, match=r"no \.parquet or \.jsonl file"):
        iter_rows(str(tmp_path))
    write_jsonl(tmp_path / "a.jsonl", [{"i": 1}])
    pa.parquet.write_table(pa.Table.from_pylist([{"i": 1}]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="both"):
        iter_rows(str(tmp_path))
