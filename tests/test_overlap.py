"""Rows that hold a problem of the evaluation: found as a slow comparison finds them, and left out of `abscot data`."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from tiny import row, write_jsonl

from abscot_trl.data import prepare as module
from abscot_trl.data.overlap import ProblemIndex, load_index, words
from abscot_trl.data.prepare import DataArguments, load_prepared, prepare
from abscot_trl.data.problems import load_problems
from abscot_trl.errors import Refused

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real rows are not at {DATA}")
LONG = "a train leaves the town at seven and needs three hours for its way to the sea"


def reason(problem: str, text: str) -> str | None:
    found = ProblemIndex([("here", problem)]).find(text)
    return found and found.reason


def slow(problems: list[str], text: str) -> str | None:
    """Of texts of plain words."""
    if any(each in [text, *text.split("\n")] for each in problems):
        return "same"
    padded = f" {' '.join(text.split())} "
    for problem in problems:
        parts = problem.split()
        for i in range(len(parts)):
            if len(parts[i : i + 13]) == 13 and f" {' '.join(parts[i : i + 13])} " in padded:
                return "ngram"
    return None


def test_random_texts_against_a_slow_comparison():
    rng, found = random.Random(0), Counter()
    for _ in range(60):
        problems = [" ".join(rng.choices("abcd", k=rng.randint(1, 40))) for _ in range(8)]
        index = ProblemIndex((str(i), text) for i, text in enumerate(problems))
        for _ in range(60):
            source = rng.choice(problems).split()
            start, length = rng.randrange(len(source)), rng.randint(8, 20)
            parts = [rng.choices("abcdefgh", k=rng.randint(0, 9)), source[start : start + length]]
            parts.append(rng.choices("abcdefgh", k=rng.randint(0, 9)))
            text = rng.choice(" \n").join(" ".join(part) for part in parts if part)
            overlap, wanted = index.find(text), slow(problems, text)
            assert (overlap and overlap.reason) == wanted, (problems, text)
            if overlap:
                assert overlap.text == problems[int(overlap.problem)] and slow([overlap.text], text) == wanted
            found[wanted] += 1
    assert min(found["same"], found["ngram"], found[None]) > 100


def test_thirteen_copied_words_are_found_and_twelve_are_not():
    copied = LONG.split()
    assert reason(LONG, f"we know that {' '.join(copied[2:15])} or so") == "ngram"
    assert reason(LONG, f"we know that {' '.join(copied[2:14])} or so") is None


@pytest.mark.parametrize(
    ("problem", "text", "wanted"),
    [
        ("Élan’s ＣＡＴ, well-known!", "élan's cat -- WELL known?", "same"),
        ("It costs $1,000.", "it costs $1000", "same"),
        ("What is 3+4?", "What is 3 + 4", "same"),
        ("What is 3+4?", "What is 3-4?", None),
        ("What is 3−4?", "what is 3-4", "same"),
        ("Factor $x^2-y^2$.", "Factor $x^2+y^2$.", None),
        ("What is 3+4?", "What is 3+5?", None),
        ("What is 3+4?", "Solve this.\n\n**What is 3+4?**\n\nPut it in a box.", "same"),
        ("What is 3+4?", "Say what is 3+4 now", None),
        ("...", "\n\n", None),
        (LONG, LONG.upper().replace(" ", ", "), "same"),
        (f"{LONG} 7 times", f"{LONG.replace('seven', 'eight')} 8 times", None),
    ],
)
def test_what_counts_as_the_same(problem, text, wanted):
    assert reason(problem, text) == wanted


def test_numbers_are_words_so_that_a_template_is_no_problem():
    template = "Ann has {} red balls and {} blue balls and buys {} more balls of each kind. How many has she now?"
    assert reason(template.format(3, 4, 5), template.format(3, 4, 6)) is None
    assert reason(template.format(3, 4, 5), template.format(7, 4, 5)) == "ngram"  # all but the first number


def test_an_empty_list_has_no_index_and_a_recipe_names_its_problems(tmp_path):
    assert load_index([]) is None
    problems = write_jsonl(tmp_path / "test.jsonl", [{"problem": LONG, "answer": "3"}])
    (tmp_path / "eval.yaml").write_text(f"problems: {problems}\nmodes: [abstract]\n")
    found = load_index([str(tmp_path / "eval.yaml")]).find(LONG)
    assert found == ("same", f"problem 1 of {tmp_path / 'eval.yaml'}", LONG)
    (tmp_path / "other.yaml").write_text("data: x\n")
    with pytest.raises(Refused, match="other.yaml names no problems"):
        load_index([str(tmp_path / "other.yaml")])


@real
def test_real_problems_against_themselves_and_others():
    math = load_index([str(DATA / "math500_test.jsonl")])
    problems = load_problems(str(DATA / "math500_test.jsonl"))
    found = [math.find(problem.prompt[0]["content"]) for problem in problems]
    assert all(overlap and overlap.reason == "same" for overlap in found)
    assert all(f"problem {p.id} of" in overlap.problem for p, overlap in zip(problems, found, strict=True))
    gsm8k = load_index([str(DATA / "gsm8k_test.jsonl")])
    train = [problem.prompt[0]["content"] for problem in load_problems(str(DATA / "gsm8k_train.jsonl"))]
    found = [(text, overlap) for text in train if (overlap := gsm8k.find(text))]
    # The splits are apart but for a few stories told twice.
    assert 0 < len(found) < 75 and not any(overlap.reason == "same" for _, overlap in found)
    for text, overlap in found:
        parts = words(overlap.text)
        windows = {tuple(parts[i : i + 13]) for i in range(len(parts) - 12)}
        parts = words(text)
        assert any(tuple(parts[i : i + 13]) in windows for i in range(len(parts) - 12))


@real
def test_of_hotpotqa_only_the_question_counts():
    index = load_index([str(DATA / "hotpotqa_dev_500.jsonl")])
    told = []
    for example in load_problems(str(DATA / "hotpotqa_dev_500.jsonl"), limit=50):
        paragraphs, question = example.prompt[0]["content"].rsplit("Question: ", 1)
        assert index.find(question).reason == index.find(example.prompt[0]["content"]).reason == "same"
        told.append(index.find(paragraphs) is not None)
    assert sum(told) <= 10  # some questions are copied from a paragraph


# abscot data


@pytest.fixture
def fields(tmp_path, tokenizer_folder, monkeypatch):
    """30 rows, of which 4 are a problem and 3 hold a part of one; shards of 8."""
    monkeypatch.setattr(module, "SHARD", 8)
    monkeypatch.setattr(module, "CHUNK", 4)
    asked = [f"What is {i}?" for i in range(30)]
    for i in (9, 10, 20, 29):
        asked[i] = "What is the sum?"
    for i in (3, 17, 18):
        asked[i] = f"Row {i}: {LONG}"
    rows = [row(earlier=(("user", text),), id=f"r{i}") for i, text in enumerate(asked)]
    problems = [{"problem": "what is the SUM", "answer": "1", "id": "p7"}, {"problem": LONG, "answer": "2"}]
    return {
        "data": [write_jsonl(tmp_path / "rows.jsonl", rows)],
        "not_in": [write_jsonl(tmp_path / "test.jsonl", problems)],
        "tokenizer": tokenizer_folder,
        "shuffle_buffer": 0,
    }


def test_data_drops_and_counts(fields, tmp_path):
    folders = {}
    for num_proc in (1, 2):
        args = DataArguments(**fields, overlap="drop", num_proc=num_proc, output_dir=str(tmp_path / str(num_proc)))
        counts = prepare(args)
        assert counts["filtered"] == {"overlap_same": 4, "overlap_ngram": 3} and counts["rows_kept"] == 23
        folders[num_proc] = load_prepared(args.output_dir)[0]["id"][:]
    assert folders[1] == folders[2] == [f"r{i}" for i in range(30) if i not in (3, 9, 10, 17, 18, 20, 29)]
    counts = prepare(DataArguments(**fields | {"not_in": []}, output_dir=str(tmp_path / "all")))
    assert counts["rows_kept"] == 30 and not counts["filtered"]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_data_refuses_in_words_and_drop_goes_on(fields, tmp_path, num_proc):
    args = fields | {"output_dir": str(tmp_path / "out"), "num_proc": num_proc}
    rows = Path(args["data"][0]).read_text().splitlines()
    rows = [text for i, text in enumerate(rows) if i not in (3, 9, 10)]  # the first shard is free of problems
    Path(args["data"][0]).write_text("\n".join(rows))
    words_of_it = r"rows.jsonl: row 15 as read \(r17\) shares 13 words .*problem 2 of .*test.jsonl, 'a train .*drop"
    with pytest.raises(Refused, match=words_of_it):
        prepare(DataArguments(**args))
    assert [file.name for file in (tmp_path / "out.parts").glob("0*.json")] == ["00000.json"]
    counts = prepare(DataArguments(**args, overlap="drop"))
    assert counts["filtered"] == {"overlap_same": 2, "overlap_ngram": 2} and counts["settings"]["overlap"] == "drop"


def test_other_problems_are_other_settings(fields, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    args = fields | {"output_dir": str(tmp_path / "out")}
    with monkeypatch.context() as patch:
        patch.setattr(module.Shards, "join", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare(DataArguments(**args, overlap="drop"))
    with pytest.raises(Refused, match='finished shards left out rows .*"filtered.overlap_same": 4.*overlap: drop'):
        prepare(DataArguments(**args))
    Path(fields["not_in"][0]).write_text(json.dumps({"problem": "another", "answer": "1"}))
    with pytest.raises(Refused, match="begun with other settings .*inputs"):
        prepare(DataArguments(**args, overlap="drop"))
