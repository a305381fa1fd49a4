"""Prompts to sample answers to: from each kind of rows, less what is too long, known or twice there."""

import json
from pathlib import Path

import pytest
from tiny import write_jsonl

from abscot_trl.checkpoint import load_tokenizer
from abscot_trl.data.problems import load_problems, with_instruction
from abscot_trl.data.prompts import PromptArguments, load_prompts
from abscot_trl.errors import Refused
from abscot_trl.examples import prompt_ids

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real rows are not at {DATA}")
BOX = "\n\nPut your final answer within \\boxed{}."


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def load(tmp_path, tokenizer, rows: list[dict], **fields):
    name = write_jsonl(tmp_path / "rows.jsonl", rows)
    return load_prompts(PromptArguments(prompts=[name], **fields), tokenizer)


def by_id(data) -> dict[str, dict]:
    return {row["id"]: row for row in data}


ROWS = [
    # What is read, and the expected prompt, gold and source.
    (
        {"prompt": "1+1?", "cot": "two", "answer": "\\boxed{2}", "gold": "2", "id": "ours", "source": "sums"},
        (user("1+1?" + BOX), "2", "sums"),
    ),
    (
        {"question": "A cat?", "answer": "<<1+1=2>>two\n#### 1,002", "id": "gsm8k-1"},
        (user("A cat?" + BOX), "1002", "gsm8k"),
    ),
    ({"prompt": "Text", "gold": None, "id": "free", "source": "mine"}, (user("Text"), None, "mine")),
    ({"prompt": "In \\boxed{}: 3?", "gold": 3, "id": "boxed"}, (user("In \\boxed{}: 3?"), "3", "")),
    (
        {"messages": [{"role": "system", "content": "Hi"}, *user("4?")], "gold": "4", "id": "talk"},
        ([{"role": "system", "content": "Hi"}, *user("4?" + BOX)], "4", ""),
    ),
    (  # allenai/Dolci-Think-RL-7B
        {
            "prompt": "user: 5?",
            "ground_truth": ["5"],
            "dataset": ["math"],
            "original_dataset": "a/maths",
            "custom_id": "m",
        },
        (user("5?" + BOX), "5", "a/maths"),
    ),
    (
        {"prompt": "user: Sort.", "ground_truth": ["[tests]"], "dataset": ["code"], "custom_id": "c"},
        (user("Sort."), None, "code"),
    ),
    (
        {
            "prompt": "system: Be kind\nuser: Hi\nassistant: Hello\n\nuser: Bye\nall",
            "ground_truth": "x",
            "dataset": "general-quality_ref",
            "id": "turns",
        },
        (
            [
                {"role": "system", "content": "Be kind"},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": "Bye\nall"},
            ],
            None,
            "general-quality_ref",
        ),
    ),
    (
        {"prompt": "user: Write:\nuser: a", "ground_truth": ["x"], "dataset": ["ifeval"], "id": "quoted"},
        (user("Write:\nuser: a"), None, "ifeval"),
    ),
    (
        {
            "messages": [*user("6?"), {"role": "assistant", "content": "6"}],
            "ground_truth": "6",
            "dataset": "gsm8k",
            "id": "answered",
        },
        (user("6?" + BOX), "6", "gsm8k"),
    ),
]


def test_each_kind_of_rows(tmp_path, tokenizer):
    data, counts = load(tmp_path, tokenizer, [row for row, _ in ROWS])
    assert data.column_names == ["prompt", "gold", "source", "id", "entry"] and counts["kept"] == len(ROWS)
    found = by_id(data)
    for row, (prompt, gold, source) in ROWS:
        kept = found[row.get("id") or row["custom_id"]]
        assert kept | {"id": ""} == {"prompt": prompt, "gold": gold, "source": source, "id": "", "entry": ""}


BAD = [
    ({"prompt": "a", "ground_truth": ["1", "2"], "dataset": ["math"]}, "ground_truth of a maths row is not one text"),
    ({"prompt": " ", "gold": "1"}, "the prompt is empty, or a message is without role or content"),
    ({"prompt": 3, "gold": "1"}, "the prompt is neither text nor messages"),
    ({"prompt": "a", "gold": " "}, "gold is empty or not text"),
    ({"messages": [{"role": "system", "content": "a"}], "gold": "1"}, "the prompt does not end with a user message"),
    ({"prompt": "a <eos>", "gold": "1"}, "special token in the prompt"),
    ({"prompt": "a <beginabstract>", "gold": "1"}, "special token in the prompt"),
    ({"prompt": "\ud800", "gold": "1"}, "half of a surrogate pair"),
    (
        {"colour": "red"},
        "columns ['colour'] are those of no known problem set (yours has prompt, cot, answer and gold)",
    ),
]


def test_malformed_rows_are_counted_by_reason(tmp_path, tokenizer):
    rows = [row for row, _ in BAD]
    _, counts = load(tmp_path, tokenizer, [*rows, {"prompt": "good", "gold": "1"}])
    reasons = [reason for _, reason in BAD]
    assert counts["malformed"] == {reason: reasons.count(reason) for reason in reasons}
    assert counts["rows_read"] == len(BAD) + 1 and counts["kept"] == 1


def test_long_ones_and_doubles_are_left_out_and_counted(tmp_path, tokenizer):
    rows = [{"prompt": "9" * (1 + i % 8), "gold": None, "id": str(i)} for i in range(16)]
    length = len(prompt_ids(user("9" * 5), tokenizer))
    data, counts = load(tmp_path, tokenizer, rows, max_prompt_tokens=length)
    assert sorted(len(prompt[0]["content"]) for prompt in data["prompt"]) == [1, 2, 3, 4, 5]
    assert (counts["kept"], counts["too_long"], counts["duplicates"], counts["rows_read"]) == (5, 3, 8, 16)
    with pytest.raises(Refused, match='no prompt of .*rows.jsonl is left: .*"too_long": 8'):
        load(tmp_path, tokenizer, rows, max_prompt_tokens=1)


def test_the_seed_fixes_the_order_and_a_limit_takes_its_beginning(tmp_path, tokenizer):
    rows = [{"prompt": str(i), "gold": None} for i in range(30)]
    order = load(tmp_path, tokenizer, rows)[0]["id"][:]
    assert sorted(order) == sorted(f"row-{i}" for i in range(1, 31)) and order != sorted(order)
    assert load(tmp_path, tokenizer, rows)[0]["id"][:] == order
    assert load(tmp_path, tokenizer, rows, prompt_seed=1)[0]["id"][:] != order
    data, counts = load(tmp_path, tokenizer, rows, prompt_rows=7)
    assert data["id"][:] == order[:7] and counts["rows_read"] == 7


def test_problems_of_the_evaluation(tmp_path, tokenizer):
    long = "a train leaves the town at seven and needs three hours for its way to the sea"
    texts = ["What is 1+2?", f"So: {long}", "what is 1 + 2", "What is 2+1?"]
    rows = [{"prompt": text, "gold": "3", "id": f"r{i}"} for i, text in enumerate(texts)]
    problems = [{"problem": "What is 1+2?", "answer": "3", "id": "p1"}, {"problem": long, "answer": "3", "id": "p2"}]
    not_in = [write_jsonl(tmp_path / "test.jsonl", problems)]
    data, counts = load(tmp_path, tokenizer, rows, not_in=not_in, overlap="drop")
    assert data["id"][:] == ["r3"] and counts["overlapping"] == {"same": 2, "ngram": 1} and counts["kept"] == 1
    message = r"rows.jsonl: row [123] \(r[012]\) .*problem p[12] of .*test.jsonl.*overlap: drop.*"
    with pytest.raises(Refused, match=message + r'"same": 2, "ngram": 1\} of 4 rows'):
        load(tmp_path, tokenizer, rows, not_in=not_in)
    assert load(tmp_path, tokenizer, rows[3:], not_in=not_in)[1]["overlapping"] == {}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"overlap": "ignore"}, "overlap must be one of error, drop, got 'ignore'"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens must be at least 1"),
        ({"prompt_rows": 0}, "prompt_rows must be at least 1"),
    ],
)
def test_fields_are_checked(fields, words):
    with pytest.raises(Refused, match=words):
        PromptArguments(**{"prompts": "a"} | fields)


@real
def test_real_problems_are_asked_as_an_evaluation_asks_them(tokenizer):
    names = [str(DATA / f"{name}.jsonl") for name in ("gsm8k_test", "math500_test", "hotpotqa_dev_500")]
    data, counts = load_prompts(PromptArguments(prompts=names, max_prompt_tokens=100_000), tokenizer)
    found = by_id(data)
    problems = [problem for name in names for problem in load_problems(name)]
    assert counts["kept"] == len(data) == len(problems) == len(found)
    for problem in problems:
        kept = found[problem.id]
        assert kept["prompt"] == with_instruction(problem, "abstract") and kept["gold"] == problem.gold
        assert kept["source"] == problem.source


# reasoning-gym


def generate(tokenizer, name: str, **fields):
    return load_prompts(PromptArguments(prompts=[name], **fields), tokenizer)


def test_reasoning_gym(tokenizer):
    """Of the train split; the entry that the score is taken from is whole."""
    gym = pytest.importorskip("reasoning_gym")
    data, counts = generate(tokenizer, "reasoning_gym:gsm_symbolic?size=20&seed=3", not_in=["reasoning_gym:chain_sum"])
    dataset = gym.create_dataset("gsm_symbolic", size=20, seed=6_000_000)
    assert counts["kept"] == 20 and counts["sources"] == {"reasoning_gym/gsm_symbolic": 20}
    found = by_id(data)
    for i, entry in enumerate(dataset):
        row = found[f"gsm_symbolic-train-3-{i}"]
        assert row["prompt"] == user(entry["question"] + BOX) and row["gold"] == entry["answer"]
        assert json.loads(row["entry"]) == json.loads(json.dumps(entry, default=str))  # some hold fractions
    some, counts = generate(tokenizer, "reasoning_gym:chain_sum", prompt_rows=20, prompt_seed=3)
    assert counts["kept"] == len(some) == 20
