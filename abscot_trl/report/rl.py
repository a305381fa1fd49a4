"""What GRPO logged, as the report shows it: figures over steps, first and last values, and some rollouts."""

import re

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from abscot_trl.evaluation.results import is_number
from abscot_trl.evaluation.statistics import wilson_interval
from abscot_trl.report.codebook import fit_zipf
from abscot_trl.report.plots import MODEL_COLOURS, STYLE, SWAP_COLOURS, draw_ranks, short
from abscot_trl.vocabulary import AbstractVocabulary

SHOWN = 5  # steps whose rollouts are shown: the first, the last, and some between
RANKS, SECONDS = "share of codebook tokens by rank", "seconds a step"
# By figure, by panel: the log's names with their labels; "rewards" stands for the rewards by part.
FIGURES = {
    "learning": {
        "reward": {"reward": "total", "rewards": ""},
        "held-out accuracy, greedy": {"probe/own": "own trace", "probe/random": "random trace"},
        "KL to the warm start, nats a token": {"kl": ""},
        "shares": {"frac_reward_zero_std": "groups without variance", "trace/forced_end": "traces cut at m_max"},
        "ratio of trainer to sampler": {"ratio/mean": "mean", "ratio/outside": "share outside 0.9 .. 1.1"},
        SECONDS: {
            "time/rollout": "rollouts",
            "time/rewards": "rewards",
            "time/scoring": "scoring",
            "time/update": "update",
            "time/other": "other",
        },
    },
    "traces": {
        "codebook tokens in a trace": {"trace/length": ""},
        "entropy in the trace, nats a token": {"trace/entropy": ""},
        "tokens of an answer": {"answer/length": ""},
        RANKS: {"codebook_counts": ""},
    },
}
LIMITS = {"held-out accuracy, greedy": (0, 104), "shares": (-0.03, 1.05), "reward": (None, None)}
LIMITS |= {"ratio of trainer to sampler": (-0.03, None)}  # others: from 0
WORDS = (
    " Reward and its parts are means over rollouts, the total by reward_weights; a group without variance teaches "
    "nothing. Scoring: log-probabilities by the reference and by the policy as it was; update: forward and backward, "
    "without the optimiser's step unless DeepSpeed takes it. Tables: means over the first and the last tenth of the "
    "points logged. Exponent: of a power law over the codebook's ranks, the noise of the ranks simulated; without an "
    "interval, since the tokens of a trace are not independent."
)


def series(log: list[dict], key: str) -> tuple[list[float], list[float]]:
    """The steps at which a figure was logged, and its values there."""
    points = [(entry["step"], entry[key]) for entry in log if is_number(entry.get(key), -1e30, 1e30)]
    return [step for step, _ in points], [value for _, value in points]


def panels(log: list[dict], figure: str) -> dict[str, dict[str, str]]:
    """A figure's panels, with the names that were logged."""
    parts = sorted({key for entry in log for key in entry if re.fullmatch(r"rewards/.+/mean", key)})
    rewards = {key: key.removeprefix("rewards/").removesuffix("/mean") for key in parts}
    found = {}
    for title, names in FIGURES[figure].items():
        names = {"reward": names["reward"]} | rewards if "rewards" in names else names
        logged = {key: label for key, label in names.items() if series(log, key)[0]}
        if logged or (title == RANKS and counted(log)):
            found[title] = logged
    return found


def _tenths(points: list) -> tuple[list, list]:
    n = max(1, len(points) // 10)
    return points[:n], points[-n:]


def counted(log: list[dict]) -> list[tuple[str, np.ndarray]]:
    """Uses of each codebook token in the first and the last tenth of the logged steps, each with the steps' name."""
    logged = [entry for entry in log if sum(entry.get("codebook_counts", []))]
    if not logged:
        return []
    return [
        (
            f"step {some[0]['step']:.0f}" + (f" to {some[-1]['step']:.0f}" if len(some) > 1 else ""),
            np.sum([entry["codebook_counts"] for entry in some], axis=0),
        )
        for some in (_tenths(logged) if len(logged) > 1 else [logged])
    ]


def _draw_lines(axes, log: list[dict], names: dict[str, str], held_out: int) -> None:
    for i, (key, label) in enumerate(names.items()):
        steps, values = series(log, key)
        style = {"label": short(label), "color": MODEL_COLOURS[i % 8], "linewidth": 2 if key == "reward" else 1.3}
        style |= {"marker": "o", "markersize": 3} if len(steps) <= 30 else {}
        if key.startswith("probe/"):
            style["color"] = SWAP_COLOURS[key.removeprefix("probe/")]
        if key.startswith("probe/") and held_out:
            ends = np.array([wilson_interval(v / 100 * held_out, held_out) for v in np.clip(values, 0, 100)]).T
            errors = np.maximum(0.0, [values - ends[0], ends[1] - values])
            axes.errorbar(steps, values, yerr=errors, capsize=2, **style)
        else:
            axes.plot(steps, values, **style)


def _draw_seconds(axes, log: list[dict], names: dict[str, str]) -> None:
    """One part on the other, with room for the legend."""
    entries = [entry for entry in log if any(is_number(entry.get(key), 0, 1e30) for key in names)]
    values = np.array(
        [[entry[key] if is_number(entry.get(key), 0, 1e30) else 0.0 for entry in entries] for key in names]
    )
    colours, steps = MODEL_COLOURS[: len(names)], [entry["step"] for entry in entries]
    if len(steps) == 1:  # an area needs two
        steps, values = [steps[0] - 0.5, steps[0] + 0.5], np.repeat(values, 2, axis=1)
    axes.stackplot(steps, values, labels=list(names.values()), colors=colours, alpha=0.75, linewidth=0)
    axes.set_ylim(0, 1.5 * values.sum(axis=0).max() or 1.0)


def _draw_ranks(axes, counts: list[tuple[str, np.ndarray]]) -> None:
    for (name, uses), colour in zip(counts, ("#8a949e", SWAP_COLOURS["own"]), strict=False):
        shares = -np.sort(-uses[uses > 0]) / uses.sum()
        draw_ranks(axes, shares, len(uses), color=colour, marker="o", markersize=3, linewidth=1, label=name)


def over_steps(log: list[dict], name: str, held_out: int = 0) -> Figure | None:
    """One of `FIGURES`: a panel for all that was logged of a kind; `None` where nothing was."""
    if not (shown := panels(log, name)):
        return None
    rows = -(-len(shown) // 2)
    with matplotlib.rc_context(STYLE | {"font.size": 9, "axes.titlesize": 9.5, "legend.fontsize": 8.5}):
        figure = Figure(figsize=(6.4, 2.2 * rows + 0.2), layout="constrained")
        places = [*figure.subplots(rows, 2, squeeze=False).flat]
        for axes, (title, names) in zip(places, shown.items(), strict=False):
            axes.set(title=title, xlabel="step")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            if title == RANKS:
                _draw_ranks(axes, counted(log))
            elif title == SECONDS:
                _draw_seconds(axes, log, names)
            else:
                _draw_lines(axes, log, names, held_out)
                axes.set_ylim(*LIMITS.get(title, (0, None)))
            if any(names.values()) or title == RANKS:
                axes.legend(ncols=3 if title == SECONDS else 1)
        for axes in places[len(shown) :]:
            axes.remove()
    return figure


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _table(name: str, log: list[dict]) -> dict:
    rows = []
    for title, names in (panel for figure in FIGURES for panel in panels(log, figure).items()):
        for key, label in names.items():
            first, last = (float(np.mean(some)) for some in _tenths(series(log, key)[1]))
            rows.append([f"{title}: {label}" if label else title, _number(first), _number(last)])
    counts = [uses for _, uses in counted(log)]
    if len(counts) == 2:
        rows.append(["codebook tokens in use", *(f"{np.count_nonzero(uses)} of {len(uses)}" for uses in counts)])
        fits = [fit_zipf(uses) for uses in counts]
        rows.append(["exponent of their ranks", *(f"{fit['exponent']:.2f}" if fit else "" for fit in fits)])
    return {"title": name, "header": ["", "first", "last"], "rows": rows}


def by_heart(log: list[dict], held_out: int) -> str:
    """
    Words where prompts are repeated, and sampled answers to them are right more often than greedy ones to held-out
    prompts can be. Less could be certainty, by which sampled answers come near to greedy ones.
    """
    trained, own, epochs = (series(log, key)[1] for key in ("rewards/accuracy/mean", "probe/own", "epoch"))
    if not (trained and own and epochs and held_out) or epochs[-1] < 2 or own[-1] > own[0]:
        return ""
    first, last = (100 * float(np.mean(some)) for some in _tenths(trained))
    if last < first + 5 or last < wilson_interval(own[0] / 100 * held_out, held_out)[1]:
        return ""
    return (
        f" In {epochs[-1]:.3g} passes over its prompts sampled answers to them came from {first:.1f} to {last:.1f} % "
        "right, and greedy answers to held-out ones did not get better: it learns them by heart. Give more prompts."
    )


def says(name: str, log: list[dict], held_out: int) -> str:
    """How it went, in one line."""
    words, rewards = f"{name}: {log[-1]['step']:.0f} steps", series(log, "reward")[1]
    if rewards:
        words += ", reward from {} to {}".format(*(_number(np.mean(some)) for some in _tenths(rewards)))
    own, random = (series(log, f"probe/{trace}")[1] for trace in ("own", "random"))
    if own and random:
        words += (
            f"; accuracy on {held_out or 'the'} held-out prompts from {own[0]:.1f} to {own[-1]:.1f} after its own "
        )
        words += f"trace, from {random[0]:.1f} to {random[-1]:.1f} after a random one"
    return words + "." + by_heart(log, held_out)


def _trace(text: str, tokens: list[str]) -> dict:
    """Codebook indices of a trace's text; the text itself where it is none."""
    names = re.findall(r"<TOKEN_[A-Z]+>", text)
    known = "".join(names) == re.sub(r"\s", "", text) and {*names} <= {*tokens}
    return {"trace": [tokens.index(name) for name in names]} if known else {"trace": [], "text": text}


def rollouts(name: str, log: list[dict]) -> list[dict]:
    """Of some steps the rollouts that were kept: `title`, and by prompt its `answers`."""
    logged = [entry for entry in log if entry.get("rollouts")]
    chosen = sorted({round(i * (len(logged) - 1) / (SHOWN - 1)) for i in range(SHOWN)}) if logged else []
    shown = []
    for entry in (logged[i] for i in chosen):
        tokens, prompts = AbstractVocabulary(size=len(entry.get("codebook_counts", [0]))).tokens, {}
        for rollout in entry["rollouts"]:
            rewards = [
                f"{part} {_number(value) if is_number(value) else 'none'}"
                for part, value in rollout["rewards"].items()
            ]
            answer = _trace(rollout["trace"], tokens) | {"answer": rollout["answer"], "rewards": " · ".join(rewards)}
            prompts.setdefault(rollout["prompt"], []).append(answer)
        groups = [{"prompt": prompt, "answers": answers} for prompt, answers in prompts.items()]
        shown.append({"title": f"{name}: rollouts of step {entry['step']:.0f}", "groups": groups})
    return shown


def section(found: dict[str, tuple[list[dict], int]]) -> dict | None:
    """
    The report's section on GRPO; `found` by name: the log, and how many prompts were held out
    (`abscot_trl.report.runs.reinforced`).
    """
    figures = {}
    for i, (name, (log, held_out)) in enumerate(found.items(), 1):
        bars = f" Held-out accuracy: n = {held_out}, bars are 95 % (Wilson)." if held_out else ""
        for kind in FIGURES:
            if figure := over_steps(log, kind, held_out):
                caption = f"GRPO, {name}: {kind}; {len(log)} points of one run as logged."
                caption += bars if kind == "learning" else ""
                figures[f"grpo_{kind}" + (f"_{i}" if i > 1 else "")] = figure, caption
    size = max((len(entry.get("codebook_counts", [0])) for log, _ in found.values() for entry in log), default=1)
    about = {
        "title": "Reinforcement learning",
        "words": " ".join(says(name, *one) for name, one in found.items()) + WORDS,
        "figures": figures,
        "tables": [_table(name, log) for name, (log, _) in found.items()],
        "rollouts": [one for name, (log, _) in found.items() for one in rollouts(name, log)],
        "tokens": AbstractVocabulary(size=size).tokens,
    }
    return about if found else None
