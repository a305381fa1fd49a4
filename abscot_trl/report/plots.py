"""The figures of a report: each function draws one and knows no file; `plot_losses` and `save` write."""

from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import matplotlib
import matplotlib.lines
import matplotlib.patches
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from abscot_trl.report.tables import label

SWAP_COLOURS = {
    "own": "#1b6ca8",
    "random": "#d95f02",
    "shuffled": "#e6ab02",
    "other": "#a6761d",
    "none": "#7f7f7f",
}
CUT_COLOURS = ["#1b7837", "#5aae61", "#a6dba0", "#66a61e"]
MODEL_COLOURS = ["#1b6ca8", "#d95f02", "#2a8a5c", "#7b4fa3", "#c2256c", "#8a6d1d", "#3f3f3f", "#5fb0c9"]
MARKERS = {"verbal": "s", "direct": "^", "abstract": "o"}
STYLE = {
    "text.parse_math": False,  # a model's name is a name
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "abscot",
}


def short(text: str) -> str:
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= 40 else text[:39] + "…"


def _colour(swap: str, swaps: list[str]) -> str:
    cuts = [name for name in swaps if name not in SWAP_COLOURS]
    return SWAP_COLOURS.get(swap) or CUT_COLOURS[cuts.index(swap) % len(CUT_COLOURS)]


def _errors(value: float, interval: list[float]) -> list[list[float]]:
    return [[max(0.0, value - interval[0])], [max(0.0, interval[1] - value)]]


def _distinct(values: Iterable) -> list:
    return list(dict.fromkeys(values))


def save(figure: Figure, path: str | Path | BytesIO, kind: str = "png") -> None:
    """The same bytes for the same figure."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, format=kind, dpi=140, metadata={"Software" if kind == "png" else "Date": None})


def over_tokens(results: list[dict], chance: float | None = None) -> Figure:
    """Accuracy over tokens: a panel a task, one point a model and mode (own traces), tokens on a logarithmic axis."""
    rows = [row for row in results if row["swap"] == "own"]
    tasks = _distinct(row.get("task", "") for row in rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4 * len(tasks), 4.2), layout="constrained")
        panels = figure.subplots(1, len(tasks), squeeze=False)[0]
        for axes, task in zip(panels, tasks, strict=True):
            mine = [row for row in rows if row.get("task", "") == task]
            placed: list[tuple[float, float]] = []  # where names stand: below one another where points coincide
            for i, row in enumerate(sorted(mine, key=lambda row: -row["accuracy"])):
                x, y = max(row["tokens"], 0.5), row["accuracy"]
                style = {"fmt": MARKERS[row["mode"]], "markersize": 8, "capsize": 3, "color": MODEL_COLOURS[i % 8]}
                axes.errorbar(x, y, yerr=_errors(y, row["ci95"]), **style)
                near = [at for tokens, at in placed if 0.4 < tokens / x < 2.5]
                placed.append((x, min([min(y, 96) + 1.5, *(at - 5.5 for at in near)])))
                axes.annotate(
                    f"{short(label(row))} ({row['mode']})",
                    (x, y),
                    xytext=(9, placed[-1][1]),
                    textcoords=("offset points", "data"),
                    color=MODEL_COLOURS[i % 8],
                    va="center",
                    fontsize=9,
                )
            if chance is not None:
                axes.axhline(chance, color="grey", linestyle=":")
                about = {"transform": axes.get_yaxis_transform(), "color": "#666666", "fontsize": 9}
                axes.text(0.01, chance + 1, f"chance {chance:.0f}", **about)
            axes.set(xscale="log", xlabel="generated tokens a problem (mean)", ylabel="accuracy", ylim=(-4, 104))
            axes.set(title=short(task) if len(tasks) > 1 else "")
            axes.margins(x=0.35)
            ticks: list[float] = []
            for tokens in sorted({max(row["tokens"], 0.5) for row in mine}):
                if not ticks or tokens > 1.15 * ticks[-1]:
                    ticks.append(tokens)
            axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
            axes.minorticks_off()
    return figure


def by_swap(results: list[dict], chance: float | None = None) -> Figure:
    """Accuracy by swap: a group of bars a model and task in abstract mode."""
    rows = [row for row in results if row["mode"] == "abstract"]
    several = len({row.get("task") for row in rows}) > 1
    names = [label(row) + (f"\n{row.get('task', '')}" if several else "") for row in rows]
    models, swaps = _distinct(names), _distinct(row["swap"] for row in rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(6.4, 1.8 + 1.6 * len(models)), 4.2), layout="constrained")
        axes, width = figure.subplots(), 0.8 / max(1, len(swaps))
        for row, name in zip(rows, names, strict=True):
            x = models.index(name) + (swaps.index(row["swap"]) - (len(swaps) - 1) / 2) * width
            axes.bar(x, row["accuracy"], width * 0.92, color=_colour(row["swap"], swaps))
            axes.errorbar(
                x, row["accuracy"], yerr=_errors(row["accuracy"], row["ci95"]), color="black", linewidth=1, capsize=2
            )
        handles = [matplotlib.patches.Patch(color=_colour(swap, swaps)) for swap in swaps]
        labels = list(swaps)
        if chance is not None:
            handles.append(axes.axhline(chance, color="grey", linestyle=":"))
            labels.append(f"chance {chance:.0f}")
        figure.legend(handles, labels, title="answer after", loc="outside right upper")
        axes.set_xticks(range(len(models)), ["\n".join(map(short, name.split("\n"))) for name in models])
        axes.set(ylabel="accuracy", ylim=(0, 104))
        axes.grid(visible=False, axis="x")
    return figure


def swap_differences(comparisons: list[dict]) -> Figure:
    """Each swap's accuracy less the own trace's, with its interval; `model`, `swap`, `difference`, `interval` each."""
    swaps, models = _distinct(c["swap"] for c in comparisons), _distinct(c["model"] for c in comparisons)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 1.3 + 0.24 * len(comparisons) + 0.2 * len(models)), layout="constrained")
        axes, ticks, y = figure.subplots(), [], 0.0
        for model in models:
            mine = [c for c in comparisons if c["model"] == model]
            axes.text(0.0, y, short(model), transform=axes.get_yaxis_transform(), va="center", fontweight="bold")
            for c in mine:
                y -= 1
                ticks.append((y, c["swap"]))
                style = {"fmt": "o", "markersize": 5, "capsize": 3, "color": _colour(c["swap"], swaps)}
                axes.errorbar(c["difference"], y, xerr=_errors(c["difference"], c["interval"]), **style)
            y -= 1.4
        axes.axvline(0, color="#444444", linewidth=1)
        axes.set_yticks([at for at, _ in ticks], [swap for _, swap in ticks])
        axes.set(xlabel="accuracy after the swapped trace less after the own, points", ylim=(y + 0.7, 0.7))
        axes.grid(visible=False, axis="y")
    return figure


def over_stages(results: list[dict]) -> Figure:
    """Accuracy over the warm-up's stages (`stage`, or else `round`), a panel a model and task, a line a swap."""
    key = [(row.get("sweep", row["model"]), row.get("task", ""), row.get("run", "")) for row in results]
    panels, swaps = _distinct(key), _distinct(row["swap"] for row in results)
    stages = _distinct(row.get("stage") or f"round{row['round']}" for row in results)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(6.4, 4.4 * len(panels)), 3.8), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
            for swap in swaps:
                rows = [row for row, mine in zip(results, key, strict=True) if mine == panel and row["swap"] == swap]
                x = [stages.index(row.get("stage") or f"round{row['round']}") for row in rows]
                y = [row["accuracy"] for row in rows]
                errors = np.array([_errors(row["accuracy"], row["ci95"]) for row in rows]).reshape(-1, 2).T
                if rows:
                    axes.errorbar(x, y, yerr=errors, color=_colour(swap, swaps), marker="o", markersize=4, capsize=2)
            axes.set_xticks(range(len(stages)), list(map(short, stages)), rotation=30, ha="right", fontsize=9)
            axes.set(title=short(" ".join(filter(None, panel))), ylim=(-2, 104))
        figure.axes[0].set_ylabel("accuracy")
        handles = [matplotlib.patches.Patch(color=_colour(swap, swaps)) for swap in swaps]
        figure.legend(handles, swaps, title="answer after", loc="outside right upper")
    return figure


def draw_ranks(axes, shares: np.ndarray, size: int, **style) -> None:
    """Shares of all tokens, above 0 and falling, over ranks 1 .. `size`, both axes logarithmic."""
    axes.plot(range(1, len(shares) + 1), shares, **style)
    axes.set(xscale="log", yscale="log", xlabel="rank")
    axes.set_xticks([2**k for k in range(size.bit_length())], [str(2**k) for k in range(size.bit_length())])
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()


def codebook(analyses: dict[str, dict]) -> Figure:
    """
    Rank and frequency with the fitted power law; entropy by position; information on the gold answer by position;
    lengths. A colour a model; `analyses` are `abscot_trl.report.codebook.analyse`'s, by model.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 6.6), layout="constrained")
        (ranks, positions), (information, lengths) = figure.subplots(2, 2)
        size = max(len(a["token_counts"]) for a in analyses.values())
        for i, (name, a) in enumerate(analyses.items()):
            colour, line = MODEL_COLOURS[i % 8], {"marker": "o", "markersize": 4}
            shares = -np.sort(-np.array(a["token_counts"])) / sum(a["token_counts"]) if sum(a["token_counts"]) else []
            used = np.count_nonzero(shares)
            draw_ranks(ranks, shares[:used], size, color=colour, linestyle="", **line, label=short(name))
            if a["zipf"]:
                fit = np.arange(1, len(shares) + 1.0) ** -a["zipf"]["exponent"]
                ranks.plot(range(1, len(shares) + 1), fit / fit.sum(), color=colour, linewidth=1)
            reached = range(1, 1 + len(a["entropy_by_position"]))
            positions.plot(reached, a["entropy_by_position"], color=colour, **line)
            positions.axhline(a["token_entropy_uniform"], color=colour, linestyle=":", linewidth=1)
            reached = range(1, 1 + len(a["positions"]))
            information.plot(reached, [p["information"] for p in a["positions"]], color=colour, **line)
            band = [p["baseline"] for p in a["positions"]], [p["baseline_high"] for p in a["positions"]]
            information.fill_between(reached, *band, color=colour, alpha=0.25, linewidth=0)
            information.axhline(a["gold_entropy"], color=colour, linestyle=":", linewidth=1)
            at, n = list(map(int, a["lengths"])), np.array(list(a["lengths"].values()))
            width = 0.85 / len(analyses)
            lengths.bar(np.array(at) + (i - (len(analyses) - 1) / 2) * width, 100 * n / n.sum(), width, color=colour)
        ranks.set(ylabel="share of all tokens", title="how often each token is used; line: power law")
        figure.legend(loc="outside upper center", ncols=4)
        positions.set(xlabel="position in the trace", ylabel="nats", ylim=(0, None))
        positions.set_title("entropy of the token; dotted: uniform, ln M")
        information.set(xlabel="position in the trace", ylabel="nats", ylim=(0, None))
        information.set_title("information on the answer; band: chance, dotted: all")
        lengths.set(xlabel="codebook tokens in a trace", ylabel="% of traces")
        lengths.set_title("length")
        lengths.set_xlim(lengths.get_xlim()[0] - 0.6, lengths.get_xlim()[1] + 0.6)
        for axes in (positions, information, lengths):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def codebook_over_training(summaries: dict[str, list[dict]]) -> Figure:
    """Shares over the warm-up's trace stages: codebook in use, entropy of ln M, distinct traces; a panel a warm-up."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(6.4, 4.4 * len(summaries)), 3.8), layout="constrained")
        panels = figure.subplots(1, len(summaries), squeeze=False, sharey=True)[0]
        for axes, (name, stages) in zip(panels, summaries.items(), strict=True):
            x = range(len(stages))
            axes.plot(
                x, [s["tokens_used"] / len(s["token_counts"]) for s in stages], marker="o", label="tokens in use"
            )
            entropies = [s["token_entropy"] / max(s["token_entropy_uniform"], 1e-9) for s in stages]
            axes.plot(x, entropies, marker="s", label="entropy / ln M")
            axes.plot(x, [s["distinct"] / s["traces"] for s in stages], marker="^", label="distinct traces")
            names = [s["stage"].removesuffix("-traces") for s in stages]
            axes.set_xticks(x, names, rotation=30, ha="right", fontsize=9)
            axes.set(title=short(name), ylim=(-0.03, 1.05))
        panels[0].set_ylabel("share")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def losses(logs: dict[str, list[dict]]) -> Figure:
    """
    Over all steps, stage by stage: losses of trace and answer (left, nats a token; dotted: ln M), and the learning
    rate (right).
    """
    lines = {
        "loss_trace": {"label": "trace", "color": "C0", "linewidth": 1.3},
        "loss_trace_uniform": {"label": "ln M", "color": "C0", "linewidth": 1, "linestyle": ":"},
        "loss_answer": {"label": "answer", "color": "C1", "linewidth": 1.3},
    }
    lines = {key: style for key, style in lines.items() if any(key in entry for log in logs.values() for entry in log)}
    with matplotlib.rc_context(STYLE | {"axes.grid": False, "axes.spines.right": True}):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axis = figure.subplots()
        rates, offset = axis.twinx(), 0
        for stage, log in logs.items():
            steps = [offset + entry["step"] for entry in log]
            rates.plot(steps, [entry.get("learning_rate", float("nan")) for entry in log], color="0.7", linewidth=1)
            for key, style in lines.items():
                values = [entry.get(key, float("nan")) for entry in log]
                axis.plot(steps, values, marker="." if len(log) == 1 else None, **style)
            axis.axvline(offset, color="0.9", linewidth=1, zorder=0)
            about = {"transform": axis.get_xaxis_transform(), "fontsize": 9, "rotation": 30, "va": "bottom"}
            axis.text(offset, 1.0, short(stage), **about)
            offset += log[-1]["step"]
        shown = [*lines.values(), {"color": "0.7", "label": "learning rate"}]
        handles = [matplotlib.lines.Line2D([], [], **style) for style in shown]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        axis.set(xlabel="step", ylabel="nats a token")
        rates.set_ylabel("learning rate")
        rates.set_ylim(bottom=0)
        rates.yaxis.set_major_locator(MaxNLocator(4))
    return figure


def gauges(read: dict[str, list[dict]]) -> Figure:
    """The gauges by step, a column a phase: answer loss by trace above, loss of the trace below; dotted: uniform."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(6.4, 2.8 * len(read)), 5.0), layout="constrained")
        panels = figure.subplots(2, len(read), squeeze=False, sharex="col", sharey="row")
        for (useful, predictable), (stage, log) in zip(panels.T, read.items(), strict=True):
            steps = [entry["step"] for entry in log]
            for swap in ("none", "other", "random", "own"):
                loss = [entry[f"useful_{swap}"] for entry in log]
                errors = [2 * entry.get(f"useful_{swap}_se", 0.0) for entry in log]
                style = {"color": SWAP_COLOURS[swap], "marker": "o", "markersize": 4, "capsize": 2}
                useful.errorbar(steps, loss, yerr=errors, **style)
            predictable.plot(steps, [entry["predictable"] for entry in log], color="#444444", marker="o", markersize=4)
            predictable.axhline(log[-1]["predictable_uniform"], color="grey", linestyle=":")
            useful.set_title(short(stage))
            predictable.set(xlabel="step", ylim=(0, None))
            predictable.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        panels[0, 0].set_ylabel("answer, nats a token")
        panels[1, 0].set_ylabel("trace, nats a token")
        swaps = ("own", "random", "other", "none")
        handles = [matplotlib.patches.Patch(color=SWAP_COLOURS[swap]) for swap in swaps]
        figure.legend(handles, swaps, title="answer after", loc="outside right upper")
    return figure


def plot_losses(logs: dict[str, list[dict]], path: str | Path) -> None:
    """`losses`, to a PNG file."""
    save(losses(logs), path)
