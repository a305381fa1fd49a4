"""The report of a made-up run, in Markdown and in Chromium: every figure is there, hostile text does nothing."""

import html
import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from markdown_it import MarkdownIt
from matplotlib.text import Text
from PIL import Image
from scipy.stats import binomtest

from abscot_trl.data.toy import chain_arithmetic
from abscot_trl.errors import Refused
from abscot_trl.evaluation.statistics import summarise
from abscot_trl.evaluation.swaps import donors, swap_traces
from abscot_trl.loop.record import COLUMNS
from abscot_trl.phases import parse_phase
from abscot_trl.report import make, plots
from abscot_trl.report.make import ReportArguments, report, write_own
from abscot_trl.report.page import as_json, browser
from abscot_trl.report.runs import TEXT_LIMIT, over_training, read_answers, read_losses, read_settings, read_wall_times
from abscot_trl.report.sections import codebook_section
from abscot_trl.storage import write_whole
from abscot_trl.traces.files import summarise_traces
from abscot_trl.vocabulary import AbstractVocabulary

N, VOCABULARY = 300, AbstractVocabulary(8, 1, 6)
DECODING = {"backend": "hf", "trace_temperature": 0.0, "temperature": 0.0, "max_new_tokens": 64, "seed": 3}
EVIL = "</script </script><script>document.title='pwned'</script><img src=x onerror=alert(1)> | a\n| b \u2028 `c` &lt;"
SWAPPED = ["own", "random", "shuffled", "other", "none", "cut:3"]


def wilson(correct, n):
    interval = binomtest(int(correct), n).proportion_ci(method="wilson")
    return [100 * interval.low, 100 * interval.high]


def scored(model, mode, swap, records, own, **fields):
    """A row of results.json, as an evaluation writes it."""
    scores = np.array([record["score"] for record in records])
    trace, answer = (float(np.mean([record[key] for record in records])) for key in ("trace_tokens", "answer_tokens"))
    row = {"model": model, "task": "chain", "mode": mode, "swap": swap, "n": len(records)}
    row |= {"accuracy": 100 * scores.mean(), "ci95": wilson(scores.sum(), len(scores))}
    row |= {"trace_tokens": trace, "answer_tokens": answer, "tokens": trace + answer, "truncated": 0}
    if swap != "own":
        off = 100 * (scores - [record["score"] for record in own])
        half = 1.96 * off.std(ddof=1) / len(off) ** 0.5
        row |= {"difference": off.mean(), "difference_ci95": [off.mean() - half, off.mean() + half]}
        pairs = list(zip(records, own, strict=True))
        row["changed"] = float(np.mean([a["answer"] != b["answer"] for a, b in pairs]))
        row["swapped"] = float(np.mean([a["trace"] != b["trace"] for a, b in pairs]))
    if swap == "other":
        follow = [record["follows"] for record in records if record["follows"] is not None]
        row |= {
            "follows": 100 * np.mean(follow),
            "follows_n": len(follow),
            "follows_ci95": wilson(sum(follow), len(follow)),
        }
        row |= {"follows_chance": 25.0, "follows_chance_ci95": [20.0, 30.0]}
    return row | {"decoding": DECODING, **fields}


def write_run(run, n=N, seed=0, models=("informed", "paper"), rounds=(1, 2), extra=()):
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
    given = [golds[donor] for donor in donors(n, seed)]
    spoken = answers("base", "verbal", "own", [[]] * n, golds, 39)
    write(run / "evaluate-base", spoken)
    results.append(scored("base", "verbal", "own", spoken, spoken))
    blind = [str(rng.integers(5)) for _ in range(n)]
    for model in models:
        for t in rounds:
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
                if swap == "other":
                    for record, gold in zip(records, given, strict=True):
                        record["follows"] = record["answer"] == gold if record["gold"] != gold else None
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
            for t in rounds
            for phase in ("bottleneck", "distill")
            for step in range(10, 110, 10)
        ]
        lines = [",".join(["stage", *COLUMNS[:7]]), *(",".join(map(str, step)) for step in steps)]
        write_whole(run / model / "losses.csv", "\n".join(lines) + "\n")
        sweep = [
            {**row, "stage": stage, "round": int(stage[5:6]) if stage != "base" else 0}
            for stage in ("base", *(f"round{t}/{phase}" for t in rounds for phase in ("bottleneck", "distill")))
            for row in results[-len(SWAPPED) :]
        ]
        (run / model / "sweep").mkdir()
        write_whole(run / model / "sweep" / "results.json", json.dumps(sweep))
        table = (
            "# Wall time by stage\n\n| stage | rows | wall s |\n|---|---:|---:|\n| round1/bottleneck | 128 | 61.7 |\n"
        )
        write_whole(run / model / "record.md", table + "\n- GPUs: none\n")
    write_whole(run / "results.json", json.dumps(results))
    return results


class Page(HTMLParser):
    """A dumped DOM: its elements with their attributes, its title, the text of table cells, and what the data says."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.title, self.rows, self.text = [], [], "", [], ""
        self.feed(
            re.sub(
                r'(<script type="application/json".*?</script>)|(<script>.*?</script>)',
                "<script></script>",
                text,
                flags=re.S,
            )
        )

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, text):
        self.text += text
        if "title" in self.open:
            self.title += text
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += text

    def all(self, tag, name=""):
        return [a for found, a in self.elements if found == tag and name in a.get("class", "").split(" ")]

    @property
    def problems(self):
        return [a["data-id"] for a in self.all("div", "problem")]


def opened(path, fragment="", wait=False):
    """The page after its script ran in headless Chromium (`wait`: and after a second more of its own time)."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium is installed: the page was not looked at")
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
        flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"]
        flags += ["--virtual-time-budget=1000"] if wait else []
        command = [chromium, *flags, "--dump-dom", f"{path.as_uri()}{fragment}"]
        done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    page = Page(done.stdout.decode())
    assert "data-ready" in dict(page.elements)["html"], "the page's script did not end"
    return page


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    results = write_run(run)
    report(ReportArguments([str(run)], title="A made-up run", chance=20.0))
    return run, results


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """12,000 answers, and 40 of a model that writes markup, a line of 1 MB, and separators."""
    run = tmp_path_factory.mktemp("hostile")
    texts = [EVIL, "x" * 2**20, EVIL + "y" * 2000]
    extra = [
        {
            **{
                "model": EVIL,
                "task": EVIL,
                "mode": "abstract",
                "swap": swap,
                "id": f"{EVIL}{i}",
                "problem": texts[i % 3],
            },
            **{"trace": [i % 8] * 6, "response": texts[i % 3], "answer": EVIL, "gold": EVIL, "score": float(i % 2)},
            **{"trace_tokens": 6, "answer_tokens": 3, "truncated": True},
        }
        for i in range(20)
        for swap in ("own", "random")
    ]
    results = write_run(run, n=1700, models=("informed",), rounds=(1,), extra=extra)
    results += [{**results[1], "model": EVIL, "task": EVIL}, {**results[2], "model": EVIL, "task": EVIL}]
    write_whole(run / "results.json", json.dumps(results))
    report(ReportArguments([str(run)], title=EVIL))
    return run / "report"


def test_markdown_holds_every_figure(made):
    run, results = made
    tokens = MarkdownIt("commonmark").enable("table").parse((run / "report" / "report.md").read_text())
    cells = [token.content for token in tokens if token.type == "inline"]
    for row in results:
        assert f"{row['accuracy']:.1f}" in cells and "{:.1f}-{:.1f}".format(*row["ci95"]) in cells
        if row["swap"] != "own":
            assert f"{row['difference']:+.1f}" in cells
    text = (run / "report" / "report.md").read_text()
    verdicts = [line for line in text.splitlines() if line.startswith("- **")]
    said = [("the tokens of its traces carry" in line, "hardly any accuracy to lose" in line) for line in verdicts]
    assert said == [(True, False)] * 2 + [(False, True)] * 2  # the second model guesses one of five
    for line, row in zip(verdicts, [row for row in results if row["swap"] == "other"], strict=True):
        low, high = row["follows_ci95"]
        often = f"{row['follows']:.0f} % \\[{low:.0f}, {high:.0f}\\] of {row['follows_n']} cases (by chance 25 %)"
        assert f"the answer is that problem's in {often}.**" in line
        assert f"{row['follows']:.1f} ({low:.1f}-{high:.1f}), 25.0 by chance" in cells
    assert text.count("n = 300; seed 3; trace temperature 0.0") == 1 and "n = 300" not in "".join(verdicts)
    images = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert cells.count("informed round2/distill") == len(SWAPPED) and cells.count("round1/bottleneck") == 2
    assert {
        "accuracy_by_swap.png",
        "accuracy_over_stages.png",
        "accuracy_over_tokens.png",
        "swap_differences.png",
        "codebook.png",
    } < set(images)
    for name in images:
        image = Image.open(run / "report" / name)
        assert image.width > 600 and len(set(image.convert("L").tobytes())) > 20
    assert "by chance: how many are a third problem's" in text
    assert "Published" not in text and "61.7" in text and "dtype float32" in text


def test_page_holds_every_figure(made):
    run, results = made
    page = opened(run / "report" / "report.html")
    assert (
        page.title == "A made-up run" and len(page.all("article", "tokens")) == len(page.all("article", "open")) == 2
    )
    for row in results:
        name = row["model"] + (f" r{row['round']}" if row.get("round", 1) > 1 else "")
        swap = row["swap"] if row["mode"] == "abstract" else ""
        cells = [name, row["mode"], swap, f"{row['accuracy']:.1f}", "{:.1f}-{:.1f}".format(*row["ci95"])]
        cells += [f"{row[key]:.1f}" for key in ("trace_tokens", "answer_tokens", "tokens")] + [str(row["n"])]
        assert cells in [found[:9] for found in page.rows]
    assert len(page.all("img")) >= 7 and all(
        a["src"].startswith("data:image/svg+xml;base64,") for a in page.all("img")
    )
    assert page.text.count("n = 300; seed 3; trace temperature 0.0") == 1
    assert len(page.problems) == 20 and "300 of 300 problems, page 1 of 15" in page.text
    tokens = page.all("span", "token")
    colours = {a["title"]: set() for a in tokens}
    for a in tokens:
        colours[a["title"]].add(a["style"])
    assert len(colours) == 8 and all(len(found) == 1 for found in colours.values()), "a colour a token"


def test_what_traces_tell_is_not_what_answers_read(made):
    """The informed traces end in the answer, the paper's are all alike."""
    groups = [(made[0], group.label, group) for group in read_answers(made[0]) if group.mode == "abstract"]
    for level, said in (("tokens", False), ("open", False), ("nothing", True)):
        judged = [{"model": name, "task": "chain", "level": level} for name in ("informed", "paper")]
        _, caption = codebook_section(groups, {}, judged)["figures"]["codebook"]
        assert ("informed: one token of a trace tells" in caption) == said and "paper" not in caption
        assert "not whether the answer reads its trace" in caption


def test_losses_can_be_read():
    """At the 555 pixels that a figure has on the page 8 pt are 9 pixels; the legend lies beside the lines."""
    log = [{"step": s, "loss_trace": 16 / s, "loss_trace_uniform": 4.2, "loss_answer": 1 / s} for s in range(1, 9)]
    figure = plots.losses({f"round{t}/{phase}": log for t in (1, 2) for phase in ("bottleneck", "distill")})
    shown = [text for text in figure.findobj(Text) if text.get_text()]
    assert min(text.get_fontsize() for text in shown) * 555 / (72 * figure.get_figwidth()) >= 9
    plots.save(figure, BytesIO())
    (legend,), axes = figure.legends, figure.axes[0]
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    assert [text.get_text() for text in legend.get_texts()] == ["trace", "ln M", "answer", "learning rate"]
    assert {4.2} in [set(line.get_ydata()) for line in axes.lines]


def test_filters(made):
    run, _ = made
    groups = read_answers(run)
    assert [group.label for group in groups] == ["base", "informed", "informed r2", "paper", "paper r2"]
    informed, paper = (groups[i].records for i in (1, 3))
    html = run / "report" / "report.html"
    wrong = [key[0] for key, record in informed["own"].items() if not record["score"]]
    page = opened(html, "#show=wrong&models=1")
    assert page.problems == wrong and len(wrong) == 5
    followed = [row[0] for row in page.rows if row[-1].endswith("follows")]
    assert followed == ["other"] * sum(informed["other"][id, 0]["follows"] for id in wrong) and followed
    assert page.all("div", "answer") and not page.all("div", "right") and f"5 of {N} problems" in page.text
    changed = [
        key[0]
        for key, record in paper["own"].items()
        if any(paper[swap][key]["answer"] != record["answer"] for swap in SWAPPED[1:])
    ]
    assert opened(html, "#after=changed&models=3").problems == changed and 0 < len(changed) < 20
    assert f"{N - len(changed)} of {N} problems" in opened(html, "#after=same&models=3").text
    wanted = [key[0] for key in informed["own"] if "4+1" in key[0]]
    assert opened(html, "#q=4%2B1&page=2").problems == wanted[20:40]


def test_hostile_text_is_text(hostile):
    page = opened(hostile / "report.html", "#models=2", wait=True)
    assert page.title == re.sub(r"\s+", " ", EVIL) or page.title == EVIL
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2 and all(a["src"].startswith("data:") for a in page.all("img"))
    assert not [name for _, a in page.elements for name in a if name.startswith("on") or name == "href"]
    assert len(page.problems) == 20 and page.problems[0] == EVIL + "0" and EVIL in page.text
    assert f"show {TEXT_LIMIT:,} of {2**20:,} characters" in page.text and len(page.text) < 200_000
    for mark in ("document.title='pwned'", "onerror"):  # never outside the text
        assert mark not in " ".join(str(list(a)) for _, a in page.elements)


def test_many_answers_do_not_freeze_it(hostile):
    page = opened(hostile / "report.html")
    assert int(dict(page.elements)["html"]["data-ready"]) < 8000  # ms, on a busy machine
    assert "1720 of 1720 problems, page 1 of 86" in page.text
    assert (hostile / "report.html").stat().st_size < 20 * 2**20


def test_the_policy_blocks_what_would_get_in(made, tmp_path):
    """Even markup that got past the escaping would not run."""
    text = (made[0] / "report" / "report.html").read_text()
    path = tmp_path / "page.html"
    path.write_text(
        text.replace(
            "<noscript>",
            "<script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\"><noscript>",
        )
    )
    page = opened(path, wait=True)
    assert (
        page.title == "A made-up run"
        and page.elements.count(("img", {"src": "x", "onerror": "document.title='pwned'"})) == 1
    )


def test_hostile_markdown(hostile):
    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render((hostile / "report.md").read_text())
    assert "<script" not in rendered and '<img src="x' not in rendered and "<img src=x" not in rendered
    rows = re.findall(r"<tr>(.*?)</tr>", rendered, re.S)
    cells = [html.unescape(cell) for row in rows for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.S)]
    assert EVIL.replace("\n", " ").replace("\u2028", " ") in cells
    assert len({row.count("<td") for row in rows[1:10]}) == 1


def test_answers_within_the_limit(made):
    run, _ = made
    groups = [(run, group.label, group) for group in read_answers(run)]
    few = browser(groups, limit=60_000)
    assert len(as_json([few["problems"], few["entries"]])) < 70_000
    assert 10 < len(few["problems"]) < N and few["note"].startswith(f"{len(few['problems'])} of {N} problems")
    again = browser(groups[::-1], limit=60_000)
    assert {p["id"] for p in again["problems"]} == {p["id"] for p in few["problems"]}
    every = browser(groups)
    assert len(every["problems"]) == N and len(every["entries"]) == 5 * N and every["tokens"][-1] == "<TOKEN_H>"
    assert {len(entry[3]) for entry in every["entries"] if entry[1]} == {len(SWAPPED)}


def test_old_and_damaged_answers(tmp_path, capsys):
    """Fields that came later may be absent; a damaged line is named."""
    record = {
        "model": "m",
        "task": "t",
        "mode": "abstract",
        "swap": "own",
        "trace": [0, 1],
        "response": "r",
        "score": 1.0,
    }
    lines = [json.dumps(record | {"id": str(i), "gold": "4"}) for i in range(3)]
    (tmp_path / "answers.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "x.parts").mkdir()
    (tmp_path / "x.parts" / "answers.jsonl").write_text("{")
    row = {
        "model": "m",
        "task": "MATH500",
        "mode": "abstract",
        "swap": "own",
        "n": 3,
        "accuracy": 100.0,
        "ci95": [44, 100],
    }
    row |= {"trace_tokens": 2.0, "answer_tokens": 1.0, "tokens": 3.0}
    (tmp_path / "results.json").write_text(json.dumps([row]))
    text = report(ReportArguments([str(tmp_path / "results.json")])).read_text()
    assert (
        "not tested: swaps random, other, none" in text
        and "NOT measured here" in text
        and "86.2" in text
        and "58.7" not in text
    )
    assert "2 of 2 or more" in text  # no checkpoint here: the codebook may be larger
    shutil.copytree(tmp_path, tmp_path / "b")
    text = report(ReportArguments([str(tmp_path), str(tmp_path / "b")], output_dir=str(tmp_path / "both"))).read_text()
    assert f"m ({tmp_path.name})" in text.replace("\\", "") and "m (b)" in text
    with pytest.raises(ValueError, match="stands twice"):
        report(ReportArguments([str(tmp_path), str(tmp_path)]))
    (args,) = parse_phase("report", ["a", "b", "--title", "T"])
    assert (args.runs, args.title) == (["a", "b"], "T") and parse_phase("report", ["--runs", "a"])[0].runs == ["a"]
    (tmp_path / "answers.jsonl").write_text(lines[0] + "\n" + lines[1].replace("[0, 1]", "[0, -1]") + "\n")
    with pytest.raises(ValueError, match="answers.jsonl line 2 is no answer"):
        report(ReportArguments([str(tmp_path)]))
    with pytest.raises(ValueError, match="stands twice"):
        report(ReportArguments([str(tmp_path), f"{tmp_path}/b/.."]))
    with pytest.raises(ValueError, match="named in two places"):
        parse_phase("report", ["a", "--runs", "b"])
    with pytest.raises(ValueError, match="chance must lie in"):
        ReportArguments([], chance=float("nan"))
    for wrong in ({"model": 5}, {"response": None}, {"score": "1"}, {"score": float("nan")}):
        (tmp_path / "answers.jsonl").write_text(json.dumps(record | {"id": "0", "gold": "4"} | wrong) + "\n")
        with pytest.raises(ValueError, match=f"answers.jsonl line 1 is no answer .*{next(iter(wrong))}"):
            report(ReportArguments([str(tmp_path)]))
    (tmp_path / "answers.jsonl").write_text("")
    with pytest.raises(ValueError, match="answers.jsonl is empty"):
        report(ReportArguments([str(tmp_path)]))
    for name, value in {"accuracy": "x", "ci95": None, "tokens": float("nan"), "decoding": 5, "mode": None}.items():
        (tmp_path / "results.json").write_text(json.dumps([row, row | {name: value}]))
        with pytest.raises(ValueError, match=f"results.json is no list of results .row 2: {name} missing or damaged"):
            report(ReportArguments([str(tmp_path)]))


def test_damaged_files_of_a_run_are_named(tmp_path):
    write_run(tmp_path / "run", 20, models=("informed",), rounds=(1,))
    warmup = next(path.parent for path in (tmp_path / "run").rglob("record.md"))
    summary = json.loads((warmup / "round1/distill-traces/summary.json").read_text())
    for read, name, text in [
        (read_losses, "losses.csv", "stage,step,loss\nround1/distill,1,zz\n"),
        (read_losses, "losses.csv", "stage,step,loss\nround1/distill,inf,1\n"),
        (read_losses, "losses.csv", "stage,step,loss\nround1/distill,1," + "9" * 200_000 + "\n"),
        (read_wall_times, "record.md", ""),
        (read_settings, "round1/distill/manifest.json", "{"),
        (read_settings, "round1/distill/manifest.json", '{"phase": [], "settings": {}}'),
        (read_settings, "round1/distill/manifest.json", '{"a":' * 100_000),
        (over_training, "round1/distill-traces/summary.json", "{}"),
        (over_training, "round1/distill-traces/summary.json", json.dumps(summary | {"token_counts": []})),
        (over_training, "round1/distill-traces/summary.json", json.dumps(summary | {"traces": "x"})),
    ]:
        before = (warmup / name).read_text()
        (warmup / name).write_text(text)
        with pytest.raises(Refused, match=f"{warmup / name} "):
            read(warmup)
        (warmup / name).write_text(before)
    assert report(ReportArguments([str(tmp_path / "run")])).is_file()


def small_run(folder, answer=None, row=None):
    """A run of one answer in abstract mode: its `answers.jsonl` line and its row of `results.json`, changed so."""
    folder.mkdir(exist_ok=True)
    record = {"model": "m", "task": "t", "mode": "abstract", "swap": "own", "trace": [0, 1], "response": "r"}
    record |= {"score": 1.0, "id": "0", "gold": "4"} | (answer or {})
    result = {"model": "m", "task": "t", "mode": "abstract", "swap": "own", "n": 3, "accuracy": 100.0}
    result |= {"ci95": [44, 100], "trace_tokens": 2.0, "answer_tokens": 1.0, "tokens": 3.0} | (row or {})
    (folder / "answers.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "results.json").write_text(json.dumps([result]))
    return ReportArguments([str(folder)])


@pytest.mark.parametrize(
    "answer",
    [
        {"trace": [10**9]},
        {"trace": [0] * 100_000},
        {"trace": {}},
        {"answer": float("inf")},
        {"answer": []},
        {"problem": 5},
        {"id": {}},
        {"gold": ["4"]},
        {"sample": []},
        {"sample": "0"},
        {"score": 10**400},
        {"score": 7},
        {"answer_tokens": float("nan")},
        {"trace_tokens": "x"},
        {"source": None},
    ],
)
def test_odd_answers_are_refused_in_one_line(tmp_path, answer):
    with pytest.raises(Refused, match=f"answers.jsonl line 1 is no answer .*{next(iter(answer))}") as caught:
        report(small_run(tmp_path, answer))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"model": "\xff"}', b"1", b"9" * 5000, b"\x00"])
def test_what_is_no_json_is_refused_in_one_line(tmp_path, line):
    arguments = small_run(tmp_path)
    (tmp_path / "answers.jsonl").write_bytes((tmp_path / "answers.jsonl").read_bytes() + line + b"\n")
    with pytest.raises(Refused, match="answers.jsonl line 2 is no answer"):
        report(arguments)
    arguments = small_run(tmp_path)
    (tmp_path / "results.json").write_bytes(b"[" + line + b"]")
    with pytest.raises(Refused, match="results.json is no list of results"):
        report(arguments)


@pytest.mark.parametrize(
    "row",
    [
        {"metric": []},
        {"mode": "aloud"},
        {"run": []},
        {"stage": {}},
        {"decoding": {"seed": []}},
        {"n": 10**400},
        {"accuracy": 1e12},
        {"tokens": 1e300},
        {"em_ci95": [1, 2]},
        {"difference_ci95": [1, 2]},
        {"ci95": ["a", 1]},
        {"samples": []},
        {"round": "1"},
        {"swapped": 5},
    ],
)
def test_odd_results_are_refused_in_one_line(tmp_path, row):
    name = next(iter(row)).removesuffix("_ci95") if "_ci95" in next(iter(row)) else next(iter(row))
    with pytest.raises(Refused, match=f"results.json is no list of results .row 1: {name} missing or damaged"):
        report(small_run(tmp_path, row=row))


def test_a_run_that_has_not_ended_goes_on_with_its_own_command(tmp_path):
    with pytest.raises(Refused, match="no results; run `abscot evaluate` first"):
        report(ReportArguments([str(tmp_path)]))
    (tmp_path / "splits.json").write_text("{}")  # what a warm-up writes first
    with pytest.raises(Refused, match="holds no results yet: it has not ended, and the same `abscot warmup`"):
        report(ReportArguments([str(tmp_path)]))


def test_a_codebook_that_the_answers_leave(tmp_path):
    arguments = small_run(tmp_path, {"trace": [0, 8]})
    VOCABULARY.save(tmp_path)
    with pytest.raises(Refused, match="answers.jsonl holds token 8, .*abstract_vocabulary.json has 8"):
        report(arguments)
    (tmp_path / "abstract_vocabulary.json").write_text('{"size": 1e9, "m_min": 0, "m_max": 3}')
    with pytest.raises(Refused, match="abstract_vocabulary.json is damaged"):
        report(arguments)


def test_no_text_of_a_result_is_markup(tmp_path):
    """Not in a name, a task, a table, a heading, a caption, nor in the words between them."""
    evil = "![x](http://e.example/x.png) http://e.example www.e.example a@e.example $x$ \ud800 *b* <b>"
    row = {"model": evil, "task": evil, "stage": evil, "decoding": {"backend": evil, "seed": evil}}
    arguments = small_run(tmp_path / "run", {"model": evil, "task": evil, "id": evil, "gold": evil}, row)
    rows = json.loads((tmp_path / "run" / "results.json").read_text())
    more = [{"swap": "random"}, {"mode": "verbal"}, {"model": "b"}, {"stage": "other"}]
    (tmp_path / "run" / "results.json").write_text(json.dumps(rows + [rows[0] | change for change in more]))
    text = report(ReportArguments(arguments.runs, str(tmp_path / "out"), evil), f"abscot `x` {evil}").read_text()
    tokens = [
        token
        for block in MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
        for token in [block, *(block.children or [])]
    ]
    images = [token.attrs["src"] for token in tokens if token.type == "image"]
    assert images and all(re.fullmatch(r"[a-z_]+\.png", image) for image in images)
    assert [token.attrs["href"] for token in tokens if token.type == "link_open"] == ["report.html"]
    assert not [token for token in tokens if token.type in ("html_inline", "html_block", "em_open")]
    plain = re.sub(r"`[^`]*`", "", text)
    assert not re.search(r"(?<!\\)[!$@]|https?://|www\.", re.sub(r"!\[[a-z ]+\]\([a-z_]+\.png\)", "", plain))


def test_only_a_report_is_replaced(tmp_path, monkeypatch):
    first, second = ({"a.png": b"png", "report.md": f"{n}".encode(), "report.html": b"<html>"} for n in (1, 2))
    for name in first:
        output = tmp_path / name.replace(".", "")
        output.mkdir()
        (output / name).write_text("mine")
        with pytest.raises(Refused, match=f"{output / name} is not as a report wrote it"):
            write_own(output, first)
        assert [path.name for path in output.iterdir()] == [name] and (output / name).read_text() == "mine"
    (output / "report.html").rename(output / "notes.md")
    write_own(output, first)
    monkeypatch.setattr(make, "write_whole", lambda path, content: path.name == "report.html" or write(path, content))
    write = write_whole
    write_own(output, second)  # as if killed before its last file
    monkeypatch.undo()
    write_own(output, second)
    assert (output / "report.md").read_text() == "2" and (output / "notes.md").read_text() == "mine"
    (output / "report.md").write_text("2 and my notes")
    with pytest.raises(Refused, match="report.md is not as a report wrote it"):
        write_own(output, first)
    assert (output / "report.md").read_text() == "2 and my notes"


def test_a_foreign_report_is_left_alone(tmp_path):
    arguments = small_run(tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.md").write_text("mine")
    with pytest.raises(Refused, match="report/report.md is not as a report wrote it; move it away, or choose another"):
        report(arguments)
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["report.md"]


def test_changed_is_the_tables_for_hotpotqa(tmp_path):
    """Answers that HotpotQA's rules call one are not changed, whatever the task is called."""
    record = {"model": "m", "task": "distractor", "mode": "abstract", "trace": [0], "response": "r", "score": 1.0}
    record |= {"gold": "Paris", "source": "hotpotqa"}
    said = {"0": ("The Paris.", "paris"), "1": ("Paris", "Lyon"), "2": ("paris", "a Paris")}
    records = [
        record | {"id": id, "swap": swap, "answer": answer}
        for id, pair in said.items()
        for swap, answer in zip(("own", "random"), pair, strict=True)
    ]
    own, other = ([r for r in records if r["swap"] == swap] for swap in ("own", "random"))
    tokens = {"trace_tokens": 1, "answer_tokens": 1, "truncated": False, "swapped": True, "sample": 0}
    own, other = ([r | tokens for r in some] for some in (own, other))
    row = summarise(other, own, 1, "hotpotqa", {"seed": 0})
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in own + other))
    shown = browser([(tmp_path, group.label, group) for group in read_answers(tmp_path)])
    changed = [entry[3]["random"].get("c", 0) for entry in shown["entries"]]
    assert changed == [0, 1, 0] and row["changed"] == pytest.approx(np.mean(changed))
