"""How long training rows will be, before their traces are there: what a phase is sure to refuse, and what it may."""

import math
from pathlib import Path

import numpy as np

from abscot_trl.data.splits import PHASES as PARTS
from abscot_trl.errors import Refused
from abscot_trl.loop.stages import Stage, is_done
from abscot_trl.storage import read_json
from abscot_trl.vocabulary import AbstractVocabulary


def row_tokens(lengths: dict[str, np.ndarray], trace: int | np.ndarray, phase: str, recipe: dict) -> np.ndarray:
    """
    Tokens of a phase's training rows, as its trainer counts them.

    Args:
        lengths (`dict`): tokens of `prompt`, `cot` and `answer` of each row, shape (N,) each.
        trace (`int` or (N,)): tokens of the traces with their delimiters. In the discrete channel a trace stands
            twice where the row holds c.

    Returns:
        `np.ndarray`: (N,); of phase B with rehearsal (2 N,), the masked rows last.
    """
    answered = lengths["prompt"] + trace + lengths["answer"]
    masked = answered + lengths["cot"] + trace * (recipe.get("channel") == "discrete")
    if phase == "bottleneck":
        return masked
    return np.concatenate([answered, masked]) if recipe.get("rehearsal") else answered


def check_lengths(
    todo: list[Stage],
    lengths: dict[str, np.ndarray],
    parts: dict[str, list[int]],
    vocabulary: AbstractVocabulary,
    model: str,
) -> list[str]:
    """
    Set the rows of each training stage that is not done beside its `max_length`. `model` is the first one's folder.

    Returns:
        `list[str]`: sentences on rows that it refuses or drops if their traces are long.

    Raises:
        Refused: rows that it refuses however short their traces are.
    """
    warnings, traces = [], {}
    for stage in todo:
        if stage.phase == "traces":
            traces = stage.settings
        if stage.phase not in PARTS or is_done(stage):
            continue
        part = {name: lengths[name][parts[traces["part"]]] for name in ("prompt", "cot", "answer")}
        policy, m_max = traces["method"] == "policy", vocabulary.m_max
        kept = part  # by the sampler, which drops what leaves it no room
        if policy:
            prefixes = part["prompt"] + part["cot"] * (traces["given"] == "cot")
            kept = {
                name: values[prefixes + m_max + 2 <= _positions(model, traces.get("engine"))]
                for name, values in part.items()
            }
        least = row_tokens(kept, 2 + (vocabulary.m_min if policy else 0), stage.phase, stage.settings)
        most = row_tokens(part, 2 + m_max, stage.phase, stage.settings)
        longest, drops = stage.settings.get("max_length") or 8192, stage.settings.get("overlong") == "drop"
        sure, possible, n = int((least > longest).sum()), int((most > longest).sum()), len(most)
        remedy = "raise it, or prepare the data with max_total_tokens" + (", or set overlong: drop" * (not drops))
        if sure and (not drops or sure == n):
            raise Refused(
                f"{stage.name}: max_length {longest} is shorter than {sure} of {n} rows, however short their traces "
                f"are (the longest has {least.max()} tokens or more); {remedy}"
            )
        if possible and drops:
            warnings.append(f"{stage.name}: max_length {longest} drops {sure} to {possible} of {n} rows")
        elif possible:
            warnings.append(
                f"{stage.name}: max_length {longest} is shorter than {possible} of {n} rows, and they are refused, if "
                f"their traces have m_max {m_max} tokens; {remedy}"
            )
    return warnings


def _positions(model: str, engine: dict | None) -> float:
    """The longest sequence that a sampler takes: the engine's, or else the model's; infinite while nobody knows."""
    config = Path(model) / "config.json"
    known = read_json(config, "run `abscot init` again") if config.is_file() else {}
    return (engine or {}).get("max_model_len") or known.get("max_position_embeddings") or math.inf
