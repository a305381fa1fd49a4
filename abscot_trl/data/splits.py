"""The staged data D_{t,1}, D_{t,2} of the warm-up (section 3.2): parts of D, disjoint over rounds and phases."""

import json
import random
from pathlib import Path

from abscot_trl.errors import Refused
from abscot_trl.storage import read_json, write_whole

PHASES = ("bottleneck", "distill")


def staged_splits(n_rows: int, rounds: int, rows_per_phase: int, seed: int) -> dict[str, list[int]]:
    """
    Draw row indices for every phase without replacement.

    Args:
        n_rows (`int`): rows of D.
        rounds (`int`): T.
        rows_per_phase (`int`): N, the size of each part.
        seed (`int`): same seed, same parts.

    Returns:
        `dict` with keys `1.bottleneck`, `1.distill`, .., `T.distill`, each a list of N indices into D.

    Raises:
        Refused: fewer than 2 T N rows, or `rounds` or `rows_per_phase` under 1.
    """
    if rounds < 1 or rows_per_phase < 1:
        raise Refused(f"rounds and rows_per_phase must be at least 1, got {rounds} and {rows_per_phase}")
    needed = len(PHASES) * rounds * rows_per_phase
    if n_rows < needed:
        raise Refused(
            f"{rounds} rounds of {len(PHASES)} phases with {rows_per_phase} rows each need {needed} rows, "
            f"the data has {n_rows}: set rows_per_phase to at most {n_rows // (len(PHASES) * rounds)}, "
            "lower rounds, or prepare more rows"
        )
    order = random.Random(seed).sample(range(n_rows), needed)
    keys = [f"{t}.{phase}" for t in range(1, rounds + 1) for phase in PHASES]
    return {key: order[i * rows_per_phase : (i + 1) * rows_per_phase] for i, key in enumerate(keys)}


def save_splits(path: str | Path, splits: dict[str, list[int]], n_rows: int, seed: int) -> None:
    """Write `splits` with what they were drawn from as JSON, whole or not at all."""
    write_whole(path, json.dumps({"settings": _settings(splits, n_rows, seed), "splits": splits}) + "\n")


def load_splits(
    path: str | Path,
    n_rows: int,
    rounds: int | None = None,
    rows_per_phase: int | None = None,
    seed: int | None = None,
) -> dict[str, list[int]]:
    """
    Read splits written by `save_splits`; settings left `None` are not compared.

    Raises:
        Refused: no such file;
            not such a file, or one with a part missing or without row numbers; or drawn with other settings than asked
            for; the message shows the difference.
    """
    if not Path(path).is_file():
        raise Refused(
            f"{path} is not there; run `abscot warmup`, which draws the splits, or leave `splits` and `part` out to "
            "use all rows"
        )
    remedy = "remove it to draw them anew"
    content = read_json(path, remedy, settings=dict, splits=dict)
    kept, splits = content["settings"], content["splits"]
    asked = {"n_rows": n_rows, "rounds": rounds, "rows_per_phase": rows_per_phase, "seed": seed}
    different = [
        f"{name} {kept.get(name)!r:.80} there, {value} asked for"
        for name, value in asked.items()
        if value is not None and kept.get(name) != value
    ]
    if different:
        raise Refused(
            f"{path} was drawn for something else: {'; '.join(different)}. Ask for what it holds, or start a new run"
        )
    for part, rows in splits.items():
        if not isinstance(rows, list) or not rows or not all(type(row) is int and 0 <= row < n_rows for row in rows):
            raise Refused(f"{path} is damaged ({part!r:.80} holds no row numbers under {n_rows}); {remedy}")
    missing = [part for t in range(1, (rounds or 0) + 1) for phase in PHASES if (part := f"{t}.{phase}") not in splits]
    if missing:
        raise Refused(f"{path} is damaged (it has no part {missing[0]}); {remedy}")
    return splits


def part_rows(splits: str | None, part: str | None, n_rows: int) -> list[int]:
    """
    Row numbers of one part of the staged splits, of all its parts (`part` is `None`), or of all the data.

    Raises:
        Refused: the splits have no such part.
    """
    if splits is None:
        return list(range(n_rows))
    parts = load_splits(splits, n_rows=n_rows)
    if part is None:
        return [row for rows in parts.values() for row in rows]
    if part not in parts:
        raise Refused(f"{splits} has no part {part!r}; it has {', '.join(parts):.200}")
    return parts[part]


def run_splits(path: str | Path, n_rows: int, rounds: int, rows_per_phase: int, seed: int) -> dict[str, list[int]]:
    """The splits of a run: drawn when it starts; when it goes on, those at `path`, if they are the ones asked for."""
    if Path(path).is_file():
        return load_splits(path, n_rows, rounds, rows_per_phase, seed)
    return staged_splits(n_rows, rounds, rows_per_phase, seed)


def _settings(splits: dict[str, list[int]], n_rows: int, seed: int) -> dict[str, int]:
    rows_per_phase = len(next(iter(splits.values())))
    return {"n_rows": n_rows, "rounds": len(splits) // len(PHASES), "rows_per_phase": rows_per_phase, "seed": seed}
