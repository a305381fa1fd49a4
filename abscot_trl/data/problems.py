"""Problems: GSM8K, MATH, MATH-500, AIME, HotpotQA, GPQA and AlpacaEval rows, told apart by their columns."""

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from abscot_trl.data.dolci import RowRejected, iter_rows
from abscot_trl.data.reasoning_gym import cot_of
from abscot_trl.errors import Refused
from abscot_trl.examples import Example

HOTPOTQA, GPQA, ALPACAEVAL, MATHS = "hotpotqa", "gpqa", "alpacaeval", "maths"
GYM = "reasoning_gym"  # asked as maths is, graded by the task itself
OURS = ("prompt", "cot", "answer", "gold")  # the columns of our own files
GPQA_COLUMNS = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
MODES = ("verbal", "direct", "abstract")

_BOX_START = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_CALCULATOR_MARK = re.compile(r"<<.*?>>")
# Abstract and direct share one wording: a prompt that asks for steps gets them, in words, in the answer.
_INSTRUCTIONS = {
    (MATHS, "verbal"): "Please reason step by step, and put your final answer within \\boxed{}.",
    (MATHS, "direct"): "Put your final answer within \\boxed{}.",
    (GPQA, "verbal"): "Please reason step by step, and put the letter of the right option within \\boxed{}.",
    (GPQA, "direct"): "Put only the letter of the right option within \\boxed{}.",
    (HOTPOTQA, "verbal"): (
        "Please reason step by step, then give a short answer (a few words, yes or no) on a last line that begins "
        'with "Answer:".'
    ),
    (HOTPOTQA, "direct"): 'Give only a short answer (a few words, yes or no) on one line that begins with "Answer:".',
}


def kind_of(source: str) -> str:
    """How problems of a `source` are asked and graded: as one of the above (`alpacaeval` not here)."""
    kind = source.partition("/")[0]
    return kind if kind in (HOTPOTQA, GPQA, GYM, ALPACAEVAL) else MATHS


def last_boxed(text: str, tries: int = 8, length: int = 2000) -> str | None:
    r"""
    What the last `\boxed{..}` (or `\fbox{..}`) whose braces close holds, or `None`.

    Escaped braces do not count. Looks at the last `tries` boxes and at most `length` characters of each, so that its
    time is bounded on any text.
    """
    for start in [match.end() for match in _BOX_START.finditer(text)][: -tries - 1 : -1]:
        depth = 1
        for brace in _BRACE.finditer(text, start, start + length):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                return text[start : brace.start()].strip()
    return None


def problem_to_example(row: dict[str, Any]) -> Example:
    r"""
    One row as an `Example` whose prompt is one user message, without an instruction (see `with_instruction`).

    | columns | as in | cot | gold |
    |---|---|---|---|
    | prompt, cot, answer, gold | our GSM8K and MATH files | cot | gold |
    | question, context, answer | HotpotQA, distractor (context: title, sentences) | "" | answer |
    | question, answer (`#### n`) | openai/gsm8k | the lines before `####`, less `<<..>>` | n without commas |
    | problem, solution, answer | HuggingFaceH4/MATH-500 | solution | answer |
    | problem, solution | hendrycks/MATH | solution | its last `\boxed{}` |
    | problem, answer | AIME | "" | answer |
    | Question, Correct Answer, Incorrect Answer 1 .. 3 | Idavidrein/gpqa | "" | the right option's letter |
    | entry (question, answer, metadata), source | `reasoning_gym.py` | what the entry has, or "" | answer |
    | instruction, dataset | AlpacaEval | "" | `None`: a judge compares it (`evaluation/alpaca.py`) |

    `answer` is `The answer is \boxed{gold}.` where the row has only the bare result, for HotpotQA `Answer: gold`.
    GPQA's options stand in an order that a digest of the question fixes, wherever the row stands.

    Raises:
        RowRejected: `malformed`: other columns, or an empty or non-text value among those needed.
    """
    if not isinstance(row, dict):
        raise RowRejected("malformed", "not an object with columns")
    if None in row:  # as csv.DictReader has it
        raise RowRejected("malformed", "more cells than the header has columns")
    columns = {name for name, value in row.items() if value is not None}

    def example(prompt: str, cot: str, answer: str, gold: str, source: str = "") -> Example:
        identifier = _first(row, "id", "unique_id")
        named = next((name for name in ("gsm8k", "aime") if identifier.startswith(name)), "math")
        source = source or _first(row, "dataset_source", "source") or named
        return Example([{"role": "user", "content": prompt}], cot, answer, gold, identifier, source)

    if {*OURS} <= columns:
        return example(*(_text(row, name) for name in OURS))
    if isinstance(row.get("entry"), dict):
        return _of_gym(row)
    if columns & {"cot", "gold"}:
        lacking = [name for name in OURS if name not in columns]
        raise RowRejected("malformed", f"it lacks {', '.join(lacking)} (a row has prompt, cot, answer and gold)")
    if {"question", "context", "answer"} <= columns:
        answer = _text(row, "answer")
        return example(_hotpot_prompt(row), "", f"Answer: {answer}", answer, HOTPOTQA)
    if set(GPQA_COLUMNS) <= columns:
        prompt, gold = _multiple_choice(*(_text(row, name) for name in GPQA_COLUMNS))
        problem = example(prompt, "", _boxed(gold), gold, GPQA)
        return replace(problem, id=_first(row, "Record ID") or problem.id)
    if {"instruction", "dataset"} <= columns:
        return replace(
            example(_text(row, "instruction"), "", "", "", f"{ALPACAEVAL}/{_text(row, 'dataset')}"), gold=None
        )
    if {"question", "answer"} <= columns:
        solution, mark, number = _text(row, "answer").rpartition("####")
        gold = number.strip().replace(",", "")
        cot = _CALCULATOR_MARK.sub("", solution).strip()
        if not (mark and gold and cot):
            raise RowRejected("malformed", "the answer lacks its solution or its '#### n'")
        return example(_text(row, "question"), cot, _boxed(gold), gold, "gsm8k")
    if "problem" in columns and columns & {"answer", "solution"}:
        cot = _text(row, "solution") if "solution" in columns else ""
        gold = _text(row, "answer") if "answer" in columns else last_boxed(cot)
        if not gold:
            raise RowRejected("malformed", "the solution holds no \\boxed{} result")
        return example(_text(row, "problem"), cot, _boxed(gold), gold)
    raise RowRejected(
        "malformed",
        f"columns {sorted(columns)} are those of no known problem set (yours has prompt, cot, answer and gold)",
    )


def _of_gym(row: dict[str, Any]) -> Example:
    entry = row["entry"]
    prompt = [{"role": "user", "content": _text(entry, "question") if "question" in entry else ""}]
    gold = _text(entry, "answer") if entry.get("answer") is not None else None
    answer = "" if gold is None else _boxed(gold)
    source, text = _first(row, "source"), json.dumps(entry)
    return Example(prompt, cot_of(entry), answer, gold, _first(row, "id"), source, text)


def _first(row: dict[str, Any], *columns: str) -> str:
    return next((str(row[name]) for name in columns if row.get(name) is not None), "")


def _text(row: dict[str, Any], column: str) -> str:
    value = row[column]
    if isinstance(value, int) and not isinstance(value, bool):  # AIME's answers on some hub copies
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise RowRejected("malformed", f"{column} is empty or not text")
    return value.strip()


def _boxed(gold: str) -> str:
    return f"The answer is \\boxed{{{gold}}}."


def _multiple_choice(question: str, *options: str) -> tuple[str, str]:
    """The prompt, and the letter of the first option."""
    digest = hashlib.sha256(question.encode()).digest()
    order = np.random.default_rng(list(digest)).permutation(len(options)).tolist()
    lines = [f"{letter}) {options[index]}" for letter, index in zip("ABCD", order, strict=True)]
    return "\n".join([question, "", *lines]), "ABCD"[order.index(0)]


def _hotpot_prompt(row: dict[str, Any]) -> str:
    try:
        titles, sentences = row["context"]["title"], row["context"]["sentences"]
        if not all(isinstance(each, list) for each in (titles, sentences, *sentences)):
            raise TypeError("a text where a list is wanted")
        pairs = list(zip(titles, sentences, strict=True))
        paragraphs = [f"{title}: {''.join(parts).strip()}" for title, parts in pairs]
    except (TypeError, KeyError, ValueError) as error:
        raise RowRejected("malformed", f"context is not titles and their sentences ({error})") from error
    return "\n\n".join([*paragraphs, f"Question: {_text(row, 'question')}"])


def problem_rows(data: str | list[str], split: str, config: str | None) -> Iterator[dict[str, Any]]:
    """`iter_rows`, and the two forms that AlpacaEval and GPQA come in: one JSON list, CSV."""
    path = Path(data).expanduser() if isinstance(data, str) else None
    if path is None or path.suffix not in (".json", ".csv") or not path.is_file():
        yield from iter_rows(data, split, config, shuffle_buffer=0)
        return
    with open(path, newline="") as file:
        try:
            yield from csv.DictReader(file) if path.suffix == ".csv" else json.load(file)
        except (ValueError, TypeError, RecursionError) as error:
            kind = "CSV" if path.suffix == ".csv" else "JSON list"
            raise Refused(f"{path} is no {kind} of problems ({error})") from error


def load_problems(
    data: str | list[str], split: str = "test", config: str | None = None, limit: int | None = None
) -> list[Example]:
    """
    The problems of local files (.jsonl, .parquet, .json, .csv), a hub dataset or a task of reasoning-gym, in their
    order, the first `limit` at most. One without an id gets its row's number.

    Raises:
        Refused: a row that is no problem; leaving it out would change the score. The message says which. A hub
            dataset that is not handed out.
    """
    examples = []
    try:
        for number, row in enumerate(islice(problem_rows(data, split, config), limit), 1):
            try:
                example = problem_to_example(row)
                json.dumps(asdict(example), ensure_ascii=False).encode()  # no half of a surrogate pair
            except (RowRejected, UnicodeEncodeError) as rejection:
                raise Refused(f"{data}: row {number} is no problem to evaluate ({rejection})") from rejection
            examples.append(example if example.id else replace(example, id=str(number)))
    except ValueError as error:
        if "gated" not in str(error):
            raise
        raise Refused(
            f"{error}. The hub hands {data} only to who accepted its terms: do so on its page and log in with "
            "`hf auth login`, or give a local .csv, .jsonl or .parquet file of its rows as `problems`"
        ) from error
    return examples


def with_instruction(example: Example, mode: str) -> list[dict[str, str]]:
    r"""
    The prompt's messages with the instruction of `mode` after the last user message; the example stays as it is.

    Args:
        example (`Example`): HotpotQA (by its `source`) is asked for a short answer, GPQA for a letter in `\boxed{}`,
            AlpacaEval for nothing more, all others for `\boxed{}`.
        mode (`str`): `verbal` asks for steps, `direct` and `abstract` only for the answer.

    Raises:
        Refused: another mode, or a prompt whose last message is not the user's.
    """
    if mode not in MODES:
        raise Refused(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not example.prompt or example.prompt[-1]["role"] != "user":
        raise Refused(f"the prompt of {example.id!r} does not end with a user message; nothing to instruct")
    kind = kind_of(example.source)
    if kind == ALPACAEVAL:
        return example.prompt
    instruction = _INSTRUCTIONS[MATHS if kind == GYM else kind, "verbal" if mode == "verbal" else "direct"]
    *earlier, last = example.prompt
    return [*earlier, {"role": "user", "content": f"{last['content']}\n\n{instruction}"}]
