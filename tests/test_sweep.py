"""Evaluations that are killed, and all models of a run in one sweep: no answer is made twice."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from warmups import LORA, Killed, recipes, toy_fields

from abscot_trl.data.toy import chain_arithmetic, write_problems
from abscot_trl.errors import Refused
from abscot_trl.evaluation import answering
from abscot_trl.evaluation.arguments import EvaluateArguments
from abscot_trl.evaluation.evaluate import evaluate
from abscot_trl.loop import driver, launch
from abscot_trl.loop import sweep as module
from abscot_trl.loop.sweep import SweepArguments, sweep
from abscot_trl.loop.warmup import WarmupArguments, warmup
from abscot_trl.phases import run_phase
from abscot_trl.report.tables import label
from abscot_trl.report.verdict import comparisons
from abscot_trl.storage import MANIFEST, Parts

# Forks an evaluation, kills it by SIGKILL after three more finished parts, four times, then lets it end. Each answer
# that is graded and each part that is finished is noted in a file that a kill leaves whole.
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from abscot_trl.evaluation import answering
from abscot_trl.evaluation.arguments import EvaluateArguments
from abscot_trl.evaluation.evaluate import evaluate
from abscot_trl.storage import Parts

arguments = EvaluateArguments(**json.loads(sys.argv[1]))
log = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
record, write = answering.Answerer._record, Parts.write
finished = lambda: Path(sys.argv[2]).read_text().count('["part"')  # noted: the file is there a moment before

def note(*what):
    os.write(log, (json.dumps(what) + "\\n").encode())

def noting(self, mode, swap, row, *args, **kwargs):
    note("graded", mode, swap, *row)
    return record(self, mode, swap, row, *args, **kwargs)

def writing(self, number, records):
    write(self, number, records)
    note("part", *[[r["mode"], r["swap"], int(r["id"]), r["sample"]] for r in records])

answering.Answerer._record, Parts.write = noting, writing
for attempt in range(5):
    seen, child = finished(), os.fork()
    if child == 0:
        torch.set_num_threads(1)
        evaluate(arguments)
        os._exit(0)
    while attempt < 4 and finished() < seen + 3:
        time.sleep(0.002)
    if attempt < 4:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (-signal.SIGKILL if attempt < 4 else 0), code
    assert Path(arguments.output_dir).exists() == (attempt == 4)
"""


@pytest.fixture
def arguments(checkpoint, tmp_path):
    rows = [replace(row, id=str(i)) for i, row in enumerate(chain_arithmetic(40, 4, 5, seed=0))]
    fields = {"model": str(checkpoint), "problems": write_problems(tmp_path / "problems.jsonl", rows)}
    fields |= {"instruction": False, "max_new_tokens": 12, "dtype": "float32", "output_dir": str(tmp_path / "out")}
    fields |= {"modes": ["verbal", "abstract"], "swaps": ["own", "shuffled", "other"], "part_answers": 20}
    fields |= {"samples": 2, "temperature": 0.8, "trace_temperature": 0.9, "top_p": 0.9, "seed": 3}
    return EvaluateArguments(**fields)


@pytest.mark.slow
def test_killed_over_and_over(arguments, tmp_path):
    """SIGKILL four times: finished parts are never made again, and the files are those of an undisturbed run."""
    evaluate(replace(arguments, output_dir=str(tmp_path / "whole")))
    command = [sys.executable, "-c", SCRIPT, json.dumps(asdict(arguments)), tmp_path / "log"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("answers.jsonl", "results.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not Path(arguments.output_dir + ".parts").exists()
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    finished: set[tuple] = set()
    for kind, *what in events:
        if kind == "graded":
            assert tuple(what) not in finished  # never again
        else:
            assert not finished & {tuple(key) for key in what}
            finished |= {tuple(key) for key in what}
    modes = {"verbal": ["own", "shuffled"], "abstract": ["own", "shuffled", "other"]}
    assert finished == {(m, s, i, k) for m, swaps in modes.items() for s in swaps for i in range(40) for k in (0, 1)}
    graded = Counter(tuple(what) for kind, *what in events if kind == "graded")
    assert sum(graded.values()) - len(finished) <= 4 * 20  # a kill costs the part at work


def test_an_evaluation_begun_with_other_settings_is_refused(arguments, monkeypatch):
    write, done = Parts.write, []

    def stopping(self, number, records):
        write(self, number, records)
        done.append(number)
        if len(done) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Parts, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate(arguments)
    for field, value, words in [("seed", 4, "seed: 3 -> 4"), ("top_p", 1.0, "top_p: 0.9 -> 1.0"), ("samples", 3, "")]:
        with pytest.raises(ValueError, match=rf"begun with other settings \(.*{words}"):
            evaluate(replace(arguments, **{field: value}))
    first = json.loads(Path(arguments.problems).read_text().splitlines()[0])
    with open(arguments.problems, "a") as file:
        file.write(json.dumps(first | {"id": "one more"}) + "\n")
    with pytest.raises(ValueError, match=r"begun with other settings \(inputs"):
        evaluate(arguments)
    assert done == [0, 1, 2]


@pytest.fixture(scope="module")
def warmed(checkpoint, tmp_path_factory):
    """A folder with the run of a warm-up of two rounds, of which each keeps its last model."""
    folder = tmp_path_factory.mktemp("warmed")
    fields = toy_fields(checkpoint, folder) | recipes(folder, "", LORA) | {"keep": "rounds", "evaluate": None}
    warmup(WarmupArguments(**fields))
    return folder


@pytest.fixture
def run(warmed, tmp_path):
    shutil.copytree(warmed / "run", tmp_path / "run")
    recipe = {"problems": str(warmed / "test.jsonl"), "instruction": False, "max_new_tokens": 6, "part_answers": 8}
    recipe |= {"swaps": ["own", "random"], "modes": ["abstract"], "task": "chain", "dtype": "float32"}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(recipe))
    return SweepArguments(str(tmp_path / "run"), str(tmp_path / "sweep.yaml"), launch="inline")


@pytest.mark.slow
def test_sweep(run, monkeypatch, capsys):
    """Base and the models that are left, in order; broken off at every kind of moment, each answer is made once."""
    graded, record = [], answering.Answerer._record
    moments = iter([23, 70, None])
    budget = [next(moments)]

    def noting(self, mode, swap, row, *args, **kwargs):
        if budget[0] is not None and len(graded) >= budget[0]:
            raise Killed
        graded.append((self.args.model, swap, row))
        return record(self, mode, swap, row, *args, **kwargs)

    write = driver.write_whole

    def before_its_manifest(path, text):
        if Path(path).name == MANIFEST and Path(path).parent.name == "base" and manifests:
            manifests.clear()
            raise Killed
        write(path, text)

    manifests = [1]
    monkeypatch.setattr(answering.Answerer, "_record", noting)
    monkeypatch.setattr(driver, "write_whole", before_its_manifest)
    attempts = 0
    while True:
        attempts += 1
        try:
            results = sweep(run)
            break
        except Killed:
            if len(graded) >= (budget[0] or 10**9):
                budget[0] = next(moments)
    assert attempts == 4
    folder = Path(run.run)
    (folder / "round1-old").mkdir()  # somebody's, and no round
    assert "round1/bottleneck is left out: the weights of" in capsys.readouterr().out
    names = ["base", "round1/distill", "round2/distill"]
    assert [(r["stage"], r["round"], r["swap"], r["model"]) for r in results] == [
        (name, t, swap, "base" if t == 0 else "run") for t, name in enumerate(names) for swap in ("own", "random")
    ]
    assert json.loads((folder / "sweep" / "results.json").read_text()) == results
    # An answer of a part that was not finished is made again, nothing else: one part (8) at most an interruption.
    finished = Counter(graded)
    assert len(finished) == 3 * 2 * 20 and sum(finished.values()) <= len(finished) + 2 * 8
    assert {model for model, _, _ in finished} == {
        json.loads((folder / "round1" / "bottleneck" / MANIFEST).read_text())["settings"]["model_name_or_path"],
        *(str(folder / f"round{t}" / "distill-merged") for t in (1, 2)),
    }
    before = len(graded)
    assert sweep(run) == results and len(graded) == before
    for stage in ("base", "round1-distill", "round2-distill"):
        answers = (folder / "sweep" / stage / "answers.jsonl").read_text().splitlines()
        keys = [(a["swap"], a["id"]) for a in map(json.loads, answers)]
        assert len(keys) == len(set(keys)) == 40
    assert not list((folder / "sweep").glob("*.parts"))
    Path(run.evaluate).write_text(Path(run.evaluate).read_text().replace("max_new_tokens: 6", "max_new_tokens: 7"))
    with pytest.raises(ValueError, match="made with other settings .max_new_tokens: 6 -> 7"):
        sweep(run)


@pytest.mark.slow
def test_a_grid_of_seeds_and_temperatures(run, monkeypatch, capsys):
    """One row each in one results.json, told apart by `stage`; killed, it goes on; a second grid adds its rows."""
    record, graded, calls = answering.Answerer._record, [], []

    def noting(self, mode, swap, row, *args, **kwargs):
        calls.append(row)
        if len(calls) == 100:
            raise Killed
        graded.append((self.args.output_dir, swap, row))
        return record(self, mode, swap, row, *args, **kwargs)

    monkeypatch.setattr(answering.Answerer, "_record", noting)
    grid = replace(run, stages=["round2/distill"], seeds=[3, 4], trace_temperatures=[0, 0.7])
    with pytest.raises(Killed):
        sweep(grid)
    rows = sweep(grid)
    assert len(set(graded)) == 4 * 2 * 20 and len(graded) <= len(set(graded)) + 8  # the part that was at work
    assert [row["stage"] for row in rows if row["swap"] == "own"] == [
        f"round2/distill seed {seed} trace temperature {t}" for seed in (3, 4) for t in ("0", "0.7")
    ]
    settings = {(row["decoding"]["seed"], row["decoding"]["trace_temperature"], row["swap"]) for row in rows}
    assert settings == {(s, t, swap) for s in (3, 4) for t in (0.0, 0.7) for swap in ("own", "random")}
    assert {(row["round"], row["model"], row["n"]) for row in rows} == {(2, "run", 20)}
    folder = Path(run.run) / "sweep"
    assert len({label(row) for row in rows}) == 4 and len(comparisons(rows)) == 4  # a report tells them apart
    more = sweep(replace(run, stages=["base"], seeds=[3]))
    assert [row["stage"] for row in more if row["swap"] == "own"][0] == "base seed 3" and more[0]["round"] == 0
    assert more[2:] == rows and json.loads((folder / "results.json").read_text()) == more


def test_a_grid_that_makes_no_sense_is_refused_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "models", lambda run: [("base", run / "base"), ("round1/distill", run / "m")])
    recipe = tmp_path / "evaluate.yaml"
    recipe.write_text("problems: p\nsamples: 4\n")
    fields = {"run": str(tmp_path), "evaluate": str(recipe), "launch": "inline"}
    for wrong, words in (
        ({"seeds": []}, "seeds must name at least one"),
        ({"seeds": [1, 2, 1]}, "seeds: 1 stands twice"),
        ({"trace_temperatures": [0.5, 0.5]}, "trace_temperatures: 0.5 stands twice"),
        ({"stages": ["round9/distill"]}, "no model 'round9/distill'; the run has base, round1/distill"),
        (
            {"trace_temperatures": [0.7, 0]},
            "evaluate.yaml, base trace temperature 0: samples: 4 answers at temperature 0",
        ),
        ({"seeds": [-1]}, "evaluate.yaml, base seed -1: seed must be at least 0"),
    ):
        with pytest.raises(Refused, match=words):
            sweep(SweepArguments(**fields, **wrong))
    recipe.write_text("problems: p\n")
    large = [10**13 + 1, 10**13 + 2]
    near = module.sweep_stages(SweepArguments(**fields, stages=["base"], seeds=large, temperatures=[1.0]))
    names = [f"base-seed-1000000000000{k}-temperature-1" for k in (1, 2)]  # were one and the same
    assert [stage.output.name for stage in near] == names
    recipe.write_text("task: x\n")
    with pytest.raises(Refused, match="evaluate.yaml: names no problems"):
        sweep(SweepArguments(**fields))
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("adapter", [True, False])
def test_what_grpo_left_is_swept_too(tmp_path, adapter):
    """After a warm-up with `grpo`, by the name that its own evaluation has; not before it is merged."""
    settings = {"model_name_or_path": "init"}
    folders = ["round1/bottleneck", "round1/distill", "grpo/train"]
    for name in folders + ["grpo/train-merged"] * adapter:
        (tmp_path / "run" / name).mkdir(parents=True)
        manifest = {"stage": name, "phase": "x", "settings": settings, "inputs": {}, "wall_s": 1.0, "attempts": 1}
        (tmp_path / "run" / name / MANIFEST).write_text(json.dumps(manifest))
    if adapter:
        (tmp_path / "run" / "grpo" / "train" / "adapter_config.json").write_text("{}")
    (tmp_path / "evaluate.yaml").write_text("problems: p\n")
    arguments = SweepArguments(str(tmp_path / "run"), str(tmp_path / "evaluate.yaml"), name="paper")
    last = module.sweep_stages(replace(arguments, seeds=[1, 2]))[-2:]
    assert [stage.name for stage in last] == ["grpo/train seed 1", "grpo/train seed 2"]
    assert {stage.settings["name"] for stage in last} == {"paper-grpo"}
    trained = tmp_path / "run" / "grpo" / ("train-merged" if adapter else "train")
    assert {stage.settings["model"] for stage in last} == {str(trained)}
    (trained / MANIFEST).unlink()
    assert [name for name, _ in module.models(tmp_path / "run")] == ["base", "round1/bottleneck", "round1/distill"]


@pytest.mark.slow
def test_each_evaluation_has_a_process_of_its_own(run, monkeypatch, tmp_path):
    """`launch: process`; here the processes are stood in for by the phase in this one (they take seconds to start)."""
    commands = []

    def run_here(command):
        commands.append(command)
        run_phase("evaluate", command[3:])
        return 0

    monkeypatch.setattr(launch, "run", run_here)
    rows = sweep(replace(run, launch="process"))
    assert [command[:3] for command in commands] == 3 * [[sys.executable, "-m", "abscot_trl.scripts.evaluate"]]
    assert [(row["stage"], row["n"]) for row in rows] == [
        (stage, 20) for stage in ("base", "round1/distill", "round2/distill") for _ in range(2)
    ]


def test_a_folder_without_models_is_refused(tmp_path):
    (tmp_path / "evaluate.yaml").write_text("task: x\n")
    with pytest.raises(Refused, match="no model of a warm-up is done there"):
        sweep(SweepArguments(str(tmp_path), str(tmp_path / "evaluate.yaml")))
    (tmp_path / "evaluate.yaml").write_text("tsk: x\n")
    with pytest.raises(ValueError, match="unknown key 'tsk'; did you mean 'task'"):
        sweep(SweepArguments(str(tmp_path), str(tmp_path / "evaluate.yaml")))


def test_one_server_cannot_serve_all_models(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "models", lambda run: [("base", run / "base"), ("round1/distill", run / "m")])
    (tmp_path / "evaluate.yaml").write_text("problems: p\nbackend: server\nserver: http://127.0.0.1:1\n")
    arguments = SweepArguments(str(tmp_path), str(tmp_path / "evaluate.yaml"))
    with pytest.raises(Refused, match="backend: server asks one URL, which serves one model"):
        sweep(arguments)
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "results.json").write_text("mine")
    (tmp_path / "evaluate.yaml").write_text("problems: p\n")
    with pytest.raises(Refused, match="results.json is there but was not made by a sweep"):
        sweep(arguments)
    assert (tmp_path / "sweep" / "results.json").read_text() == "mine"
