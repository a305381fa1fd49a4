"""
Problems of reasoning-gym, scored by the task that made them, in a child process that may be killed.

Some tasks hand the answer to `eval` or to sympy's `parse_expr`: `9**9**9**9` would stop a training run for good.
"""

import logging

from abscot_trl.data.problems import last_boxed
from abscot_trl.errors import Refused
from abscot_trl.evaluation.child import LIMITS, Child

logger = logging.getLogger(__name__)
_child = Child("abscot_trl.evaluation.puzzle_child")


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
