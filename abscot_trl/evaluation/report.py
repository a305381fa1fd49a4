"""results.json, report.md and the table in the terminal."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from abscot_trl.evaluation.plots import plot_accuracy_by_swap, plot_accuracy_over_tokens
from abscot_trl.files import write_whole

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


def check_row(row: dict) -> None:
    """
    Every figure stands beside what it was measured on.

    Raises:
        ValueError: a row without its n, decoding, seed or the interval of one of its figures.
    """
    name = " ".join(str(row.get(key)) for key in ("model", "task", "mode", "swap"))
    needed = [*ROW, *(interval for figure, interval in FIGURES.items() if figure in row)]
    needed += ["difference", "changed"] if row.get("swap") != "own" and row.get("metric") != "lc_win_rate" else []
    missing = [key for key in needed if row.get(key) is None]
    missing += [f"decoding.{key}" for key in DECODING if (row.get("decoding") or {}).get(key) is None]
    if missing:
        raise ValueError(f"results row {name!r} lacks {', '.join(missing)}; a figure without them is not written")
    for figure, interval in FIGURES.items():
        if figure in row and not (len(row[interval]) == 2 and row[interval][0] <= row[interval][1]):
            raise ValueError(f"results row {name!r}: {interval} {row[interval]} is no interval")


def write_results(path: str | Path, results: list[dict]) -> None:
    """
    Write `results.json` whole or not at all.

    Raises:
        ValueError: a row that lacks something (see [`check_row`]).
    """
    for row in results:
        check_row(row)
    write_whole(path, json.dumps(results, indent=2) + "\n")


def read_results(path: str | Path) -> list[dict]:
    """
    Raises:
        FileNotFoundError, ValueError: no such file, or not a list of results.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no results; run `abscot evaluate` first")
    try:
        rows = json.loads(path.read_text())
        return [row for row in rows if {"model", "mode", "swap", "accuracy", "ci95", "n"} <= row.keys()] or _none(path)
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no list of results ({error}); evaluate again") from error


def _none(path: Path) -> list[dict]:
    raise ValueError(f"{path} holds no results; evaluate again")


def _cells(row: dict) -> list[str]:
    model = row["model"] + (f" (round {row['round']})" if row.get("round", 1) > 1 else "")
    low, high = row["ci95"]
    return [
        model,
        row["mode"],
        row["swap"] if row["mode"] == "abstract" else "",
        f"{row['accuracy']:.1f}",
        f"{low:.1f}-{high:.1f}",
        f"{row['trace_tokens']:.1f}",
        f"{row['answer_tokens']:.1f}",
        f"{row['tokens']:.1f}",
        str(row["n"]),
        f"{100 * row['swapped']:.0f} %" if row.get("swapped") else "",
    ]


HEADER = [
    "model",
    "mode",
    "trace",
    "accuracy",
    "95 % interval",
    "trace tokens",
    "answer tokens",
    "tokens",
    "n",
    "swapped",
]


def results_table(results: list[dict]) -> str:
    """A Markdown table, aligned so that it reads in a terminal too."""
    rows = [HEADER, *map(_cells, results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    numeric = range(3, len(HEADER))

    def line(cells: list[str]) -> str:
        padded = [
            c.rjust(w) if i in numeric else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i in numeric else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


def write_report(folder: str | Path, results: list[dict], title: str, command: str) -> Path:
    """`report.md`: the table and the plots of `plots.py`, beside the command that made them."""
    seeds = sorted({row["decoding"]["seed"] for row in results if "decoding" in row})
    temperatures = sorted(
        {
            (row["decoding"]["trace_temperature"], row["decoding"]["temperature"])
            for row in results
            if "decoding" in row
        }
    )
    text = f"""# {title}

Made by `{command}`. Accuracy in points with Wilson 95 % intervals; tokens are means a problem, the two delimiters of a
trace not counted; seed {", ".join(map(str, seeds))}; temperature of trace and answer {temperatures}.

{results_table(results)}

![accuracy over tokens](accuracy_over_tokens.png)

![accuracy by swap](accuracy_by_swap.png)
"""
    path = Path(folder) / "report.md"
    path.write_text(text)
    return path


@dataclass
class ReportArguments:
    """
    Table and plots of one or more runs.

    Args:
        runs (`list[str]`): folders that hold a `results.json`, or such files.
        output_dir (`str`): where `report.md` and the plots go.
    """

    runs: list[str] = field(metadata={"help": "Folders with a results.json, or such files."})
    output_dir: str = field(metadata={"help": "Where report.md and the plots go."})
    title: str = field(default="Results", metadata={"help": "Heading of the report."})


def report(args: ReportArguments) -> Path:
    """`abscot report`: join the runs' results, print the table, write `report.md` and the plots."""
    results = [row for run in args.runs for row in read_results(run)]
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    print(results_table(results))  # noqa: T201
    plot_accuracy_over_tokens(results, folder / "accuracy_over_tokens.png")
    plot_accuracy_by_swap(results, folder / "accuracy_by_swap.png")
    return write_report(folder, results, args.title, f"abscot report --runs {' '.join(args.runs)}")
