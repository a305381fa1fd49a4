"""
Problems of reasoning-gym, scored by the task that made them, in a child process that may be killed.

Some tasks hand the answer to `eval` or to sympy's `parse_expr`: `9**9**9**9` would stop a training run for good.
"""

import json
import logging
from functools import cache

from abscot_trl.data.problems import last_boxed
from abscot_trl.errors import Refused
from abscot_trl.evaluation.child import LIMITS, Child, limited, serve

SOURCE = "reasoning_gym/"  # how the `source` of such a problem begins; its task follows
AS_TUPLES = ("arc_agi", "rearc")  # their grids equal an answer's only as tuples, which JSON does not know

logger = logging.getLogger(__name__)
_child = Child(__name__)


def score_puzzle(task: str, response: str, entry: str) -> float:
    r"""
    What the task gives for the answer: in `\boxed{}`, or else the last line. Many give a little for the right form.

    Args:
        task (`str`): reasoning-gym's name of it.
        entry (`str`): what the task made, as JSON: question, answer, metadata.

    Returns:
        `float`: 0..1; 0 for an answer that the task cannot read or not score in time.

    Raises:
        Refused: no reasoning-gym, no such task, or an entry that it cannot score.
    """
    answer = puzzle_answer(response)
    reply = _child.ask([task, answer, entry])
    if reply is ...:
        logger.warning("counted as wrong, not scored within %s: %.80r for %s", LIMITS, answer, task)
        return 0.0
    if isinstance(reply, str):
        raise Refused(reply)
    return reply


def puzzle_answer(response: str) -> str:
    """What is boxed, or else the last line; nothing where the box is cut off."""
    boxed = last_boxed(response)
    if boxed is not None or "\\boxed" in response:
        return boxed or ""
    return (response.strip().splitlines() or [""])[-1].strip()


@cache
def _scorer(task: str):
    from reasoning_gym import get_score_answer_fn

    return get_score_answer_fn(task)


def _tuples(value):
    if isinstance(value, dict):
        return {key: _tuples(each) for key, each in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _score(task: str, answer: str, entry: str) -> float | str:
    """Where there is no score, why."""
    try:
        scorer = _scorer(task)
    except ImportError as error:
        return f"source: {SOURCE}{task} needs reasoning-gym ({error}); run `pip install reasoning-gym`"
    except Exception as error:  # noqa: BLE001 (of a third party's registry, any)
        return f"source: reasoning-gym has no task {task!r} ({error}); see its GALLERY.md for their names"
    try:
        content = json.loads(entry)
        content = _tuples(content) if task in AS_TUPLES else content
        right = content["answer"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return f"entry: {entry!r:.80} of {task} is no entry of reasoning-gym in JSON ({error!r:.80}); prepare it again"
    try:
        return min(max(float(limited(scorer, answer, content)), 0.0), 1.0)
    except Exception:  # noqa: BLE001 (tasks raise on what they cannot read: the answer, or the entry)
        pass
    try:
        limited(scorer, right, content)
    except Exception as error:  # noqa: BLE001
        return f"entry: {task} cannot score its own answer {right!r:.80} ({error!r:.80}); prepare it again"
    return 0.0


if __name__ == "__main__":
    serve(lambda request: _score(*request))
