"""Do the traces carry anything, and what do they cost? In words and numbers, from the rows of results.json alone."""

from math import hypot

from abscot_trl.markdown import escaped
from abscot_trl.report.tables import label

INTERVALS = (
    "Accuracy in points with 95 % intervals over the problems (Wilson's, at the scores' own variance where they are "
    "not right or wrong); tokens are means a problem, the two delimiters of a trace not counted."
)

WORDS = {
    "tokens": "the tokens of its traces carry: random ones cost accuracy, and so does another problem's trace",
    "positions": "only the positions of its traces carry, as pause tokens do: it needs a trace, but not its own",
    "nothing": "nothing in its traces carries: it does as well without one",
    "open": "nothing can be told about its traces",
}
SWAPS = {"random": "random tokens", "other": "another problem's", "none": "no trace"}
MATTERS = 10.0  # points: a verdict may not rest on an interval that could hide so large an effect


def difference(row: dict, base: dict) -> tuple[float, list[float], bool]:
    """
    `row` less `base` in points, its 95 % interval, and whether it is paired by problem.

    Rows that hold no paired difference get the unpaired one of their own intervals (Newcombe's square-and-add; wider
    where the two answer the same problems right).
    """
    if "difference_ci95" in row and base["swap"] == "own" and row["swap"] != "own":
        return row["difference"], list(row["difference_ci95"]), True
    (low, high), (base_low, base_high) = row["ci95"], base["ci95"]
    a, b = row["accuracy"], base["accuracy"]
    return a - b, [a - b - hypot(a - low, base_high - b), a - b + hypot(high - a, b - base_low)], False


def _key(row: dict) -> tuple:
    return tuple(row.get(name) for name in ("run", "task", "model", "round", "stage", "mode"))


def comparisons(results: list[dict]) -> list[dict]:
    """Each swapped row beside its own: `model` (label), `task`, `swap`, `difference`, `interval`, `paired`, `row`."""
    own = {_key(row): row for row in results if row["swap"] == "own"}
    compared = []
    for row in results:
        if row["swap"] != "own" and _key(row) in own:
            points, interval, paired = difference(row, own[_key(row)])
            name = label(row) + ("" if row["mode"] == "abstract" else f" ({row['mode']})")
            compared.append({"model": name, "task": row.get("task", ""), "swap": row["swap"], "row": row})
            compared[-1] |= {"difference": points, "interval": interval, "paired": paired}
    return compared


def _costs(comparison: dict | None) -> bool | None:
    """Whether a swap costs accuracy by its interval; `None` where that cannot be told, or was not tested."""
    low, high = comparison["interval"] if comparison else (-100.0, 100.0)
    return True if high < 0 else False if low > -MATTERS else None


def _judge(own: dict, by_swap: dict[str, dict], chance: float) -> tuple[str, str]:
    """
    The level, a key of `WORDS`, and why nothing can be told where it is `open`.

    The tokens carry if random ones and another problem's both cost accuracy. If they do not, the positions carry if
    having no trace costs accuracy, and else nothing does.
    """
    costs = {swap: _costs(by_swap.get(swap)) for swap in SWAPS}
    if costs["random"] and costs["other"]:
        return "tokens", ""
    asked = ["none"] if False in (costs["random"], costs["other"]) else SWAPS
    unclear = [swap for swap in asked if costs[swap] is None]
    untested = [swap for swap in unclear if swap not in by_swap]
    if untested:
        return "open", f"not tested: swap{'s' * (len(untested) > 1)} {', '.join(untested)}"
    if unclear:
        return "open", f"n = {own['n']} is too few, the intervals could hide an effect of {MATTERS:.0f} points"
    if own["ci95"][1] - chance < MATTERS:
        return "open", f"at {own['accuracy']:.1f} (guessing: {chance:.0f}) there is hardly any accuracy to lose"
    return "positions" if costs["none"] else "nothing", ""


def _remarks(level: str, by_swap: dict[str, dict]) -> str:
    """What a reader should know beside the level."""
    words, costs = [], {swap: _costs(c) for swap, c in by_swap.items()}
    better = [SWAPS[swap] for swap, c in by_swap.items() if c["interval"][0] > 0]
    if better:
        words.append(f"its own trace does worse than {' and '.join(better)}")
    if level == "tokens" and costs.get("none") is False:
        words.append("it does as well without a trace")
    if level in ("positions", "nothing") and costs.get("other"):
        words.append("another problem's trace misleads it: the tokens are read, but do not help")
    if level in ("positions", "nothing") and costs.get("random"):
        words.append("random tokens cost accuracy, another problem's trace does not: form matters, not content")
    share = by_swap.get("other", {}).get("row", {}).get("swapped", 1.0)
    if level != "tokens" and share < 0.5:
        words.append(f"the traces are much alike: another problem's differs in {100 * share:.0f} % of cases")
    return "; ".join(words)


def following(row: dict) -> str:
    """How often the answer follows another problem's trace, in words; nothing where `row` does not say."""
    if "follows" not in row:
        return ""
    low, high = row["follows_ci95"]
    often = f"{row['follows']:.0f} % [{low:.0f}, {high:.0f}] of {row['follows_n']} cases"
    chance = f" (by chance {row['follows_chance']:.0f} %)" if "follows_chance" in row else ""
    same = f", and the one that the trace gave there in {row['repeats']:.0f} %" if "repeats" in row else ""
    return f"after another problem's trace the answer is that problem's in {often}{chance}{same}"


def _beside(own: dict, results: list[dict]) -> list[tuple[dict, str]]:
    """The best verbal and the best direct row of the same task, each with what it takes beside `own`, in words."""
    same = [row for row in results if row.get("task") == own.get("task") and row["swap"] == "own"]
    best = []
    for mode in ("verbal", "direct"):
        row = max((row for row in same if row["mode"] == mode), key=lambda row: row["accuracy"], default=None)
        if row is not None:
            points, (low, high), _ = difference(own, row)
            words = (
                f"beside {label(row)} ({mode}), {row['accuracy']:.1f} in {row['tokens']:.1f} tokens: {points:+.1f} "
            )
            words += f"points [{low:+.1f}, {high:+.1f}]"
            words += f" at {own['tokens'] / row['tokens']:.2f} times its tokens" if row["tokens"] else ""
            best.append((row, words))
    return best


def verdicts(results: list[dict], chance: float | None = None) -> list[dict]:
    """
    One for each row in abstract mode after its own trace.

    Args:
        chance (`float`, *optional*): accuracy of guessing in points. When left out, how often an answer was that of a
            third problem (`follows_chance`), or 0.

    Returns:
        `model` (label), `task`, `level` (a key of `WORDS`), `words`, `remark`, `measured` (how, where not as
        all `results`), `numbers` (each swap with its difference), `cost` (accuracy and tokens beside verbal and direct
        answers), `own` (the row), `reference` (the row it was first set beside, or `None`), `comparisons`. Where an
        interval could hide an effect of `MATTERS` points the level is `open`, not `nothing`.
    """
    judged = []
    for own in (row for row in results if row["mode"] == "abstract" and row["swap"] == "own"):
        mine = [c for c in comparisons(results) if _key(c["row"]) == _key(own) and c["swap"] in SWAPS]
        by_swap = {c["swap"]: c for c in mine}
        known = by_swap["other"]["row"].get("follows_chance", 0.0) if "other" in by_swap else 0.0
        level, why = _judge(own, by_swap, known if chance is None else chance)
        words = WORDS[level] + (f": {why}" if why else "")
        follows = following(by_swap["other"]["row"]) if "other" in by_swap else ""
        beside = _beside(own, results)
        judged.append(
            {
                "model": label(own),
                "task": own.get("task", ""),
                "level": level,
                "words": "; ".join(filter(None, [words, follows])),
                "remark": _remarks(level, by_swap),
                "measured": measured([own], results),
                "numbers": ", ".join(
                    f"{SWAPS[swap]} {c['row']['accuracy']:.1f} ({c['difference']:+.1f} "
                    f"[{c['interval'][0]:+.1f}, {c['interval'][1]:+.1f}])"
                    for swap, c in by_swap.items()
                ),
                "cost": "; ".join(words for _, words in beside),
                "own": own,
                "reference": beside[0][0] if beside else None,
                "comparisons": mine,
            }
        )
    return judged


def verdict_line(v: dict) -> str:
    """One of [`verdicts`] as an item of a Markdown list."""
    own, (low, high) = v["own"], v["own"]["ci95"]
    about = f"{own['accuracy']:.1f} [{low:.1f}, {high:.1f}] in {own['tokens']:.1f} tokens a problem"
    swapped = v["numbers"] and f"after {v['numbers']}"
    about = "; ".join(filter(None, [about, v["cost"], swapped, v["remark"], v["measured"]]))
    name = v["model"] + (f", {v['task']}" if v["task"] else "")
    return f"- **{escaped(name)}: {escaped(v['words'])}.** {escaped(about)}."


def measured(rows: list[dict], among: list[dict] | None = None) -> str:
    """How the figures of `rows` came about: n, samples, seeds, decoding; only what is not said of all `among`."""
    said = _conditions(among) if among else []
    return "; ".join(part for part in _conditions(rows) if part not in said)


def _conditions(rows: list[dict]) -> list[str]:
    def values(name: str) -> str:
        given = [row["decoding"].get(name) for row in rows if row.get("decoding")]
        given = sorted({value for value in given if value is not None}, key=lambda value: (str(type(value)), value))
        return ", ".join(map(str, given))

    parts = [f"n = {', '.join(map(str, sorted({row['n'] for row in rows})))}"]
    samples = sorted({row.get("samples", 1) for row in rows})
    parts += [f"{', '.join(map(str, samples))} answers a problem"] if samples != [1] else []
    words = {
        "seed": "seed",
        "trace_temperature": "trace temperature",
        "temperature": "answer temperature",
        "top_p": "top_p",
        "top_k": "top_k",
        "max_new_tokens": "max_new_tokens",
        "backend": "backend",
    }
    return parts + [f"{word} {values(name)}" for name, word in words.items() if values(name)]
