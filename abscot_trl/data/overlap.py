"""
Rows to train on that hold a problem of the evaluation: found by equal text or by a shared window of words.

The window is 13 words, as for GPT-3 (arXiv:2005.14165, appendix C) and Qwen2.5-Math. Shorter ones (8 in open-r1 and
Tülu 3) also find what problems say alike without being the same: "how many positive integers less than 1000 are ..".
"""

import re
import unicodedata
from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np

from abscot_trl.data.problems import HOTPOTQA, load_problems
from abscot_trl.errors import Refused
from abscot_trl.examples import Example
from abscot_trl.phases import read_yaml

WINDOW = 13
REASONS = ("same", "ngram")
OnOverlap = Literal["error", "drop"]
NOT_IN_HELP = (
    "The evaluation's problems, that no row may hold: files or hub ids as `problems` of an evaluation takes them, or "
    "recipes of evaluations (.yaml), which name their split too."
)
OVERLAP_HELP = "A row that holds a problem of not_in: refuse all, or leave the row out and count it, by reason."

# A sign before a number or a variable is part of that word: 3+4 is not 3-4. Not so a hyphen, a bullet or **3**.
_SIGN = r"(?:(?<=[^\s*]) ?[-+*/^=<>] ?(?=\d|[^\W\d_](?![^\W\d_])))?"
_WORD = re.compile(rf"{_SIGN}(?:\d+|[^\W\d_]+)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_DASHES = str.maketrans("\u2010\u2011\u2212\u2013", "----")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word's hash is lost; products wrap at 2^64


class Overlap(NamedTuple):
    """`reason`: one of `REASONS`; `problem`: its file or hub id and its id; `text`: the problem."""

    reason: str
    problem: str
    text: str


def words(text: str) -> list[str]:
    """The words of `text`, in lower case, numbers among them; without punctuation, and 1,000 as 1000."""
    text = unicodedata.normalize("NFKC", text).translate(_DASHES).casefold()
    return [word.replace(" ", "") for word in _WORD.findall(_THOUSANDS.sub("", text))]


class ProblemIndex:
    """
    What finds the problems of an evaluation in texts to train on. Memory: the texts, and 12 bytes a word.

    Args:
        problems (iterable of `(str, str)`): of each problem where it stands, in words for a message, and its text.
    """

    def __init__(self, problems: Iterable[tuple[str, str]]):
        self.problems = list(problems)
        self.whole: dict[str, int] = {}
        windows, owners = [], []
        for number, (_, text) in enumerate(self.problems):
            found = words(text)
            if found:  # one of signs alone would be equal to every blank line
                self.whole.setdefault(" ".join(found), number)
            windows.append(_windows(found))
            owners.append(np.full(len(windows[-1]), number, np.uint32))
        hashes = np.concatenate([np.empty(0, np.uint64), *windows])
        self.hashes, first = np.unique(hashes, return_index=True)
        self.owners = np.concatenate([np.empty(0, np.uint32), *owners])[first]

    def find(self, text: str) -> Overlap | None:
        """
        The first problem that `text` holds, or `None`.

        `same`: the words of the text, or of one of its lines, are those of a problem: so short problems are found
        beside an instruction, too. `ngram`: `WINDOW` words in a row are those of a problem. Windows are compared by
        hashes of 64 bits: in 600,000 rows against 10,000 problems one is wrong with a chance of some 1e-5.
        """
        found = words(text)
        for candidate in (found, *(map(words, text.splitlines()) if "\n" in text else ())):
            number = self.whole.get(" ".join(candidate))
            if number is not None:
                return Overlap("same", *self.problems[number])
        hashes = _windows(found)
        if not len(hashes) or not len(self.hashes):
            return None
        places = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        hits = np.flatnonzero(self.hashes[places] == hashes)
        return Overlap("ngram", *self.problems[self.owners[places[hits[0]]]]) if len(hits) else None


def _windows(found: list[str]) -> np.ndarray:
    """Hashes (n - WINDOW + 1,) of all windows of n words; none where n is less than `WINDOW`."""
    size = max(0, len(found) - WINDOW + 1)
    hashes, total = np.array([hash(word) for word in found], np.int64).view(np.uint64), np.zeros(size, np.uint64)
    for offset in range(WINDOW if size else 0):
        total = total * _FACTOR + hashes[offset : offset + size]
    return total


def asked(messages: list[dict[str, str]]) -> str:
    """What the user says in `messages`: the text that is compared."""
    return "\n".join(message["content"] for message in messages if message["role"] == "user")


def load_index(not_in: list[str]) -> ProblemIndex | None:
    """
    The index of all problems that `not_in` names, `None` where it is empty.

    Raises:
        Refused: what `load_problems` raises; a recipe that names no problems; no problems there.
    """
    if not not_in:
        return None
    index = ProblemIndex(entry for name in not_in for entry in _problems(name))
    if not index.whole:
        raise Refused(f"not_in: no problem is in {', '.join(not_in)}")
    return index


def _problems(name: str) -> Iterable[tuple[str, str]]:
    data, options = name, {}
    if name.endswith((".yaml", ".yml")):
        recipe = read_yaml(name)
        if "problems" not in recipe:
            raise Refused(f"not_in: {name} names no problems; give the recipe of an evaluation")
        data = recipe["problems"]
        options = {key: recipe[f"problems_{key}"] for key in ("split", "config") if f"problems_{key}" in recipe}
    for example in load_problems(data, **options):
        for text in _texts(example):
            yield f"problem {example.id} of {name}", text


def _texts(example: Example) -> list[str]:
    """HotpotQA's paragraphs are Wikipedia's, and other questions have them too: only the question counts."""
    text = asked(example.prompt)
    if example.source != HOTPOTQA:
        return [text]
    question = text.rpartition("Question: ")[2]
    return [question, f"Question: {question}"]


def overlapping(row: str, overlap: Overlap) -> Refused:
    """The error of `overlap: error`; `row` says in words which row of which data."""
    how = {
        "same": "is a problem of the evaluation",
        "ngram": f"shares {WINDOW} words in a row with a problem of the evaluation",
    }
    text = " ".join(overlap.text.split())
    return Refused(
        f"{row} {how[overlap.reason]}: {overlap.problem}, {text!r:.200}. Set overlap: drop to leave such rows out, "
        "counted by reason, or take other rows"
    )
