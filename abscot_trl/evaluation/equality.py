"""Whether two answers are equal, by math-verify in a child process that may be killed."""

import itertools
import logging
import re

from abscot_trl.evaluation.child import LIMITS, TIMEOUT, Child, limited, serve

logger = logging.getLogger(__name__)
_child = Child(__name__)

_NUMBER = re.compile(r"(?:[\d\s.,+*/^(){}!-]|\\(?:[dt]?frac|sqrt|cdot|times|div|left|right|pi|[,;!]))*")


def equal(gold: str, answer: str) -> bool:
    """Whether two LaTeX expressions are equal; not where the child is killed over them, which is logged."""
    reply = _child.ask([gold, answer])
    if reply not in (True, False):
        logger.warning("counted as wrong, not compared within %s: %.80r with %.80r", LIMITS, answer, gold)
    return reply is True


def _parsed(answer: str) -> list:
    """Its readings, none where it cannot be read. Raises when time or memory runs out, as `parse` does not."""
    from math_verify import parse

    try:
        return limited(parse, f"\\boxed{{{answer}}}", parsing_timeout=TIMEOUT, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 (of sympy, any; TimeoutException is not one)
        return []


def contradicts_itself(answer: str) -> bool:
    """Whether numbers that it sets equal differ by over 1 % (`1 = 2 = 5`, not `\\frac13 = 0.33`)."""
    sides = answer.split("=")
    numbers = [side for side in sides if re.search(r"\d", side) and _NUMBER.fullmatch(side)]
    values = []
    for expression in (found[0] for number in numbers[: 8 * (len(numbers) > 1)] if (found := _parsed(number))):
        try:
            values.append(limited(float, expression))
        except (TypeError, ValueError, OverflowError):
            pass  # a pair, or a number beyond a float
    return len(values) > 1 and max(values) - min(values) > 0.01 * max(map(abs, values))


def _compare(gold: str, answer: str) -> bool | None:
    """
    `None`: parsing or a comparison ran out of time or memory, and no other reading of the two is equal. (Where sympy
    swallows the MemoryError of one of its ways, and no other way finds the two equal, it is `False`.)
    """
    from math_verify import verify
    from math_verify.errors import TimeoutException

    outcome, settings = False, {"allow_set_relation_comp": True, "timeout_seconds": TIMEOUT, "raise_on_error": True}
    try:
        pairs = list(itertools.product(_parsed(gold), _parsed(answer)))
    except (MemoryError, TimeoutException):
        return None
    for pair in pairs:
        try:
            if limited(verify, *pair, **settings):
                return not contradicts_itself(answer)
        except (MemoryError, TimeoutException):
            outcome = None
        except Exception:  # noqa: S112, BLE001 (of sympy, any: the two cannot be compared)
            continue
    return outcome


if __name__ == "__main__":
    serve(lambda pair: _compare(*pair))
