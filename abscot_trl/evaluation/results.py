"""results.json: rows that say what they were measured on."""

import json
import math
from pathlib import Path

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
FIGURES = {"accuracy": "ci95"} | {name: f"{name}_ci95" for name in ("em", "maj", "pass", "difference", "win_rate")}


def is_number(value) -> bool:
    """Whether a JSON value is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def check_row(row: dict) -> None:
    """
    Every figure stands beside what it was measured on.

    Raises:
        Refused: a row without its n, decoding, seed or the interval of one of its figures.
    """
    name = " ".join(str(row.get(key)) for key in ("model", "task", "mode", "swap"))
    needed = [*ROW, *(interval for figure, interval in FIGURES.items() if figure in row)]
    needed += ["difference", "changed"] if row.get("swap") != "own" and row.get("metric") != "lc_win_rate" else []
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
    except ValueError as error:
        raise Refused(f"{path} is no list of results ({error}); evaluate again") from error
    return rows


def _unreadable(row: dict) -> list[str]:
    """The names of a row's fields without which, or as they are, no table can be made."""
    if not isinstance(row, dict):
        return [repr(row)]
    kinds = dict.fromkeys(("model", "mode", "swap"), str) | {"task": str, "stage": str, "decoding": dict}
    needed = {"model", "mode", "swap", "accuracy", "n", "trace_tokens", "answer_tokens", "tokens"}
    numbers = needed - kinds.keys() | {*FIGURES, "round", "samples", "swapped", "changed"}
    intervals = [name for figure, name in FIGURES.items() if figure == "accuracy" or name in row]
    wrong = [name for name in needed if name not in row]
    wrong += [name for name, kind in kinds.items() if not isinstance(row.get(name, kind()), kind)]
    wrong += [name for name in numbers if not is_number(row.get(name, 0))]
    pairs = [(name, row.get(name)) for name in intervals]
    wrong += [n for n, pair in pairs if not (isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair)))]
    return sorted(wrong)
