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


def _table(title: str, header: list[str], rows: list[list[str]]) -> dict:
    return {"title": title, "header": header, "rows": rows}


def _section(title: str, words: str = "", figures: dict | None = None, tables: list[dict] | None = None) -> dict:
    """`figures` by file name: (figure, caption)."""
    return {"title": title, "words": words, "figures": figures or {}, "tables": tables or []}


def results_section(results: list[dict], chance: float | None) -> dict:
    words, header = f"{INTERVALS} {measured(results)}.", header_of(results)
    words, figures = words + (FOLLOWS if "follows" in header else ""), {}
    if any(row["swap"] == "own" for row in results):
        figure = plots.over_tokens(results, chance)
        figures["accuracy_over_tokens"] = (figure, f"Accuracy over tokens. {measured(results)}.")
    swapped = [row for row in results if row["mode"] == "abstract"]
    if swapped:
        figures["accuracy_by_swap"] = (plots.by_swap(swapped, chance), f"Accuracy by swap. {measured(swapped)}.")
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
        "model's own. Not paired: from the two rows' own intervals (Newcombe), wider than it need be. "
        f"{measured([c['row'] for c in compared])}."
    )
    figure = plots.swap_differences(compared), f"Difference to the own trace, 95 % intervals. {measured(results)}."
    return _section("Swaps", words, {"swap_differences": figure}, [_table("", header, rows)])


def stages_section(results: list[dict]) -> dict | None:
    rows = [row for row in results if row["mode"] == "abstract" and (row.get("stage") or row.get("round"))]
    sweep = [row for row in rows if row.get("stage")] or rows
    if len({(row.get("stage"), row.get("round")) for row in sweep}) < 2:
        return None
    header = header_of(sweep)
    figure = plots.over_stages(sweep), f"Accuracy over the warm-up, 95 % intervals. {measured(sweep)}."
    table = _table("", header, [cells(row, header) for row in sweep if row.get("stage")])
    return _section("Over the warm-up", "", {"accuracy_over_stages": figure}, [table] if table["rows"] else [])


def codebook_section(groups: list[tuple[Path, str, Group]], trained: dict[str, list[dict]]) -> dict | None:
    analyses, rows, figures = {}, [], {}
    for run, name, group in groups:
        own = sorted((key[0], record) for key, record in group.records["own"].items() if key[1] == 0)
        traces, (vocabulary, known) = [record["trace"] for _, record in own], group.vocabulary(run)
        if not any(traces):
            continue
        a = codebook.analyse(traces, [str(record["gold"]) for _, record in own], vocabulary)
        best = max(a["positions"], key=lambda p: p["information"] - p["baseline"])
        analyses[name], zipf, whole = a, a["zipf"], a["whole"]
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
            f"Own traces, n = {n} problems (first answer of each); seed of permutations 0.",
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
        "nothing can be told. Near chance does not mean empty: tokens may tell the answer only together, or with the "
        "prompt; the swaps test that."
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
    return _section("Training", "", figures, tables) if trained else None


def gauges_section(trained: dict[str, Path]) -> dict | None:
    """What the gauges of each phase said, step by step."""
    words, figures, tables = [], {}, []
    for name, folder in trained.items():
        read = {stage: found for stage, log in read_losses(folder).items() if (found := readings(log))}
        if not read:
            continue
        words += [f"{name}, {stage}, at its end: {says(found[-1])}." for stage, found in read.items()]
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
        "itself given the prompt, over the codebook and its end. "
    )
    return _section("Gauges", about + " ".join(words), figures, tables) if tables else None


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
    ]
    words = "Of each phase what all its stages share, from their manifests."
    return _section("Settings", words, tables=[_table("", ["phase", "settings"], rows)]) if rows else None
