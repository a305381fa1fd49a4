"""results.json: rows that say what they were measured on."""

import json
from pathlib import Path

from abscot_trl.data.problems import MODES
from abscot_trl.errors import Refused
from abscot_trl.storage import write_whole

ROW = (
    "model",
    "task",
    "mode",
    "swap",
    "n",
    "samples",
    "metric",
    "accuracy",
    "trace_tokens",
    "answer_tokens",
    "tokens",
)
DECODING = ("backend", "trace_temperature", "temperature", "top_p", "top_k", "max_new_tokens", "seed")
FIGURES = {  # each with the name of its interval
    name: f"{name}_ci95"
    for name in ("em", "maj", "pass", "difference", "win_rate", "follows", "follows_chance", "repeats")
} | {"accuracy": "ci95"}

TEXTS = ("model", "task", "mode", "swap", "metric", "stage", "run", "sweep")
LIMITS = {  # lowest and highest value of each number
    **dict.fromkeys(("accuracy", "em", "maj", "pass", "win_rate", "follows", "follows_chance", "repeats"), (0, 100)),
    **dict.fromkeys(
        ("n", "follows_n", "samples", "round", "truncated", "trace_tokens", "answer_tokens", "tokens"), (0, 1e9)
    ),
    **{"difference": (-100, 100), "swapped": (0, 1), "changed": (0, 1)},
}


def is_number(value, low: float = -1e300, high: float = 1e300) -> bool:
    """Whether a JSON value is a finite number of `low` .. `high`."""
    return type(value) in (int, float) and low - 1e-6 <= value <= high + 1e-6


def check_row(row: dict) -> None:
    """
    Every figure stands beside what it was measured on.

    Raises:
        Refused: a row without its n, decoding, seed or the interval of one of its figures.
    """
    name = " ".join(str(row.get(key)) for key in ("model", "task", "mode", "swap"))
    needed = [*ROW, *(interval for figure, interval in FIGURES.items() if figure in row)]
    needed += ["difference", "changed"] if row.get("swap") != "own" and row.get("metric") != "lc_win_rate" else []
    needed += ["follows_n"] if "follows" in row else []
    missing = [key for key in needed if row.get(key) is None]
    missing += [f"decoding.{key}" for key in DECODING if (row.get("decoding") or {}).get(key) is None]
    if missing:
        raise Refused(f"results row {name!r} lacks {', '.join(missing)}; a figure without them is not written")
    for figure, interval in FIGURES.items():
        if figure in row and not (len(row[interval]) == 2 and row[interval][0] <= row[interval][1]):
            raise Refused(f"results row {name!r}: {interval} {row[interval]} is no interval")


def write_results(path: str | Path, results: list[dict]) -> None:
    """
    Write `results.json` whole or not at all.

    Raises:
        Refused: a row that lacks something (see [`check_row`]).
    """
    for row in results:
        check_row(row)
    write_whole(path, json.dumps(results, indent=2) + "\n")


def read_results(path: str | Path) -> list[dict]:
    """
    Raises:
        Refused: no such file, or not a list of results.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "results.json"
    if not path.is_file():
        raise Refused(f"{path}: no results; run `abscot evaluate` first")
    try:
        rows = json.loads(path.read_text())
        if not isinstance(rows, list) or not rows:
            raise Refused(f"a {type(rows).__name__}, empty or no list")
        for number, row in enumerate(rows, 1):
            if wrong := _unreadable(row):
                raise Refused(f"row {number}: {', '.join(wrong)} missing or damaged")
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path} is no list of results ({error}); evaluate again") from error
    return rows


def _unreadable(row: dict) -> list[str]:
    """The names of a row's fields without which, or as they are, no table can be made."""
    if not isinstance(row, dict):
        return [f"an object in place of a {type(row).__name__}"]
    needed = {"model", "mode", "swap", "accuracy", "ci95", "n", "trace_tokens", "answer_tokens", "tokens"}
    needed |= {figure for figure, interval in FIGURES.items() if interval in row}
    needed |= {"follows_n", "follows_ci95"} if "follows" in row else set()
    wrong = needed - row.keys()
    wrong |= {name for name in TEXTS if not isinstance(row.get(name, ""), str)}
    wrong |= {"mode"} if row.get("mode") not in MODES else set()
    wrong |= {name for name, limits in LIMITS.items() if name in row and not is_number(row[name], *limits)}
    for pair in ((name, row[name]) for name in FIGURES.values() if name in row):
        wrong |= set() if isinstance(pair[1], list) and list(map(is_number, pair[1])) == [True, True] else {pair[0]}
    decoding = row.get("decoding", {})
    scalars = isinstance(decoding, dict) and all(isinstance(v, str | int | float | None) for v in decoding.values())
    return sorted(wrong if scalars else {*wrong, "decoding"})
