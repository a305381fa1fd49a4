"""The two plots of a run: accuracy over tokens, and accuracy by swap."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SWAP_COLOURS = {
    "own": "#1b6ca8",
    "random": "#d95f02",
    "shuffled": "#e6ab02",
    "other": "#a6761d",
    "none": "#7f7f7f",
}


def label(row: dict) -> str:
    """The model, with its round beyond the first."""
    return row["model"] + (f" r{row['round']}" if row.get("round", 1) > 1 else "")


def _errors(row: dict) -> list[list[float]]:
    low, high = row["ci95"]
    return [[max(0.0, row["accuracy"] - low)], [max(0.0, high - row["accuracy"])]]


def plot_accuracy_over_tokens(results: list[dict], path: str | Path, chance: float | None = None) -> None:
    """One point a model and mode (own traces), tokens on a logarithmic axis."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for row in results:
        if row["swap"] != "own":
            continue
        marker = {"verbal": "s", "direct": "^", "abstract": "o"}[row["mode"]]
        axes.errorbar(row["tokens"], row["accuracy"], yerr=_errors(row), fmt=marker, markersize=8, capsize=3)
        above = row["accuracy"] < 90
        axes.annotate(
            f"{label(row)} ({row['mode']})",
            (row["tokens"], row["accuracy"]),
            textcoords="offset points",
            xytext=(6, 8 if above else -14),
        )
    if chance is not None:
        axes.axhline(chance, color="grey", linestyle=":", label=f"chance {chance:.0f}")
        axes.legend(loc="center right")
    axes.set(xscale="log", xlabel="generated tokens a problem (mean)", ylabel="accuracy", ylim=(-2, 104))
    axes.margins(x=0.35)
    axes.set_xticks(
        ticks := sorted({round(row["tokens"]) for row in results if row["swap"] == "own"}), map(str, ticks)
    )
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def plot_accuracy_by_swap(results: list[dict], path: str | Path, chance: float | None = None) -> None:
    """A group of bars a model in abstract mode: its own trace, and what it answers after each swap."""
    rows = [row for row in results if row["mode"] == "abstract"]
    models = list(dict.fromkeys(label(row) for row in rows))
    swaps = list(dict.fromkeys(row["swap"] for row in rows))
    figure, axes = plt.subplots(figsize=(max(6.4, 2.2 * len(models)), 4.2), layout="constrained")
    width = 0.8 / max(1, len(swaps))
    for k, swap in enumerate(swaps):
        for row in (row for row in rows if row["swap"] == swap):
            x = models.index(label(row)) + (k - (len(swaps) - 1) / 2) * width
            colour = SWAP_COLOURS.get(swap, "#66a61e")
            axes.bar(x, row["accuracy"], width * 0.92, color=colour)
            axes.errorbar(x, row["accuracy"], yerr=_errors(row), color="black", linewidth=1, capsize=2)
    handles = [plt.Rectangle((0, 0), 1, 1, color=SWAP_COLOURS.get(swap, "#66a61e")) for swap in swaps]
    labels = list(swaps)
    if chance is not None:
        handles.append(axes.axhline(chance, color="grey", linestyle=":"))
        labels.append(f"chance {chance:.0f}")
    figure.legend(handles, labels, title="answer after", loc="outside right upper")
    axes.set_xticks(range(len(models)), models)
    axes.set(ylabel="accuracy", ylim=(0, 104))
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def plot_losses(logs: dict[str, list[dict]], path: str | Path) -> None:
    """Losses of trace and answer (left, nats a token) and the learning rate (right) over all steps, stage by stage."""
    figure, axis = plt.subplots(figsize=(8, 3.5), layout="constrained")
    rates, offset = axis.twinx(), 0
    for stage, log in logs.items():
        steps = [offset + entry["step"] for entry in log]
        rates.plot(steps, [entry.get("learning_rate", float("nan")) for entry in log], color="0.75", linewidth=1)
        for key, color in (("loss_trace", "C0"), ("loss_answer", "C1")):
            values = [entry.get(key, float("nan")) for entry in log]
            axis.plot(steps, values, color=color, linewidth=1, marker="." if len(log) == 1 else None)
        axis.axvline(offset, color="0.9", linewidth=1, zorder=0)
        axis.text(offset, 1.0, stage, transform=axis.get_xaxis_transform(), fontsize=7, rotation=30, va="bottom")
        offset += log[-1]["step"]
    handles = [
        plt.Line2D([], [], color=c, label=name)
        for c, name in (("C0", "trace"), ("C1", "answer"), ("0.75", "learning rate"))
    ]
    axis.legend(handles=handles, frameon=False, fontsize=8)
    axis.set(xlabel="step", ylabel="nats a token")
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
