"""Problems by their columns: which are read, how they are asked, and what is refused."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from datasets.exceptions import DatasetNotFoundError
from tiny import write_jsonl

from abscot_trl.data import problems as module
from abscot_trl.data.dolci import RowRejected
from abscot_trl.data.problems import GPQA_COLUMNS, last_boxed, load_problems, problem_to_example, with_instruction
from abscot_trl.evaluation.grading import score

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")


def gpqa_row(i: int) -> dict:
    wrong = {f"Incorrect Answer {n}": f"wrong {n} of {i}, at\n  length" for n in (1, 2, 3)}
    return {"Record ID": f"rec{i}", "Question": f"What is {i}?\n", "Correct Answer": f"right of {i}", **wrong}


def test_gpqa_options_are_shuffled_by_the_question():
    """The letters are spread evenly, each leads to the right option, and a row's place does not matter."""
    rows = [gpqa_row(i) for i in range(400)]
    found = [problem_to_example(row) for row in rows]
    for i, example in enumerate(found):
        options = dict(
            part.split(") ", 1)
            for part in example.prompt[0]["content"].split("\n\n", 1)[1].split("\n")
            if ") " in part
        )
        assert sorted(options) == ["A", "B", "C", "D"] and options[example.gold] == f"right of {i}"
        assert example.answer == f"The answer is \\boxed{{{example.gold}}}." and example.id == f"rec{i}"
        assert score(example.answer, example.gold, example.source) == 1.0
    assert min(Counter(example.gold for example in found).values()) > 70
    assert [problem_to_example(row) for row in reversed(rows)] == found[::-1]
    assert found[7].prompt[0]["content"].startswith("What is 7?\n\nA) ")
    verbal, direct = (with_instruction(found[0], mode)[0]["content"] for mode in ("verbal", "direct"))
    assert "step by step" in verbal and "step" not in direct and all("letter" in text for text in (verbal, direct))
    with pytest.raises(RowRejected, match="Incorrect Answer 2 is empty"):
        problem_to_example(gpqa_row(1) | {"Incorrect Answer 2": " "})


def test_a_local_file_of_gpqa_works(tmp_path):
    rows = [gpqa_row(i) for i in range(5)]
    with open(tmp_path / "gpqa.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "gpqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_problems(str(tmp_path / "gpqa.csv"))
    assert found == load_problems(str(tmp_path / "gpqa.jsonl")) and len(found) == 5
    assert load_problems(str(tmp_path / "gpqa.csv"), limit=2) == found[:2]
    (tmp_path / "list.json").write_text("{")
    with pytest.raises(ValueError, match="list.json is no JSON list of problems"):
        load_problems(str(tmp_path / "list.json"))


def test_a_gated_hub_says_so(monkeypatch):
    def refuse(name, *_, **__):
        raise DatasetNotFoundError(f"Dataset '{name}' is a gated dataset on the Hub. You must be authenticated.")

    monkeypatch.setitem(module.iter_rows.__globals__, "load_dataset", refuse)
    with pytest.raises(
        ValueError, match=r"is a gated dataset.*accepted its terms.*local .csv, .jsonl or .parquet file"
    ):
        load_problems("Idavidrein/gpqa", "train", "gpqa_diamond")


@real_data
def test_alpacaeval_prompts():
    """All real rows: asked as they stand in every mode, without gold, each with its dataset and a number for id."""
    found = load_problems(str(DATA / "instructions_332.jsonl"))
    rows = [json.loads(line) for line in (DATA / "instructions_332.jsonl").read_text().splitlines()]
    assert [e.prompt[0]["content"] for e in found] == [row["instruction"].strip() for row in rows]
    assert [e.source for e in found] == [f"alpacaeval/{row['dataset']}" for row in rows]
    assert {e.gold for e in found} == {None} and [e.id for e in found] == [str(i) for i in range(1, 333)]
    assert all(with_instruction(found[0], mode) == found[0].prompt for mode in ("verbal", "direct", "abstract"))


def test_problems_without_an_id_get_their_number(tmp_path):
    rows = [{"problem": "p", "answer": "1"}, {"problem": "q", "answer": "2", "id": 7}, {"problem": "r", "answer": "3"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [example.id for example in load_problems(str(tmp_path / "p.jsonl"))] == ["1", "7", "3"]


HOTPOT = {"question": "q", "answer": "a", "context": {"title": "ab", "sentences": ["c", "d"]}}
TOO_LONG = ",".join([*GPQA_COLUMNS]) + "\nq,a,b,c,d,e\n"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("titles.jsonl", json.dumps(HOTPOT), "row 1 .* context is not titles and their sentences"),
        ("half.jsonl", json.dumps({"problem": "\ud800", "answer": "3"}), "row 1 .* surrogates"),
        ("cells.csv", TOO_LONG, "row 1 .* more cells than the header"),
    ],
)
def test_rows_that_only_look_like_problems(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: {words}"):
        load_problems(str(tmp_path / name))


def test_columns_of_the_hub():
    gsm8k = problem_to_example(
        {"question": "How much?", "answer": "It is 2*600=<<2*600=1200>>1200 in all.\n#### 1,200"}
    )
    assert (gsm8k.cot, gsm8k.gold) == ("It is 2*600=1200 in all.", "1200")
    assert (gsm8k.answer, gsm8k.source) == ("The answer is \\boxed{1200}.", "gsm8k")
    math = problem_to_example({"problem": "p", "solution": "so \\boxed{\\frac{1}{2}}", "level": 5})
    assert (math.gold, math.cot, math.prompt) == (
        "\\frac{1}{2}",
        "so \\boxed{\\frac{1}{2}}",
        [{"role": "user", "content": "p"}],
    )
    aime = problem_to_example({"id": "aime24-I-01", "problem": "p", "answer": 204, "url": None})
    assert (aime.gold, aime.cot, aime.source) == ("204", "", "aime")
    context = {"title": ["A", "B"], "sentences": [["One.", " Two."], ["Three."]]}
    hotpot = problem_to_example({"id": "5", "question": "Who?", "answer": "yes", "context": context})
    assert hotpot.prompt[0]["content"] == "A: One. Two.\n\nB: Three.\n\nQuestion: Who?"
    assert (hotpot.gold, hotpot.source) == ("yes", "hotpotqa")


@pytest.mark.parametrize(
    "value",
    [
        {},
        None,
        {"prompt": "p", "cot": "", "answer": "a", "gold": "1"},
        {"prompt": "p", "cot": "c", "answer": "a", "gold": None},
        {"question": "q", "answer": "no mark"},
        {"question": "q", "answer": "#### 3"},
        {"problem": "p", "solution": "no box"},
        {"problem": "p", "answer": True},
        {"problem": ["p"], "answer": "3"},
        {"question": "q", "answer": "a", "context": [["A", ["One."]]]},
        {"instruction": "i", "output": "o"},
    ],
)
def test_unusable_problems(value):
    with pytest.raises(RowRejected) as rejection:
        problem_to_example(value)
    assert rejection.value.reason == "malformed"


@real_data
@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("gsm8k_train", 7473),
        ("gsm8k_test", 1319),
        ("math500_test", 500),
        ("math_train_4500", 4500),
        ("aime24", 30),
        ("aime25", 30),
        ("hotpotqa_dev_500", 500),
    ],
)
def test_real_problems_all_load(name, n):
    problems = load_problems(str(DATA / f"{name}.jsonl"))
    assert len(problems) == n
    assert len({p.id for p in problems}) == n
    if name != "hotpotqa_dev_500":
        assert all(last_boxed(p.answer) == p.gold for p in problems)
    assert len(load_problems(str(DATA / f"{name}.jsonl"), limit=7)) == 7


def test_a_bad_problem_is_not_left_out_of_a_score(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"problem": "p", "answer": "1"}, {"problem": "p"}])
    with pytest.raises(ValueError, match="row 2 is no problem"):
        load_problems(path)


@pytest.mark.parametrize("lacking", ["prompt", "cot", "answer", "gold"])
def test_what_a_row_lacks_is_named(lacking):
    row = {name: "1" for name in ("prompt", "cot", "answer", "gold") if name != lacking} | {"question": "q"}
    with pytest.raises(RowRejected, match=rf"it lacks {lacking} "):
        problem_to_example(row)


def test_instructions():
    maths = problem_to_example({"problem": "p", "answer": "1"})
    verbal, direct, abstract = (with_instruction(maths, m)[0]["content"] for m in ("verbal", "direct", "abstract"))
    assert verbal.startswith("p\n\n") and "step by step" in verbal and "\\boxed{}" in verbal
    assert direct == abstract and direct.startswith("p\n\n") and "step" not in direct and "\\boxed{}" in direct
    assert maths.prompt == [{"role": "user", "content": "p"}]
    hotpot = problem_to_example({"question": "q", "answer": "a", "context": {"title": ["A"], "sentences": [["One."]]}})
    assert all("short answer" in with_instruction(hotpot, m)[0]["content"] for m in ("verbal", "abstract"))
    assert "boxed" not in with_instruction(hotpot, "verbal")[0]["content"]
    assert "step" not in with_instruction(hotpot, "abstract")[0]["content"]
    with pytest.raises(ValueError, match="mode must be one of verbal, direct, abstract, got 'cot'"):
        with_instruction(maths, "cot")


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("\\boxed{1} and \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("\\boxed{4}, then \\boxed{5", "4"),
        ("\\fbox{ 3 }", "3"),
        ("\\boxed{}", ""),
        ("boxed{5}", None),
        ("\\boxed{" * 100_000, None),
    ],
)
def test_last_boxed(text, box):
    assert last_boxed(text) == box
