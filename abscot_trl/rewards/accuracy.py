"""Right or wrong, as the evaluation grades it."""

from collections.abc import Sequence

from abscot_trl.data.problems import GYM, kind_of
from abscot_trl.evaluation.grading import score
from abscot_trl.rewards.texts import Messages, completion_text


def accuracy(
    completions: Sequence[Messages],
    gold: Sequence[str | None],
    source: Sequence[str],
    entry: Sequence[str | None] | None = None,
    **_,
) -> list[float | None]:
    r"""
    1 or 0 by math-verify or GPQA's letter, F1 for HotpotQA (`evaluation/grading.py`), and for a problem of
    reasoning-gym what its own task gives (`evaluation/puzzles.py`).

    Args:
        gold (`list[str | None]`): what is right; `None` where there is nothing to verify, and so no reward.
        source (`list[str]`): `reasoning_gym/<task>`, or as `kind_of` reads it.
        entry (`list[str | None]`, *optional*): of reasoning-gym's problems the whole entry, as JSON.

    Returns:
        `list[float | None]`: one for each completion, 0..1.

    Raises:
        Refused: an empty gold, a problem of reasoning-gym without a sound entry, or no reasoning-gym.
    """
    entries = entry or [None] * len(completions)
    rows = zip(map(completion_text, completions), gold, source, entries, strict=True)
    return [_score(*row) for row in rows]


def _score(response: str, gold: str | None, source: str, entry: str | None) -> float | None:
    return None if gold is None and kind_of(source) != GYM else score(response, gold, source, entry)
