"""
Whether two answers are equal, by math-verify in a child process that may be killed.

math-verify's own timeouts are signals: they work on the main thread only and do not reach arithmetic in C, where
`10^{10^{10}}!` would go on for hours and take the memory of the machine. The child has an address space of its own
and a watchdog that needs no Python. Where they end it, that one comparison is lost; the next one gets another child.
"""

import atexit
import faulthandler
import itertools
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import threading

TIMEOUT = 3  # seconds for one parse or one comparison; a second more and the child is killed
MEMORY = 2**31  # bytes of the child's address space

logger = logging.getLogger(__name__)
_lock = threading.Lock()
_child: tuple[int, subprocess.Popen] | None = None  # with the process that started it: a fork shares no child

_NUMBER = re.compile(r"(?:[\d\s.,+*/^(){}!-]|\\(?:[dt]?frac|sqrt|cdot|times|div|left|right|pi|[,;!]))*")


def equal(gold: str, answer: str) -> bool:
    """Whether two LaTeX expressions are equal; not where the child is killed over them, which is logged."""
    with _lock:
        child = _running()
        try:
            child.stdin.write(json.dumps([gold, answer]) + "\n")
            child.stdin.flush()
            reply = child.stdout.readline()
        except OSError:
            reply = ""
        if not reply:
            _stop()
        if reply not in ("true\n", "false\n"):
            limits = f"{TIMEOUT + 1} s and {MEMORY / 2**30:.0f} GiB"
            logger.warning("counted as wrong, not compared within %s: %.80r with %.80r", limits, answer, gold)
        return reply == "true\n"


def _running() -> subprocess.Popen:
    global _child
    if _child is None or _child[0] != os.getpid():
        pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        _child = os.getpid(), subprocess.Popen([sys.executable, "-m", __name__], **pipe)
    return _child[1]


@atexit.register
def _stop() -> None:
    global _child
    if _child is not None and _child[0] == os.getpid():
        _child[1].kill()
        _child[1].communicate()
    _child = None


def _limited(function, *args, **kwargs):
    faulthandler.dump_traceback_later(TIMEOUT + 1, exit=True, file=_nowhere)
    try:
        return function(*args, **kwargs)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _parsed(answer: str) -> list:
    """Its readings, none where it cannot be read. Raises when time or memory runs out, as `parse` does not."""
    from math_verify import parse

    try:
        return _limited(parse, f"\\boxed{{{answer}}}", parsing_timeout=TIMEOUT, raise_on_error=True)
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
            values.append(_limited(float, expression))
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
            if _limited(verify, *pair, **settings):
                return not contradicts_itself(answer)
        except (MemoryError, TimeoutException):
            outcome = None
        except Exception:  # noqa: S112, BLE001 (of sympy, any: the two cannot be compared)
            continue
    return outcome


def _serve() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business; without it stdin ends
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard < 0 else min(MEMORY, hard), hard))
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_compare(*json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _nowhere = open(os.devnull, "w")  # noqa: SIM115 (the watchdog writes to it as the process ends)
    _serve()
