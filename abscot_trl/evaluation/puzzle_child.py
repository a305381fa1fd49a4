"""
What scores reasoning-gym's problems, in the child process of `evaluation/puzzles.py`.

It imports little: torch and transformers would take seconds of each start, and most of the address space it may have.
"""

import json
from functools import cache

from abscot_trl.evaluation.child import limited, serve

AS_TUPLES = ("arc_agi", "rearc")  # their grids equal an answer's only as tuples, which JSON does not know


@cache
def _scorer(task: str):
    from reasoning_gym import get_score_answer_fn

    return get_score_answer_fn(task)


def _tuples(value):
    if isinstance(value, dict):
        return {key: _tuples(each) for key, each in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def score_entry(task: str, answer: str, entry: str) -> float | str:
    """Where there is no score, why."""
    try:
        scorer = _scorer(task)
    except ImportError as error:
        return f"source: reasoning_gym/{task} needs reasoning-gym ({error}); run `pip install reasoning-gym`"
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
    serve(lambda request: score_entry(*request))
