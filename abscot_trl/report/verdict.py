"""Do the traces carry anything, and what do they cost? In words and numbers, from the rows of results.json alone."""

from math import hypot

from abscot_trl.report.tables import label

WORDS = {
    "information": "its traces carry information about their problem",
    "form": "random tokens cost accuracy, another problem's trace does not: the trace's form matters, not its content",
    "untested form": "random tokens cost accuracy; whether another problem's trace does was not tested",
    "presence": "the answer needs a trace, but not its own",
    "untested presence": "the answer needs a trace; whether it needs its own was not tested",
    "hurts": "its own trace does worse than a swapped one",
    "none": "no evidence that the answer uses its trace",
    "untested": "not tested: evaluate with swaps other, random and none",
}
SWAPS = {"random": "random tokens", "other": "another problem's", "none": "no trace"}


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


def _level(by_swap: dict[str, dict]) -> str:
    lower = {swap for swap, c in by_swap.items() if c["interval"][1] < 0}
    if not by_swap:
        return "untested"
    if "other" in lower:
        return "information"
    if any(c["interval"][0] > 0 for c in by_swap.values()):
        return "hurts"
    if "random" in lower:
        return "form" if "other" in by_swap else "untested form"
    if "none" in lower:
        return "presence" if by_swap.keys() & {"random", "other"} else "untested presence"
    return "none"


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


def verdicts(results: list[dict]) -> list[dict]:
    """
    One for each row in abstract mode after its own trace.

    Returns:
        `model` (label), `task`, `level` (a key of `WORDS`), `words`, `remark`, `numbers` (each swap with its
        difference), `cost` (accuracy and tokens beside verbal and direct answers), `own` (the row), `reference` (the
        row it was first set beside, or `None`), `comparisons`. Content is what `other` tests: traces as the model
        writes them, but of another problem.
    """
    judged = []
    for own in (row for row in results if row["mode"] == "abstract" and row["swap"] == "own"):
        mine = [c for c in comparisons(results) if _key(c["row"]) == _key(own) and c["swap"] in SWAPS]
        by_swap = {c["swap"]: c for c in mine}
        level = _level(by_swap)
        share = by_swap.get("other", {}).get("row", {}).get("swapped", 1.0)
        alike = level in ("form", "none", "presence") and share < 0.5
        remark = (
            f"the traces are much alike: another problem's differs in {100 * share:.0f} % of cases" if alike else ""
        )
        beside = _beside(own, results)
        judged.append(
            {
                "model": label(own),
                "task": own.get("task", ""),
                "level": level,
                "words": WORDS[level],
                "remark": remark,
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


def measured(rows: list[dict]) -> str:
    """How the figures of `rows` came about: n, samples, seeds, decoding."""

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
    parts += [f"{word} {values(name)}" for name, word in words.items() if values(name)]
    return "; ".join(parts)
