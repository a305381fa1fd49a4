"""
report.html: one file that loads nothing from anywhere.

All that a model or a user wrote is data: a JSON block in which no markup can end or begin, put on the page as text.
The page's policy lets run only its own script and style, by their hashes.
"""

import base64
import hashlib
import json
import re
from io import BytesIO
from pathlib import Path

from abscot_trl.evaluation.grading import normal_form
from abscot_trl.report.plots import save
from abscot_trl.report.runs import TEXT_LIMIT, Group
from abscot_trl.report.verdict import SWAPS
from abscot_trl.vocabulary import AbstractVocabulary

TEMPLATE = Path(__file__).with_name("report.html")
ANSWERS_LIMIT = 16 * 2**20  # bytes of answers in a page


def as_json(value) -> str:
    """JSON in ASCII that HTML reads as nothing but text."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _said(record: dict) -> str:
    """What tells answers apart, as `changed` in the results does; the whole response where none was extracted."""
    source = record.get("source", record["task"])  # older answers lack it
    return normal_form(record["answer"], source) if "answer" in record else record["response"]


def _answer(record: dict, own: dict) -> dict:
    short = {"t": record["trace"], "r": record["response"], "s": record["score"]}
    short |= {"z": record.get("trace_tokens", len(record["trace"])), "y": record.get("answer_tokens", "")}
    short |= {"a": record["answer"]} if "answer" in record else {}
    short |= {"l": record["response_length"]} if "response_length" in record else {}
    short |= {"x": 1} if record.get("truncated") else {}
    short |= {"f": 1} if record.get("follows") else {}
    return short | ({"c": 1} if _said(record) != _said(own) else {})


def browser(groups: list[tuple[Path, str, Group]], limit: int = ANSWERS_LIMIT) -> dict:
    """
    The answers that go into the page: those of whole problems, in the order of their ids' SHA-256, as long as `limit`
    bytes hold them.

    Returns:
        `groups`, `problems`, `entries` ([problem, group, sample, {swap: answer}]), `tokens` (names of the codebook)
        and `note`, which says how many problems of how many are here.
    """
    problems: dict[tuple[str, str], dict] = {}
    for number, (_, _, group) in enumerate(groups):
        for swap, records in group.records.items():
            for (id, sample), record in records.items():
                problem = problems.setdefault((group.task, id), {"record": record, "entries": {}})
                problem["entries"].setdefault((number, sample), {})[swap] = record
    order = sorted(problems, key=lambda key: hashlib.sha256("\0".join(key).encode("utf-8", "replace")).digest())
    chosen, spent = {}, 0
    for key in order:
        record = problems[key]["record"]
        entries = [
            [*at, {swap: _answer(one, swaps["own"]) for swap, one in swaps.items()}]
            for at, swaps in sorted(problems[key]["entries"].items())
            if "own" in swaps
        ]
        about = {"task": key[0], "id": key[1], "text": record.get("problem", ""), "gold": str(record["gold"] or "")}
        about |= {"length": record["problem_length"]} if "problem_length" in record else {}
        spent += len(as_json([about, entries]))
        if chosen and spent > limit:
            break
        chosen[key] = about, entries
    shown = [key for key in problems if key in chosen]  # as they stand in the files
    entries = [[i, *entry] for i, key in enumerate(shown) for entry in chosen[key][1]]
    most = max((index for *_, swaps in entries for answer in swaps.values() for index in answer["t"]), default=0)
    note = (
        f"{len(shown)} of {len(problems)} problems are in this page"
        + (
            f", drawn by the hash of their ids to keep its answers under {limit / 2**20:.0f} MiB"
            if len(shown) < len(problems)
            else ""
        )
        + f"; of a text at most its first {TEXT_LIMIT:,} characters. One column a model; a colour stands for the same "
        "codebook token everywhere. Right: a score of at least 0.5. Below each answer what the model said after a "
        "swapped trace (follows: the answer of the problem whose trace it was). Columns that do not match the filter "
        "are pale."
    )
    return {
        "groups": [{"label": name, "mode": group.mode, "task": group.task} for _, name, group in groups],
        "problems": [chosen[key][0] for key in shown],
        "entries": entries,
        "tokens": AbstractVocabulary(size=most + 1).tokens,
        "note": note,
    }


def _headline(v: dict) -> dict:
    own, reference = v["own"], v["reference"]
    headline = [[f"{own['accuracy']:.1f}", "accuracy [{:.1f}, {:.1f}]".format(*own["ci95"])]]
    headline.append([f"{own['tokens']:.1f}", f"tokens ({own['trace_tokens']:.1f} trace)"])
    if reference and reference["tokens"]:
        ratio = f"{own['tokens'] / reference['tokens']:.2f}×"
        headline.append([ratio, f"the tokens of {reference['model']}, {reference['mode']}"])
    bars = [["own trace", own["accuracy"], *own["ci95"], f"{own['accuracy']:.1f}"]]
    for c in v["comparisons"]:
        words = (
            f"{c['row']['accuracy']:.1f} ({c['difference']:+.1f} [{c['interval'][0]:+.1f}, {c['interval'][1]:+.1f}])"
        )
        bars.append([SWAPS[c["swap"]], c["row"]["accuracy"], *c["row"]["ci95"], words])
    paired = {c["paired"] for c in v["comparisons"]}
    words = "differences are " + ("paired by problem" if paired == {True} else "not paired") if paired else ""
    words = "; ".join(filter(None, [v["measured"], words, "95 % intervals."]))
    return {
        **{k: v[k] for k in ("model", "task", "level", "words", "remark", "cost")},
        "headline": headline,
        "bars": bars,
        "measured": words,
    }


def page(title: str, command: str, head: str, verdicts: list, sections: list, answers: dict) -> str:
    """`report.html` filled with what `report` found; figures go in as SVG."""
    drawn = []
    for section in sections:
        figures = []
        for name, (figure, caption) in section["figures"].items():
            save(figure, buffer := BytesIO(), "svg")
            image = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
            figures.append(
                {"name": name, "image": image, "caption": caption, "wide": bool(figure.get_figwidth() > 8.5)}
            )
        drawn.append({**section, "figures": figures})
    data = {
        "title": title,
        "command": command,
        "head": head,
        "verdicts": list(map(_headline, verdicts)),
        "sections": drawn,
    }
    template = TEMPLATE.read_text()
    hashes = {
        tag: base64.b64encode(
            hashlib.sha256(re.search(f"<{tag}>(.*?)</{tag}>", template, re.S)[1].encode()).digest()
        ).decode()
        for tag in ("script", "style")
    }
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    before, after = template.replace("__POLICY__", policy).split("__DATA__")
    return before + as_json(data | {"browser": answers}) + after
