"""The report of a made-up run, in Markdown and in Chromium: every figure is there, hostile text does nothing."""

import html
import json
import re
import shutil
import subprocess
import time
from dataclasses import asdict

import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image

from abscot_trl.data.toy import chain_arithmetic
from abscot_trl.evaluation.grading import wilson_interval
from abscot_trl.evaluation.report import ReportArguments, report
from abscot_trl.evaluation.runs import TEXT_LIMIT, read_answers
from abscot_trl.evaluation.swaps import SWAPS, swap_traces
from abscot_trl.files import write_whole
from abscot_trl.record import COLUMNS
from abscot_trl.scripts.report import with_runs
from abscot_trl.traces.files import summarise_traces
from abscot_trl.vocabulary import AbstractVocabulary

N, VOCABULARY = 300, AbstractVocabulary(8, 1, 6)
DECODING = {"backend": "hf", "trace_temperature": 0.0, "temperature": 0.0, "max_new_tokens": 64, "seed": 3}
EVIL = "</script><script>document.title='pwned'</script><img src=x onerror=alert(1)> | a\n| b \u2028 `c` &lt;"
SWAPPED = [*SWAPS, "cut:3"]


def scored(model, mode, swap, records, own, **fields):
    """A row of results.json, as an evaluation writes it."""
    scores = np.array([record["score"] for record in records])
    trace, answer = (float(np.mean([record[key] for record in records])) for key in ("trace_tokens", "answer_tokens"))
    row = {"model": model, "task": "chain", "mode": mode, "swap": swap, "n": len(records)}
    row |= {"accuracy": 100 * scores.mean(), "ci95": list(wilson_interval(int(scores.sum()), len(scores)))}
    row |= {"trace_tokens": trace, "answer_tokens": answer, "tokens": trace + answer, "truncated": 0}
    if swap != "own":
        off = 100 * (scores - [record["score"] for record in own])
        half = 1.96 * off.std(ddof=1) / len(off) ** 0.5
        row |= {"difference": off.mean(), "difference_ci95": [off.mean() - half, off.mean() + half]}
        pairs = list(zip(records, own, strict=True))
        row["changed"] = float(np.mean([a["answer"] != b["answer"] for a, b in pairs]))
        row["swapped"] = float(np.mean([a["trace"] != b["trace"] for a, b in pairs]))
    return row | {"decoding": DECODING, **fields}


def write_run(run, n=N, seed=0, models=("informed", "paper"), extra=()):
    """
    A run of two recipes: `informed` writes the running values and answers from them, `paper` always the same trace and
    answers without it. `extra` are more answers of `informed`, in its results not counted.
    """
    rng, results = np.random.default_rng(seed), []
    problems = [asdict(row) for row in chain_arithmetic(n, 6, 5, seed)]
    for problem in problems:
        problem["values"] = [int(value) for value in re.findall(r"=(\d);", problem["cot"])]

    def answers(model, mode, swap, traces, says, tokens):
        return [
            {
                **{"model": model, "task": "chain", "mode": mode, "swap": swap, "id": problem["id"], "sample": 0},
                **{"problem": problem["prompt"][0]["content"], "trace": trace, "gold": problem["gold"]},
                **{"response": f"\\boxed{{{said}}}", "answer": said, "score": float(said == problem["gold"])},
                **{"trace_tokens": len(trace), "answer_tokens": tokens, "truncated": False},
            }
            for problem, trace, said in zip(problems, traces, says, strict=True)
        ]

    def write(folder, records):
        folder.mkdir(parents=True)
        write_whole(folder / "answers.jsonl", "".join(json.dumps(record) + "\n" for record in records))

    golds = [problem["gold"] for problem in problems]
    spoken = answers("base", "verbal", "own", [[]] * n, golds, 39)
    write(run / "evaluate-base", spoken)
    results.append(scored("base", "verbal", "own", spoken, spoken))
    blind = [str(rng.integers(5)) for _ in range(n)]
    for model in models:
        for t in (1, 2):
            folder, every = run / model / f"round{t}", []
            own = [p["values"] if model == "informed" else [7] * 6 for p in problems]
            for swap in SWAPPED:
                traces = swap_traces(own, swap, VOCABULARY.size, seed)
                says = [str(trace[-1] % 5) if trace else "0" for trace in traces] if model == "informed" else blind
                if swap == "own":  # a few mistakes
                    says = [str((int(s) + (i % 60 == 7 * t)) % 5) for i, s in enumerate(says)]
                    first = records = answers(model, "abstract", swap, traces, says, 3)
                else:
                    records = answers(model, "abstract", swap, traces, says, 3)
                every += records
                results.append(scored(model, "abstract", swap, records, first, round=t))
            write(folder / "evaluate", every + [*extra] * (t == 1 and model == "informed"))
            for phase in ("bottleneck", "distill"):
                for stage in (f"{phase}-traces", phase):
                    (folder / stage).mkdir()
                    manifest = {
                        "phase": "traces" if "-" in stage else phase,
                        "settings": {"seed": t, "dtype": "float32"},
                    }
                    write_whole(folder / stage / "manifest.json", json.dumps(manifest))
                VOCABULARY.save(folder / phase)
                write_whole(folder / f"{phase}-traces" / "summary.json", json.dumps(summarise_traces(own, VOCABULARY)))
        steps = [
            [f"round{t}/{phase}", step, 1e-3 * (1 - step / 120), 2 / step, 3 / step, "", 1 / step, 1.0]
            for t in (1, 2)
            for phase in ("bottleneck", "distill")
            for step in range(10, 110, 10)
        ]
        lines = [",".join(["stage", *COLUMNS[:7]]), *(",".join(map(str, step)) for step in steps)]
        write_whole(run / model / "losses.csv", "\n".join(lines) + "\n")
        table = (
            "# Wall time by stage\n\n| stage | rows | wall s |\n|---|---:|---:|\n| round1/bottleneck | 128 | 61.7 |\n"
        )
        write_whole(run / model / "record.md", table + "\n- GPUs: none\n")
    write_whole(run / "results.json", json.dumps(results))
    return results
