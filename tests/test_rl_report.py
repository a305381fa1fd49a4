"""What is shown of GRPO: a report of its log, in Markdown, figures and Chromium, and its rows of losses.csv."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
from grpo_runs import run
from test_report import EVIL, opened, write_run

from abscot_trl.errors import Refused
from abscot_trl.loop.record import write_record
from abscot_trl.loop.stages import Stage
from abscot_trl.report import rl
from abscot_trl.report.make import ReportArguments, report
from abscot_trl.report.runs import read_losses, read_settings, reinforced
from abscot_trl.storage import write_whole
from abscot_trl.training.resume import LOG_FILE, SEAL

PARTS = ["rollout", "rewards", "scoring", "update", "other"]


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):
    """The folder of a real `abscot grpo` of 12 steps: every second is logged, and a probe after every third."""
    folder = tmp_path_factory.mktemp("grpo")
    fields = {"max_steps": 12, "logging_steps": 2, "probe_steps": 3, "save_strategy": "no", "learning_rate": 1e-2}
    run(checkpoint, folder, folder / "alone", **fields)
    return folder / "alone"


@pytest.fixture
def alone(trained, tmp_path):
    """Its log alone, to be changed."""
    (tmp_path / "alone").mkdir()
    shutil.copy(trained / LOG_FILE, tmp_path / "alone")
    return tmp_path / "alone"


def change(folder, edit, log_file=LOG_FILE) -> list[dict]:
    """Let `edit` change each entry of the log."""
    content = json.loads((folder / log_file).read_text())
    for entry in content["log"]:
        edit(entry)
    (folder / log_file).write_text(json.dumps(content))
    return content["log"]


def rows_of(text: str) -> dict[str, list[str]]:
    """The lines of a Markdown page's tables by their first cell."""
    lines = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_a_folder_of_grpo_alone(alone, capsys):
    log = json.loads((alone / LOG_FILE).read_text())["log"]
    text = report(ReportArguments([str(alone)])).read_text()
    shown, steps = rows_of(text), [entry for entry in log if "loss" in entry]
    names = {"reward: total": "reward", "reward: trace\\_length": "rewards/trace_length/mean"}
    names |= {"KL to the warm start, nats a token": "kl", "tokens of an answer": "answer/length"}
    names |= {"codebook tokens in a trace": "trace/length", "seconds a step: update": "time/update"}
    names |= {"shares: groups without variance": "frac_reward_zero_std"}
    for name, key in names.items():
        first, last = map(float, shown[name.replace("\\_", "_")])
        assert first == pytest.approx(steps[0][key], rel=6e-3) and last == pytest.approx(steps[-1][key], rel=6e-3)
    probes = [entry for entry in log if "probe/own" in entry]
    assert len(probes) == 5 and float(shown["held-out accuracy, greedy: own trace"][1]) == probes[-1]["probe/own"]
    assert shown["codebook tokens in use"][1] == f"{np.count_nonzero(steps[-1]['codebook_counts'])} of 8"
    said = "alone: 12 steps, reward from "
    assert said in text and "accuracy on 4 held-out prompts from " in text and said in capsys.readouterr().out
    assert {"grpo_learning.png", "grpo_traces.png"} <= {path.name for path in (alone / "report").iterdir()}
    assert report(ReportArguments([str(alone)])).read_text() == text


@pytest.mark.parametrize(
    "changed, heart",
    [({}, True), ({"own": 75.0}, False), ({"passes": 1.0}, False), ({"after": 0.72}, False), ({"before": 0.87}, False)]
    + [({"held_out": 10}, False), ({"held_out": 0}, False)],
)
def test_it_says_when_prompts_are_learnt_by_heart(changed, heart):
    """As SmolLM2 on H100s; not if others gain, nothing is repeated, little is won, nothing rises, few are held out."""
    its = {"passes": 16.7, "before": 0.58, "after": 0.87, "own": 65.8, "held_out": 512} | changed
    log = [{"step": 0, "probe/own": 69.7, "probe/random": 1.0, "epoch": 0}]
    for step in range(1, 21):
        reward = its["before"] if step < 10 else its["after"]
        log.append({"step": step, "rewards/accuracy/mean": reward, "epoch": its["passes"]})
    log.append({"step": 20, "probe/own": its["own"], "probe/random": 0.6, "epoch": its["passes"]})
    words = "In 16.7 passes over its prompts sampled answers to them came from 58.0 to 87.0 % right"
    said = rl.says("it", log, its["held_out"])
    assert (words in said) == ("by heart" in said) == heart


def test_a_run_at_work_is_shown_up_to_its_last_checkpoint(alone, tmp_path):
    """As a phase leaves it when it is killed after step 6, beside a checkpoint that is not whole."""
    log = json.loads((alone / LOG_FILE).read_text())["log"]
    before = [entry for entry in log if entry["step"] <= 6]
    for step, entries in ((4, before[:2]), (6, before), (8, log)):
        folder = tmp_path / "working" / "grpo" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
        if step < 8:
            write_whole(folder / SEAL, json.dumps({"step": step, "of": 12}))
    text = report(ReportArguments([str(tmp_path / "working")])).read_text()
    assert "grpo, at work (step 6 of 12): 6 steps, reward from " in text
    steps = [entry for entry in before if "loss" in entry]
    first, last = map(float, rows_of(text)["reward: total"])
    assert first == pytest.approx(steps[0]["reward"], rel=6e-3) and last == pytest.approx(
        steps[-1]["reward"], rel=6e-3
    )
    shutil.copy(alone / LOG_FILE, tmp_path / "working" / "grpo")  # and once it has ended, all of it
    assert [len(log) for log, _ in reinforced(tmp_path / "working").values()] == [len(reinforced(alone)[""][0])]


def test_every_series_is_drawn_as_logged(alone):
    ((log, held_out),) = reinforced(alone).values()
    learning, traces = (rl.over_steps(log, name, held_out) for name in ("learning", "traces"))
    lines = [line for figure in (learning, traces) for axes in figure.axes for line in axes.lines]
    drawn = [(tuple(line.get_xdata()), tuple(line.get_ydata())) for line in lines]
    keys = ["reward", "rewards/accuracy/mean", "rewards/trace_length/mean", "probe/own", "probe/random", "kl"]
    keys += ["frac_reward_zero_std", "trace/length", "trace/entropy", "trace/forced_end", "answer/length"]
    for key in keys:
        steps = [entry["step"] for entry in log if key in entry]
        assert (tuple(steps), tuple(entry[key] for entry in log if key in entry)) in drawn, key
    first, last = ([entry for entry in log if "loss" in entry][i]["codebook_counts"] for i in (0, -1))
    for counts in (first, last):
        shares = sorted((count / sum(counts) for count in counts if count), reverse=True)
        assert any(y == pytest.approx(shares) for _, y in drawn if len(y) == len(shares))
    (areas,) = (axes.collections for axes in learning.axes if axes.get_title("left") == "seconds a step")
    assert len(areas) == len(PARTS)
    titles = {axes.get_title("left") for figure in (learning, traces) for axes in figure.axes}
    assert len(titles) == 9 and "ratio of trainer to sampler" not in titles  # no vLLM, no ratio


def test_nothing_is_shown_of_what_was_not_logged(alone):
    """Of a run with vLLM and beta 0 and without a probe, by an older version: no KL, no seconds, no rollouts."""

    def older(entry):
        for key in [key for key in entry if re.match("kl$|probe/|time/|rollouts|codebook_counts", key)]:
            del entry[key]
        if "loss" in entry:
            entry |= {"ratio/mean": 1.01, "ratio/outside": 0.25, "trace/entropy": float("nan"), "answer/length": None}

    change(alone, older)
    text = report(ReportArguments([str(alone)])).read_text()
    shown = rows_of(text)
    assert shown["ratio of trainer to sampler: mean"] == ["1.01", "1.01"]
    assert not [
        name for name in shown if re.match("KL|held-out|seconds|entropy|tokens of|codebook tokens in use", name)
    ]
    assert "held-out" not in text.split("Reward and its parts")[0] and "Rollouts" not in text
    page = opened(alone / "report" / "report.html")
    assert len(page.all("img")) == 2 and not page.all("div", "rollout")


def test_one_logged_step_is_enough(alone):
    content = json.loads((alone / LOG_FILE).read_text())
    content["log"] = [entry for entry in content["log"] if "loss" in entry][:1]
    (alone / LOG_FILE).write_text(json.dumps(content))
    assert "reward: total" in rows_of(report(ReportArguments([str(alone)])).read_text())


def test_probes_at_either_end_have_their_bars(alone):
    """Wilson's ends meet 0 and 100 but for rounding, and a bar of less than nothing is an error."""
    ((log, _),) = reinforced(alone).values()
    for value in (0.0, 100.0):
        probes = [entry | {"probe/own": value} for entry in log if "probe/own" in entry]
        assert all(rl.over_steps(probes, "learning", held_out) for held_out in (1, 3, 7, 10, 64, 255))


def test_hostile_rollouts_are_text(alone):
    """Markup in prompts, traces, answers and a reward's name: shown, and nothing else."""
    evil = EVIL.replace("\n", " ")

    def attack(entry):
        for key in [key for key in entry if key.startswith("rewards/")]:
            entry[key.replace("accuracy", evil)] = entry.pop(key)
        for i, rollout in enumerate(entry.get("rollouts", [])):
            rollout |= {"prompt": evil + "p", "answer": evil + "a", "rewards": {evil: 1.0, "judge": None}}
            rollout["trace"] = [rollout["trace"], evil, "<TOKEN_ZZ>", ""][i]

    change(alone, attack)
    path = report(ReportArguments([str(alone)]))
    assert "<script" not in path.read_text().replace("\\<", "")
    page = opened(alone / "report" / "report.html", wait=True)
    assert page.title == "Results" and [tag for tag, _ in page.elements].count("script") == 2
    assert not [name for _, a in page.elements for name in a if name.startswith("on") or name == "href"]
    assert all(a["src"].startswith("data:") for a in page.all("img"))
    shown = re.sub(r"\s+", " ", page.text)
    for text in (evil + "p", evil + "a", f"{evil} 1 · judge none", "<TOKEN_ZZ>", "no trace"):
        assert re.sub(r"\s+", " ", text) in shown
    assert len(page.all("div", "rollout")) == rl.SHOWN and page.all("span", "token")


def test_rollouts_are_readable(alone):
    """The first and the last logged step's, with trace, answer and every reward."""
    log = [entry for entry in json.loads((alone / LOG_FILE).read_text())["log"] if "loss" in entry]
    report(ReportArguments([str(alone)]))
    page = opened(alone / "report" / "report.html")
    assert "alone: rollouts of step 2" in page.text and "alone: rollouts of step 12" in page.text
    chips = [a["title"] for a in page.all("span", "token")]
    first, last = (re.findall("<TOKEN_.>", log[i]["rollouts"][0]["trace"]) for i in (0, -1))
    assert chips[: len(first)] == first
    for entry in (log[0], log[-1]):
        for rollout in entry["rollouts"]:
            assert rollout["answer"] in page.text and rollout["prompt"] in page.text
            assert f"accuracy {rollout['rewards']['accuracy']:.3g} · trace_length" in page.text


def test_beside_a_warmup(trained, tmp_path):
    """In the run's own report and in one of two runs; its settings too, and its learning rate is no loss."""
    write_run(tmp_path / "run", 40, models=("informed",), rounds=(1,))
    folder = tmp_path / "run" / "informed"
    train = folder / "grpo" / "train"
    train.mkdir(parents=True)
    shutil.copy(trained / LOG_FILE, train)
    manifest = {"stage": "grpo/train", "phase": "grpo", "settings": {"beta": 0.04}, "wall_s": 1.0, "attempts": 1}
    write_whole(train / "manifest.json", json.dumps(manifest))
    both = ReportArguments([str(tmp_path / "run"), str(trained)], output_dir=str(tmp_path / "both"))
    text = report(ReportArguments([str(tmp_path / "run")])).read_text()
    assert "informed/grpo/train: 12 steps" in text and "## Results" in text and "grpo_traces.png" in text
    assert "beta 0.04" in text and read_settings(folder)["grpo"] == {"beta": 0.04}
    text = report(both).read_text()
    assert "informed/grpo/train (run): 12 steps" in text and "\nalone: " not in text and " alone: 12 steps" in text
    assert {"grpo_traces.png", "grpo_traces_2.png"} <= {path.name for path in (tmp_path / "both").iterdir()}
    hidden = folder / "grpo" / ".final"
    hidden.mkdir()
    (hidden / LOG_FILE).write_text("half")
    assert [*reinforced(folder)] == ["grpo/train"]


def test_losses_of_every_logged_step(trained, tmp_path):
    """One row a logged step, a probe's with it; a run without GRPO has the columns of before."""
    (tmp_path / "grpo").mkdir()
    shutil.copytree(trained, tmp_path / "grpo" / "train", ignore=shutil.ignore_patterns("*.safetensors", "report"))
    stage = Stage("grpo/train", "grpo", {"output_dir": str(tmp_path / "grpo" / "train")})
    (stage.output / "manifest.json").write_text(json.dumps({"wall_s": 1.0, "attempts": 1}))
    write_record(tmp_path, [stage])
    log = json.loads((trained / LOG_FILE).read_text())["log"]
    with open(tmp_path / "losses.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "2", "3", "4", "6", "8", "9", "10", "12"]
    keys = ["reward", "rewards/accuracy/mean", "rewards/trace_length/mean", "kl", "frac_reward_zero_std", "loss"]
    keys += [
        "trace/length",
        "trace/entropy",
        "answer/length",
        "probe/own",
        "probe/random",
        *(f"time/{p}" for p in PARTS),
    ]
    for key in keys:
        logged = {str(entry["step"]): entry[key] for entry in log if key in entry}
        assert {row["step"]: float(row[key]) for row in rows if row[key]} == logged, key
    assert read_losses(tmp_path)["grpo/train"][1]["reward"] == log[1]["reward"]
    assert (
        not (tmp_path / "losses.png").exists() and "| grpo/train | 20 | 12 |" in (tmp_path / "record.md").read_text()
    )
    (tmp_path / "losses.csv").write_text("stage,step,learning_rate,loss\ngrpo/train,1,0.1,2.0\n")  # of an older run
    assert read_losses(tmp_path) == {"grpo/train": [{"step": 1.0, "learning_rate": 0.1, "loss": 2.0}]}


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"step": "x"}, "no steps"),
        ({"codebook_counts": 5}, "step 2: codebook_counts: no list"),
        ({"codebook_counts": [1, -1]}, "step 2: codebook_counts: no counts"),
        ({"codebook_counts": [1, 2]}, "codebook_counts: of two codebooks"),
        ({"rollouts": [5]}, "step 2: rollouts: no texts"),
        ({"rollouts": [{"prompt": "p", "trace": "", "answer": 5, "rewards": {}}]}, "step 2: rollouts: no texts"),
        ({"rollouts": [{"prompt": "p", "trace": "", "answer": "a", "rewards": []}]}, "step 2: rollouts: no texts"),
    ],
)
def test_a_damaged_log_is_named(alone, wrong, words):
    change(alone, lambda entry: entry.update(wrong) if entry["step"] == 2 else None)
    with pytest.raises(Refused, match=f"{LOG_FILE} is damaged .*{words}"):
        report(ReportArguments([str(alone)]))
