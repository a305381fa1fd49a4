"""What a report holds: sections of words, tables and figures, the same ones in report.md and report.html."""

import json
import re
from pathlib import Path

from abscot_trl.report import codebook, plots
from abscot_trl.report.gauges import readings, says
from abscot_trl.report.runs import Group, read_losses, read_settings, read_wall_times
from abscot_trl.report.tables import cells, header_of
from abscot_trl.report.verdict import INTERVALS, comparisons, measured

PUBLISHED = Path(__file__).with_name("published.json")
FOLLOWS = (
    " follows: how many of the answers after another problem's trace are that problem's, of those where the two "
    "problems have different answers; by chance: how many are a third problem's."
)
USED = (
    "Information says whether traces go together with gold answers, not whether the answer reads its trace; that the "
    "verdict says. A trace may tell what the answer knows without it; tokens may tell only together, or with the "
    "prompt."
)
TOLD = 0.1  # of the gold answers' entropy: what is no chance, and needs a word where nothing reads it
STARTS = (
    "The trace's loss may start far above ln M, the dotted line (16 nats beside 4.2, say): the new tokens first "
    "compete with the whole vocabulary. Below the line something was learnt about the trace."
)


def _table(title: str, header: list[str], rows: list[list[str]]) -> dict:
    return {"title": title, "header": header, "rows": rows}


def _section(title: str, words: str = "", figures: dict | None = None, tables: list[dict] | None = None) -> dict:
    """`figures` by file name: (figure, caption)."""
    return {"title": title, "words": words, "figures": figures or {}, "tables": tables or []}


def _caption(words: str, rows: list[dict], results: list[dict]) -> str:
    """`words`, and of how `rows` were measured what the page's head does not say of all `results`."""
    differs = measured(rows, results)
    return f"{words} {differs}." if differs else words


def results_section(results: list[dict], chance: float | None) -> dict:
    header = header_of(results)
    words, figures = INTERVALS + (FOLLOWS if "follows" in header else ""), {}
    if any(row["swap"] == "own" for row in results):
        figures["accuracy_over_tokens"] = plots.over_tokens(results, chance), "Accuracy over tokens."
    swapped = [row for row in results if row["mode"] == "abstract"]
    if swapped:
        caption = _caption("Accuracy by swap.", swapped, results)
        figures["accuracy_by_swap"] = plots.by_swap(swapped, chance), caption
    return _section("Results", words, figures, [_table("", header, [cells(row, header) for row in results])])


def swaps_section(results: list[dict]) -> dict | None:
    compared = comparisons(results)
    if not compared:
        return None
    header = [
        "model",
        "task",
        "trace",
        "difference",
        "95 % interval",
        "paired",
        "n",
        "answers changed",
        "traces changed",
    ]
    rows = [
        [
            *(c["model"], c["task"], c["swap"], f"{c['difference']:+.1f}"),
            "{:+.1f} .. {:+.1f}".format(*c["interval"]),
            "yes" if c["paired"] else "no",
            str(c["row"]["n"]),
            *(f"{100 * c['row'][k]:.0f} %" if c["row"].get(k) is not None else "" for k in ("changed", "swapped")),
        ]
        for c in compared
    ]
    words = (
        "Each row answers the same problems after another trace: the difference is its accuracy less that after the "
        "model's own."
    )
    if not all(c["paired"] for c in compared):
        words += " Not paired: from the two rows' own intervals (Newcombe), wider than it need be."
    caption = _caption("Difference to the own trace, 95 % intervals.", [c["row"] for c in compared], results)
    figure = plots.swap_differences(compared), caption
    return _section("Swaps", words, {"swap_differences": figure}, [_table("", header, rows)])


def stages_section(results: list[dict], main: list[dict]) -> dict | None:
    rows = [row for row in results if row["mode"] == "abstract" and (row.get("stage") or row.get("round"))]
    sweep = [row for row in rows if row.get("stage")] or rows
    if len({(row.get("stage"), row.get("round")) for row in sweep}) < 2:
        return None
    header = header_of(sweep)
    figure = plots.over_stages(sweep), _caption("Accuracy over the warm-up, 95 % intervals.", sweep, main)
    table = _table("", header, [cells(row, header) for row in sweep if row.get("stage")])
    return _section("Over the warm-up", "", {"accuracy_over_stages": figure}, [table] if table["rows"] else [])


def codebook_section(
    groups: list[tuple[Path, str, Group]], trained: dict[str, list[dict]], judged: list[dict]
) -> dict | None:
    analyses, rows, figures, unread = {}, [], {}, []
    levels = {(v["model"], v["task"]): v["level"] for v in judged}
    for run, name, group in groups:
        own = sorted((key[0], record) for key, record in group.records["own"].items() if key[1] == 0)
        traces, (vocabulary, known) = [record["trace"] for _, record in own], group.vocabulary(run)
        if not any(traces):
            continue
        a = codebook.analyse(traces, [str(record["gold"]) for _, record in own], vocabulary)
        best = max(a["positions"], key=lambda p: p["information"] - p["baseline"])
        analyses[name], zipf, whole = a, a["zipf"], a["whole"]
        told = best["information"] - best["baseline"]
        if levels.get((name, group.task)) in ("nothing", "positions") and told >= TOLD * a["gold_entropy"] > 0:
            unread.append(
                f" {name}: one token of a trace tells {told:.2f} of {a['gold_entropy']:.2f} nats about the gold "
                "answer, and yet its answers do not need the trace's tokens."
            )
        rows.append(
            [
                name,
                str(a["traces"]),
                str(a["distinct"]),
                f"{a['length_mean']:.1f}",
                *(f"{100 * a[f'share_at_{m}']:.0f} %" if known else "" for m in ("m_min", "m_max")),
                f"{a['tokens_used']} of {vocabulary.size}" + ("" if known else " or more"),
                f"{abs(a['token_entropy']):.2f} of {a['token_entropy_uniform']:.2f}",
                "{:.2f} [{:.2f}, {:.2f}]".format(zipf["exponent"], *zipf["interval"]) if zipf else "",
                f"{zipf['distance']:.2f}" if zipf else "",
                f"{best['information']:.2f} ({best['baseline']:.2f}), p {best['p']:.2f}",
                f"{whole['information']:.2f} ({whole['baseline']:.2f}), p {whole['p']:.2f}" if whole else "",
                f"{a['gold_entropy']:.2f} ({a['golds']})",
            ]
        )
    header = ["model", "traces", "distinct", "length", "at m_min", "at m_max", "tokens used", "entropy", "exponent"]
    header += ["off by", "I(token; gold)", "I(trace; gold)", "H(gold)"]
    if analyses:
        n = ", ".join(sorted({str(a["traces"]) for a in analyses.values()}))
        figures["codebook"] = (
            plots.codebook(analyses),
            f"Own traces, n = {n} problems (first answer of each); seed of permutations 0. {USED}" + "".join(unread),
        )
    if trained:
        caption = "Traces of each stage that the warm-up trained on; from the stages' summary.json, no interval."
        figures["codebook_over_training"] = plots.codebook_over_training(trained), caption
    words = (
        "Own traces. Exponent of a power law over all M ranks: maximum likelihood, the noise of the ranks simulated, "
        "with its 95 % interval (traces are the units); off by: largest gap between cumulated shares and fit. I: "
        "mutual information in nats, plug-in, in brackets its mean over 100 permutations of the gold answers (what "
        "chance gives); p by permutation. I(token; gold) is at the position where it is furthest above chance, and p "
        "is of that position alone. H(gold) with the number of distinct answers: where hardly any answer repeats, "
        "nothing can be told."
    )
    return _section("Codebook", words, figures, [_table("", header, rows)] if rows else []) if figures else None


def training_section(trained: dict[str, Path]) -> dict | None:
    figures, tables = {}, []
    for name, folder in trained.items():
        logs = read_losses(folder)
        logs = {stage: log for stage, log in logs.items() if not any("reward" in entry for entry in log)}
        if logs:
            points = sum(map(len, logs.values()))
            caption = f"Losses and learning rate of {name} as logged, {points} points of one run, no interval."
            figures["losses_" + re.sub(r"\W+", "_", name)] = plots.losses(logs), caption
        tables.append(_table(f"Wall time, {name}", *read_wall_times(folder)))
    return _section("Training", STARTS if figures else "", figures, tables) if trained else None


def gauges_section(trained: dict[str, Path]) -> dict | None:
    """What the gauges of each phase said, step by step."""
    ends, figures, tables = [], {}, []
    for name, folder in trained.items():
        read = {stage: found for stage, log in read_losses(folder).items() if (found := readings(log))}
        if not read:
            continue
        ends += [[f"{name} {stage}", says(found[-1])] for stage, found in read.items()]
        caption = f"Gauges of {name} by step; bars: 2 standard errors of the difference to the own trace."
        figures["gauges_" + re.sub(r"\W+", "_", name)] = plots.gauges(read), caption
        keys = [f"useful_{swap}" for swap in ("own", "random", "other", "none", "own_given_cot", "random_given_cot")]
        rows = [
            [stage, f"{r['step']:.0f}", *(f"{r[key]:.3f}" if key in r else "" for key in keys)]
            + [f"{r['predictable']:.3f} of {r['predictable_uniform']:.2f}"]
            for stage, found in read.items()
            for r in found
        ]
        header = ["phase", "step", "own", "random", "other", "none", "own, given CoT", "random, given CoT", "trace"]
        tables.append(_table(name, header, rows))
    about = (
        "Read on rows held out of training: the answer's loss after the row's own trace, random tokens, another row's "
        "trace and none; given CoT: on the masked row, where states of the trace saw it; trace: the loss of the trace "
        "itself given the prompt, over the codebook and its end."
    )
    said = _table("", ["phase", "at its end"], ends)
    return _section("Gauges", about, figures, [said, *tables]) if tables else None


def published_section(results: list[dict]) -> dict | None:
    def plain(task: str) -> str:
        return re.sub(r"[^a-z0-9]", "", task.lower())

    tasks = {plain(row.get("task", "")) for row in results}
    rows = [row for row in json.loads(PUBLISHED.read_text()) if plain(row["task"]) in tasks]
    header = ["source", "model", "method", "task", "metric", "value", "tokens"]
    text = [[str(row.get(name, "")) for name in header] for row in rows]
    words = (
        "NOT measured here: as the sources give them, by other graders, prompts, decoding and budgets, and without "
        "seeds, n and intervals. They say what to expect, no more."
    )
    return _section("Published", words, tables=[_table("", header, text)]) if rows else None


def settings_section(runs: dict[str, Path]) -> dict | None:
    rows = [
        [(f"{name}: " if len(runs) > 1 else "") + phase, ", ".join(f"{k} {v}" for k, v in settings.items())]
        for name, run in runs.items()
        for phase, settings in read_settings(run).items()
        if settings
    ]
    words = "Of each phase what all its stages share, from their manifests."
    return _section("Settings", words, tables=[_table("", ["phase", "settings"], rows)]) if rows else None
