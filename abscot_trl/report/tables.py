"""Rows of results.json as a Markdown table that reads in a terminal too."""

from abscot_trl.markdown import markdown_table

FIGURES = {"em": "EM", "maj": "maj", "pass": "pass", "win_rate": "win rate", "follows": "follows"}  # with intervals
OPTIONAL = FIGURES | {"truncated": "truncated", "swapped": "swapped"}
METRICS = {"f1": " F1", "score": " score", "lc_win_rate": " LC"}


def label(row: dict) -> str:
    """The model, with its stage or its round beyond the first, and its run where several are compared."""
    about = row.get("stage") or (f"r{row['round']}" if row.get("round", 1) > 1 else "")
    name = f"{row['model']} {about}" if about and about != row["model"] else row["model"]
    return name + (f" ({row['run']})" if row.get("run", row["model"]) != row["model"] else "")


def header_of(results: list[dict]) -> list[str]:
    header = ["model", "mode", "trace", "accuracy", "95 % interval", "trace tokens", "answer tokens", "tokens", "n"]
    if len({row.get("task") for row in results}) > 1:
        header.insert(1, "task")
    shown = {key for row in results for key in OPTIONAL if row.get(key) or (key in FIGURES and key in row)}
    return header + [name for key, name in OPTIONAL.items() if key in shown]


def _with_interval(row: dict, key: str) -> str:
    interval = " ({:.1f}-{:.1f})".format(*row[f"{key}_ci95"]) if f"{key}_ci95" in row else ""
    chance = f", {row[f'{key}_chance']:.1f} by chance" if f"{key}_chance" in row else ""
    return f"{row[key]:.1f}{interval}{chance}" if key in row else ""


def cells(row: dict, header: list[str]) -> list[str]:
    (low, high), share = row["ci95"], row.get("swapped")
    text = {
        "model": label(row),
        "task": row.get("task", ""),
        "mode": row["mode"],
        "trace": row["swap"] if row["mode"] == "abstract" or row["swap"] != "own" else "",
        "accuracy": f"{row['accuracy']:.1f}" + METRICS.get(row.get("metric"), ""),
        "95 % interval": f"{low:.1f}-{high:.1f}",
        "trace tokens": f"{row['trace_tokens']:.1f}",
        "answer tokens": f"{row['answer_tokens']:.1f}",
        "tokens": f"{row['tokens']:.1f}",
        "n": str(row["n"]),
        **{name: _with_interval(row, key) for key, name in FIGURES.items()},
        "truncated": str(row.get("truncated", "")),
        "swapped": "" if share is None or row["swap"] == "own" else f"{100 * share:.0f} %",
    }
    return [text[name] for name in header]


def results_table(results: list[dict]) -> str:
    """The rows of `results.json` as a Markdown table."""
    header = header_of(results)
    return markdown_table(header, [cells(row, header) for row in results])
