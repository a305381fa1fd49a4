"""Right or wrong: maths by math-verify, GPQA by the letter, HotpotQA by its rules, reasoning-gym by its tasks."""

import re
import string
from collections import Counter

from abscot_trl.data.problems import GPQA, GYM, HOTPOTQA, kind_of, last_boxed
from abscot_trl.errors import Refused
from abscot_trl.evaluation.equality import equal
from abscot_trl.evaluation.puzzles import puzzle_answer, score_puzzle

LENGTH = 500  # characters of an answer; longer ones are wrong unread (the longest gold in MATH has 81)
RIGHT = 0.5  # the least score of an answer that is called right, where scores are not 1 or 0 (HotpotQA's F1)
TAIL = 200  # characters at the end of a response without a box in which its answer is looked for

_STATED = re.compile(r"\banswer(?:\s+is\b|\s*[:=])", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?=\s|$)|\n")
_TEXT = r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s*"
_TEXTS = re.compile(_TEXT + r"\{([^{}]*)\}")
# What math-verify 0.9 reads as another number, or not at all.
_NORMALISATIONS = (
    (re.compile(r"\s*\\!\s*"), ""),  # 10,\!080
    (re.compile(r"\{,\}"), ","),  # 10{,}080
    (re.compile(r"(?<=\d)(?:\\[,;: ]|~|\s)\s*(?=\d{3}(?!\d))"), ""),  # 28\,800
    (re.compile(r"\^\s*\{?\s*" + _TEXT + r"\{\s*(?:st|nd|rd|th)\s*\}\s*\}?"), ""),  # 12^{\text{th}}
    (re.compile(_TEXT + r"\{\s*(-?[\d.,]*\d)\s*\}"), r"\1"),  # \text{4.5}
    (re.compile(_TEXT + r"\{\s*(-?[\d.,]*\d)\s+([A-Za-z][^{}]*)\}"), r"\1 \\text{ \2}"),  # \text{18 dollars}
    (re.compile(r"^(\\?\$?-?\d[\d.,]*)((?:\s+[A-Za-z]{3,})+\.?)$"), r"\1 \\text{\2}"),  # 18 dollars
)
_BASE = re.compile(r"_\s*\{?\s*(\d+)\s*\}?$")
# A unit in text or letters, at the end; its names by the first of them.
_UNIT = re.compile(rf"(?:{_TEXT}\{{([^{{}}]*)\}}|(?<![A-Za-z\\])([A-Za-z][A-Za-z./ ]*))\s*(\^\s*\{{?\s*\d\s*\}}?)?$")
_UNIT_NAME = re.compile(r"(?:(square|sq\.?|cubic|cu\.?)\s+)?([a-z]+?)(?:s|\.)?(?:\s*\^\D*(\d)\D*)?")
_UNITS = {
    name: names.split()[0]
    for names in (
        "mm millimeter millimetre", "cm centimeter centimetre", "m meter metre", "km kilometer kilometre",
        "in inch inche", "ft foot feet", "yd yard", "mi mile", "mg milligram", "g gm gram", "kg kilogram",
        "lb pound", "oz ounce", "ml milliliter millilitre", "l liter litre", "s sec second", "min minute",
        "h hr hour", "day", "week", "month", "year", "cent", "dollar", "degree", "radian rad",
    )
    for name in names.split()
}  # fmt: skip
_CHOICE = re.compile(r"^\W*([A-D])(?:\W*$|[).:,])")  # B, (B), B) 10 m


def score(response: str, gold: str | None, source: str = "", entry: str | None = "") -> float:
    """
    1 or 0, F1 in 0..1 for HotpotQA, for a problem of reasoning-gym what its own task gives in 0..1, by its `entry`.

    Raises:
        Refused: an empty `gold`; a problem of reasoning-gym without a sound entry, or no reasoning-gym.
    """
    if kind_of(source) == GYM:
        if not entry:
            raise Refused(f"a row of {source} has no `entry`, which its task scores by; prepare the problems again")
        return score_puzzle(source.partition("/")[2], response, entry)
    if kind_of(source) == HOTPOTQA:
        return hotpot_scores(short_answer(response), gold)[1]
    if kind_of(source) == GPQA:
        return float(extract_answer(response, source) == gold)
    return float(is_correct(response, gold))


def stated(gold: str, source: str = "") -> str:
    """A response that gives `gold` as a problem of that `source` asks for it."""
    return f"Answer: {gold}" if kind_of(source) == HOTPOTQA else f"\\boxed{{{gold}}}"


def extract_answer(response: str, source: str = "") -> str | None:
    """The short answer that is graded: what is boxed or stated, GPQA's letter, HotpotQA's line; `None` without it."""
    if kind_of(source) == HOTPOTQA:
        return short_answer(response) or None
    if kind_of(source) == GYM:
        return puzzle_answer(response) or None
    answer = _answer_of(response)
    choice = _CHOICE.match(_TEXTS.sub(r"\1", answer)) if kind_of(source) == GPQA else None
    return choice.group(1) if choice else answer or None


def normal_form(answer: str | None, source: str = "") -> str:
    """What two answers must share to count as one (votes, changed answers); equal values may differ in it."""
    answer = answer or ""
    if kind_of(source) == GYM:
        return answer
    return _normalise_words(answer) if kind_of(source) == HOTPOTQA else _plain(_normalise(answer))


def is_correct(response: str, gold: str) -> bool:
    r"""
    Whether the last `\boxed{}` of `response` equals `gold`, by math-verify after a small normalisation.

    Without a box, what follows the last "answer is" or "answer:" in the last 200 characters is graded, up to the end
    of its sentence, or else the whole response if it is one line of at most 200 characters. Garbage, endless loops
    and expressions too hard to compare in time are wrong, never an error.

    An inequality equals its interval, `a \pm b` its two values; open and closed ends differ, and so do numbers
    written in different bases. A unit on one side only does not count, two units must be one; numbers that an answer
    sets equal (`1 = 2 = 5`) must be.

    Raises:
        Refused: `gold` is empty.
    """
    if not gold.strip():
        raise Refused("gold is empty: nothing to grade against; drop the row")
    answer, gold = _normalise(_answer_of(response)), _normalise(gold)
    if not answer or len(answer) > LENGTH:
        return False
    if _plain(answer) == _plain(gold):
        return True
    bases = _BASE.search(answer), _BASE.search(gold)
    if all(bases) and bases[0].group(1) != bases[1].group(1):
        return False
    (answer, unit), (gold, wanted) = _without_unit(answer), _without_unit(gold)
    if unit and wanted and unit != wanted:
        return False
    return equal(gold, answer)


def _without_unit(answer: str) -> tuple[str, list[tuple[str, int]]]:
    """A number without its unit, and the unit: names with powers, two of `m/s`; anything else as it is, and none."""
    if answer.startswith("\\$"):
        return answer, [("dollar", 1)]
    found = _UNIT.search(answer)
    number = re.sub(r"(?:\\[,;: ]|~|\s)+$", "", answer[: found.start()]) if found else ""
    if not re.search(r"\d", number) or re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", number)):
        return answer, []
    text = (found[1] or found[2]) + (found[3] or "")
    unit = []
    for part in re.split(r"/|\bper\b", text.casefold()):
        name = _UNIT_NAME.fullmatch(part.strip(" ~.,\\"))
        if name is None or name[2] not in _UNITS:
            return answer, []
        unit.append((_UNITS[name[2]], int(name[3] or {"s": 2, "c": 3}.get((name[1] or "-")[0], 1))))
    return number, unit


def _answer_of(response: str) -> str:
    answer = last_boxed(response)
    if answer is None:  # a box cut off at the token limit states nothing
        return "" if "\\boxed" in response else _stated_answer(response)
    return answer


def _stated_answer(response: str) -> str:
    tail = response.rstrip()[-TAIL:]
    stated = list(_STATED.finditer(tail))
    if stated:
        tail = tail[stated[-1].end() :].lstrip(" :*\n")
        tail = _SENTENCE_END.split(tail, maxsplit=1)[0]
    elif len(response.strip()) > TAIL or "\n" in tail.strip():
        return ""
    return tail.strip().strip("*$").removeprefix("\\(").removesuffix("\\)")


def _normalise(answer: str) -> str:
    for pattern, replacement in _NORMALISATIONS:
        answer = pattern.sub(replacement, answer)
    return answer.strip().removesuffix(".").strip()


def _plain(answer: str) -> str:
    """Without text wrappers, spaces that separate nothing, and case."""
    answer = _TEXTS.sub(r"\1", answer)
    return re.sub(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])", "", answer).casefold()


def short_answer(response: str) -> str:
    """The part of a response that HotpotQA's rules see: what follows the last "Answer:", or else the last line."""
    before, mark, after = response.rpartition("Answer:")
    lines = (after if mark else response).strip().splitlines() or [""]
    return (lines[0] if mark else lines[-1]).strip().strip("*").strip()


def hotpot_scores(prediction: str, gold: str) -> tuple[bool, float]:
    """
    Exact match and F1 (0..1) of a short answer, as in HotpotQA's official `hotpot_evaluate_v1.py`.

    Case, punctuation and articles do not count; yes, no and noanswer earn no F1 unless both sides agree.
    """
    predicted, wanted = _normalise_words(prediction), _normalise_words(gold)
    if predicted != wanted and {predicted, wanted} & {"yes", "no", "noanswer"}:
        return False, 0.0
    shared = sum((Counter(predicted.split()) & Counter(wanted.split())).values())
    if shared == 0:
        return predicted == wanted, 0.0
    precision, recall = shared / len(predicted.split()), shared / len(wanted.split())
    return predicted == wanted, 2 * precision * recall / (precision + recall)


def _normalise_words(text: str) -> str:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
