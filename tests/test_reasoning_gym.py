"""Tasks of reasoning-gym by name: rows, prompts, problems and their scores, against the library itself."""

import json
import sys

import pytest

from abscot_trl.data.arguments import DataArguments
from abscot_trl.data.overlap import load_index
from abscot_trl.data.prepare import load_prepared, prepare
from abscot_trl.data.problems import load_problems, with_instruction
from abscot_trl.data.reasoning_gym import SEEDS, STRIDE, rows
from abscot_trl.errors import Refused
from abscot_trl.evaluation.arguments import EvaluateArguments
from abscot_trl.evaluation.evaluate import check_problems, evaluate
from abscot_trl.evaluation.grading import extract_answer, normal_form, score, stated


def refused(words: str, name: str, split: str = "train"):
    with pytest.raises(Refused, match=words):
        next(rows(name, split))


def test_names_of_another_form_are_refused():
    for name in ("reasoning_gym:", "reasoning_gym:a:10", "reasoning_gym:a?size", "reasoning_gym:a?size=1&size=2"):
        refused("write reasoning_gym:<task>", name)
    for size in ("many", "0", "-1", "1.5", "true", "1000001"):
        refused(r"size .* is no whole number of 1 to 1000000", f"reasoning_gym:chain_sum?size={size}")
    refused("seed 2001 is no whole number", "reasoning_gym:chain_sum?seed=2001")


def test_the_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    refused(r"needs reasoning-gym .*abscot_trl\[evidence\]", "reasoning_gym:chain_sum")


def test_tasks_splits_and_settings_that_are_not_there():
    pytest.importorskip("reasoning_gym")
    refused("no task 'chain_sums'; near it: chain_sum", "reasoning_gym:chain_sums")
    refused("no task 'zzzz'; near it: see its GALLERY.md", "reasoning_gym:zzzz")
    refused("the split is train or test, not 'validation'", "reasoning_gym:chain_sum", "validation")
    refused("its settings are .*min_terms", "reasoning_gym:chain_sum?terms=2")
    refused("min_terms must be positive.*its settings are", "reasoning_gym:chain_sum?min_terms=-1")
    refused("its settings are", "reasoning_gym:chain_sum?min_terms=two")


def test_rows_are_the_librarys_of_seeds_that_do_not_meet():
    gym = pytest.importorskip("reasoning_gym")
    name = "reasoning_gym:chain_sum?size=6&seed=7&min_terms=2&max_terms=2&allow_negation=true"
    settings = {"size": 6, "min_terms": 2, "max_terms": 2, "allow_negation": True}
    for split, seed in (("train", 14 * STRIDE), ("test", 15 * STRIDE)):
        wanted = gym.create_dataset("chain_sum", seed=seed, **settings)
        found = list(rows(name, split))
        assert [row["entry"] for row in found] == list(wanted)
        assert [row["id"] for row in found] == [f"chain_sum-{split}-7-{i}" for i in range(6)]
        assert {row["source"] for row in found} == {"reasoning_gym/chain_sum"}
    spans = {(2 * seed + split) * STRIDE for seed in range(SEEDS + 1) for split in range(2)}
    assert len(spans) == 2 * (SEEDS + 1) and max(spans) + STRIDE < 2**32
    # The library's own neighbours do meet: item 1 of seed 0 is item 0 of seed 1.
    assert (
        gym.create_dataset("chain_sum", size=2, seed=0)[1]["question"]
        == (gym.create_dataset("chain_sum", size=1, seed=1)[0]["question"])
    )


def test_problems_are_asked_and_scored_as_the_task_does():
    gym = pytest.importorskip("reasoning_gym")
    problems = load_problems("reasoning_gym:letter_counting?size=30", limit=20)
    dataset = gym.create_dataset("letter_counting", size=30, seed=STRIDE)
    assert len(problems) == 20
    for problem, entry in zip(problems, dataset, strict=False):
        assert problem.prompt[0]["content"] == entry["question"] and problem.gold == entry["answer"]
        assert with_instruction(problem, "direct")[0]["content"].endswith("Put your final answer within \\boxed{}.")
        for answer in (entry["answer"], "99", "so many"):
            given = score(f"I think \\boxed{{{answer}}}", problem.gold, problem.source, problem.entry)
            assert given == dataset.score_answer(answer, entry)
    problem = problems[0]
    assert score(stated(problem.gold, problem.source), problem.gold, problem.source, problem.entry) == 1.0
    assert extract_answer("so\n\\boxed{ 1 }", problem.source) == "1" and extract_answer("so\n1", problem.source) == "1"
    assert normal_form("01", problem.source) != normal_form("1", problem.source)  # no numbers are known here
    with pytest.raises(Refused, match="has no `entry`"):
        score("1", "1", problem.source)


def test_the_training_side_finds_what_the_test_holds():
    """A task with few items repeats itself: `not_in` takes the same name as `problems`."""
    pytest.importorskip("reasoning_gym")
    name = "reasoning_gym:chain_sum?size=200&min_terms=2&max_terms=2&min_digits=1&max_digits=1"
    index, train = load_index([name]), [row["entry"]["question"] for row in rows(name, "train")]
    test = {row["entry"]["question"] for row in rows(name, "test")}
    assert {text for text in train if index.find(text)} >= {text for text in train if text in test} != set()


def test_data_of_a_task_with_a_chain_of_thought(tokenizer_folder, tmp_path):
    gym = pytest.importorskip("reasoning_gym")
    fields = {"tokenizer": str(tokenizer_folder), "shuffle_buffer": 0}
    name = "reasoning_gym:gsm_symbolic?size=12"
    counts = prepare(DataArguments(data=[name], output_dir=str(tmp_path / "data"), **fields))
    assert counts["rows_kept"] == 12 and counts["sources"] == {"reasoning_gym/gsm_symbolic": 12}
    found, _ = load_prepared(tmp_path / "data")
    for row, entry in zip(found, gym.create_dataset("gsm_symbolic", size=12, seed=0), strict=True):
        steps, result = entry["metadata"]["answer_cot"].rsplit("#### ", 1)
        assert row["cot"] == steps.strip() and row["gold"] == entry["answer"] and "####" not in row["cot"]
        assert row["answer"] == f"The answer is \\boxed{{{row['gold']}}}." and float(result) == float(row["gold"])
    with pytest.raises(Refused, match="chain_sum: its entries hold no chain of thought"):
        prepare(DataArguments(data=["reasoning_gym:chain_sum"], output_dir=str(tmp_path / "none"), **fields))
    with pytest.raises(Refused, match="cannot be read with files"):
        prepare(DataArguments(data=[name, "rows.jsonl"], output_dir=str(tmp_path / "mixed"), **fields))
    assert not (tmp_path / "none").exists() and not (tmp_path / "mixed").exists()


@pytest.mark.slow
def test_an_evaluation_by_name(checkpoint, tmp_path):
    """Scores are the task's; after another problem's trace the answer is held against that problem's entry."""
    gym = pytest.importorskip("reasoning_gym")
    name = "reasoning_gym:chain_sum?size=6&max_terms=2&max_digits=1"
    args = EvaluateArguments(
        model=str(checkpoint),
        problems=name,
        output_dir=str(tmp_path / "out"),
        task="chain_sum",
        swaps=["own", "other"],
        max_new_tokens=4,
        instruction=False,
    )
    results = evaluate(args)
    assert [row["metric"] for row in results] == ["score"] * 2
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    dataset = gym.create_dataset("chain_sum", size=6, seed=STRIDE, max_terms=2, max_digits=1)
    for row, entry in zip(answers[:6], dataset, strict=True):
        assert row["problem"] == entry["question"] and row["source"] == "reasoning_gym/chain_sum"
        assert row["score"] == dataset.score_answer(row["answer"] or "", entry)
    mean = 100 * sum(row["score"] for row in answers[:6]) / 6
    assert results[0]["accuracy"] == pytest.approx(mean)
    mixed = load_problems(name)
    mixed[0].source = "gsm8k"
    with pytest.raises(Refused, match="no common measure"):
        check_problems(mixed, args)
