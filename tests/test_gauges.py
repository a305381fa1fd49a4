"""The two gauges: as computed by hand, on rows that are not trained; what carries is told from what does not."""

import csv
import io
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch._dynamo.testing import CompileCounter
from trainers import LAST, lora, rows, run, settings, token_ids, weights
from transformers import AutoModelForCausalLM
from warmups import recipes

from abscot_trl.errors import Refused
from abscot_trl.loop import warmup as warmup_module
from abscot_trl.loop.record import COLUMNS
from abscot_trl.loop.stages import Stage
from abscot_trl.loop.warmup import WarmupArguments, judge, warmup
from abscot_trl.report.gauges import level, says
from abscot_trl.report.runs import read_losses
from abscot_trl.report.sections import gauges_section
from abscot_trl.training import steps
from abscot_trl.training.bottleneck import BottleneckSFTTrainer
from abscot_trl.training.configs import BottleneckConfig
from abscot_trl.training.distillation import SelfDistillationTrainer
from abscot_trl.training.gauges import is_due, swapped
from abscot_trl.training.resume import sealed_checkpoints

PROBES = [0, 50, 100, 150]
HELD = {"gauge_rows": len(PROBES), "max_steps": 1}
FIXED = HELD | {"learning_rate": 0.0}  # what is read is the checkpoint
BLIND = [f"useful_{swap}" for swap in ("own", "random", "other", "none")]


@pytest.fixture(scope="module")
def data(checkpoint):
    return rows(checkpoint, 200)


def reading(trainer) -> dict[str, float]:
    return [entry for entry in trainer.state.log_history if "useful_own" in entry][-1]


def logps(model, x, c, z, y) -> torch.Tensor:
    """log pi of every token from every position of [x; c; z~; y], the mask written out with loops; (L, vocabulary)."""
    ids, n_c, n_y = x + c + z + y, len(x), len(x) + len(c) + len(z)
    mask = torch.full((1, 1, len(ids), len(ids)), torch.finfo(torch.float32).min)
    for q in range(len(ids)):
        for k in range(q + 1):
            if not (q >= n_y and n_c <= k < n_c + len(c)):
                mask[0, 0, q, k] = 0.0
    with torch.no_grad():
        logits = model(torch.tensor([ids]), attention_mask={"full_attention": mask}).logits[0]
    return torch.log_softmax(logits, dim=-1)


def by_hand(model, checkpoint, data) -> dict[str, float]:
    """The gauges by plain transformers, row by row."""
    *codebook, begin, end = token_ids(checkpoint)
    traces, found = [data[i]["trace"] for i in PROBES], {}
    for name in (*BLIND, "useful_own_given_cot", "useful_random_given_cot"):
        swap, losses = name.split("_")[1], []
        for n, i in enumerate(PROBES):
            others = {"own": traces[n], "other": traces[(n + 1) % len(traces)], "none": []}
            trace = others[swap] if swap in others else swapped(traces, "random", 8)[n]
            z = [begin, *(codebook[index] for index in trace), end]
            x, c, y = (data[i][f"{part}_ids"] for part in ("prompt", "cot", "answer"))
            said = logps(model, x, c if "given_cot" in name else [], z, y)[-len(y) - 1 : -1]
            losses.append(-said[range(len(y)), y].mean().item())
        found[name] = losses
    written = []
    for i in PROBES:
        x, y, z = data[i]["prompt_ids"], data[i]["answer_ids"], [codebook[index] for index in data[i]["trace"]]
        said = logps(model, x, [], [begin, *z, end], y).exp()[len(x) : len(x) + len(z) + 1]
        allowed = said[:, [*codebook, end]].sum(1)
        written.append(np.mean([-math.log(p[t] / a) for p, a, t in zip(said, allowed, [*z, end], strict=True)]))
    figures = {name: np.mean(losses) for name, losses in found.items()} | {"predictable": np.mean(written)}
    for name in (name for name in found if "own" not in name):
        own = found["useful_own_given_cot" if "given_cot" in name else "useful_own"]
        figures[f"{name}_se"] = np.std(np.subtract(found[name], own), ddof=1) / len(own) ** 0.5
    return figures


WAYS = {
    "alone": {},
    "packed": {"packing": True, "max_length": 300, "gradient_checkpointing": True},
    "lora": {"peft": True},
    "lora, packed": {"peft": True, "packing": True, "max_length": 300},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_gauges_are_those_by_hand(checkpoint, tmp_path, data, way):
    given = dict(WAYS[way])
    peft_config = lora(checkpoint) if given.pop("peft", False) else None
    trainer = run(checkpoint, tmp_path, data=data, peft_config=peft_config, **FIXED | given)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    found, expected = reading(trainer), by_hand(model, checkpoint, data)
    assert {name for name in found if name.startswith(("useful", "predictable"))} == {*expected, "predictable_uniform"}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert found["predictable_uniform"] == pytest.approx(math.log(9))
    assert len({round(found[name], 3) for name in BLIND}) == 4  # no two of them are the same row


def test_phase_b_reads_the_blind_row_alone(checkpoint, tmp_path, data):
    trainer = run(checkpoint, tmp_path, SelfDistillationTrainer, data=data, rehearsal=1.0, **FIXED)
    expected = by_hand(AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager"), checkpoint, data)
    found = reading(trainer)
    assert not any("given_cot" in name for name in found if name.startswith("useful"))
    assert all(found[name] == pytest.approx(expected[name], abs=1e-4) for name in (*BLIND, "predictable"))
    assert trainer.row_counts == {"rows": 392, "overlong_dropped": 0, "held_out": 8}


def test_when_they_are_read():
    assert [step for step in range(1, 1001) if is_due(step, 1000, 200)] == [200, 400, 800, 1000]
    assert [step for step in range(1, 101) if is_due(step, 100, 200)] == [100]


def test_swapped_traces():
    traces = [[0] * n for n in (3, 0, 200, 1)]
    random = swapped(traces, "random", 8)
    assert list(map(len, random)) == [3, 0, 200, 1] and {*random[2]} == {*range(8)}
    assert random == swapped(traces, "random", 8) and swapped(traces, "own", 8) == traces
    assert swapped(traces, "other", 8) == [[], traces[2], traces[3], traces[0]]
    assert swapped(traces, "none", 8) == [[]] * 4


@pytest.mark.parametrize("fields", [{}, {"packing": True, "max_length": 300, "gradient_checkpointing": True}], ids=str)
def test_held_out_rows_are_not_trained_and_reading_changes_nothing(checkpoint, tmp_path, data, fields):
    """Beside a run on the other rows alone, without gauges: the same losses, the same weights."""
    others = data.select([i for i in range(200) if i not in PROBES])
    fields = {"max_steps": 5, "gauge_steps": 1, "rehearsal": 0.5} | fields
    with_gauges = run(checkpoint, tmp_path / "a", SelfDistillationTrainer, data=data, gauge_rows=4, **fields)
    without = run(checkpoint, tmp_path / "b", SelfDistillationTrainer, data=others, gauge_rows=0, **fields)
    assert sum("useful_own" in entry for entry in with_gauges.state.log_history) == 4  # 1, 2, 4 and the last
    for a, b in zip(weights(with_gauges), weights(without), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(with_gauges.state.log_history[:5], without.state.log_history[:5], strict=True):
        assert {name: a[name] for name in b} == b


def test_no_dropout_and_no_random_state(checkpoint, tmp_path, data):
    peft_config = lora(checkpoint)
    peft_config.lora_dropout = 0.5
    trainer = run(checkpoint, tmp_path, data=data, peft_config=peft_config, **HELD | {"max_steps": 2})
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert trainer.gauges.read() == trainer.gauges.read()
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()
    assert trainer.model.training and all(module.training for module in trainer.model.modules())


def test_from_every_checkpoint_the_gauges_are_read_as_if_never_killed(checkpoint, tmp_path, data):
    fields = LAST | {"gauge_rows": 4, "gauge_steps": 2, "logging_steps": 5}
    whole = run(checkpoint, tmp_path, data=data, **fields)
    log = [entry for entry in whole.state.log_history if "train_runtime" not in entry]
    assert [entry["step"] for entry in log] == [2, 3, 4, 5, 6, 7]
    assert [entry["step"] for entry in log if "useful_own" in entry] == [2, 4, 7]
    for path in sealed_checkpoints(tmp_path):
        again = BottleneckSFTTrainer(str(checkpoint), BottleneckConfig(**settings(tmp_path, **fields)), data)
        again.train(resume_from_checkpoint=str(path))
        assert [entry for entry in again.state.log_history if "train_runtime" not in entry] == log
        assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))


def test_probes_are_spread_fit_and_are_none_of_few(checkpoint, tmp_path, data):
    def built(data, **fields):
        return BottleneckSFTTrainer(str(checkpoint), BottleneckConfig(**settings(tmp_path, **fields)), data)

    assert built(data, gauge_rows=4).probes == PROBES
    for few in (built(data, gauge_rows=5), built(data), built(data, gauge_rows=0)):
        assert few.probes == [] and few.gauges is None and len(few.train_dataset) == 200
    whole = built(data, gauge_rows=0)
    longest = max(len(whole.train_dataset[i]["input_ids"]) for i in range(200))
    short = built(data, gauge_rows=2, max_length=longest - 1, overlong="drop")
    assert len(short.probes) == 2 and short.row_counts["overlong_dropped"] > 0
    assert all(len(whole.train_dataset[i]["input_ids"]) < longest for i in short.probes)
    for wrong in ({"gauge_rows": 1}, {"gauge_rows": -2}, {"gauge_steps": 0}):
        with pytest.raises(Refused, match="at least 2 rows, or 0 for no gauges"):
            BottleneckConfig(**settings(tmp_path, **wrong))


def told(data: Dataset, rule) -> Dataset:
    """The rows with one prompt, traces of two uniform tokens, and the answer that `rule` gives of a trace."""
    rng = np.random.default_rng(1)
    traces = rng.integers(8, size=(len(data), 2)).tolist()
    answers = [[10 + rule(trace, rng), data[0]["answer_ids"][-1]] for trace in traces]
    same = {name: [data[0][name]] * len(data) for name in ("prompt_ids", "cot_ids")}
    return Dataset.from_dict(same | {"trace": traces, "answer_ids": answers})


RULES = {
    "tokens": lambda trace, rng: trace[0] // 2,  # the answer copies its trace
    "nothing": lambda trace, rng: int(rng.integers(4)),
    "untrained": lambda trace, rng: trace[0] // 2,
}


@pytest.mark.parametrize("expected", RULES)
def test_an_answer_that_copies_its_trace_is_told_from_one_that_does_not(checkpoint, tmp_path, expected):
    data, trained = told(rows(checkpoint, 1000), RULES[expected]), expected != "untrained"
    fields = {"gauge_rows": 20, "max_steps": 60, "learning_rate": 3.0e-3} if trained else FIXED | {"gauge_rows": 20}
    found = reading(run(checkpoint, tmp_path, SelfDistillationTrainer, data=data, **fields, pad_to_multiple_of=1))
    if not trained:  # any two traces of one length are alike
        off = [
            (found[f"useful_{swap}"] - found["useful_own"]) / found[f"useful_{swap}_se"]
            for swap in ("random", "other")
        ]
        assert max(map(abs, off)) < 2 and level(found) != "tokens"
        return
    assert level(found) == expected
    if expected == "tokens":
        assert found["useful_own"] < 0.2 and min(found[name] for name in BLIND[1:]) > 0.5
    assert found["predictable"] == pytest.approx(2 / 3 * math.log(8), abs=0.2)  # two uniform tokens, and their end


def figures(own=0.41, random=1.32, other=1.4, none=1.35, predictable=1.05, se=0.1, **given_cot) -> dict[str, float]:
    found = {"step": 400.0, "loss": 1.0, "useful_own": own, "predictable": predictable, "predictable_uniform": 4.17}
    for swap, loss in (("random", random), ("other", other), ("none", none)):
        found |= {f"useful_{swap}": loss, f"useful_{swap}_se": se}
    return found | {f"useful_{name}": loss for name, loss in given_cot.items()}


def test_what_they_say():
    assert says(figures()) == (
        "the answer reads its trace: loss 0.41 after its own, 1.32 after random tokens, 1.40 after another row's, "
        "1.35 after none; the trace is not yet predictable from the prompt: 1.05 nats a token of 4.17"
    )
    assert "the trace is predictable from the prompt: 0.20 nats" in says(figures(predictable=0.2))
    seen = says(figures(own_given_cot=0.05, random_given_cot=0.06))
    assert "1.35 after none (where the trace saw the CoT: 0.05 after its own, 0.06 after random tokens); the" in seen
    assert level(figures(random=0.62, other=0.62, none=0.62)) == "tokens"
    assert level(figures(random=0.60)) == "places"  # not by more than two standard errors
    assert level(figures(other=0.41)) == "form"  # unusual tokens hurt, another problem's do not
    assert level(figures(random=0.41, other=0.41)) == "places"
    assert level(figures(0.41, 0.41, 0.41, 0.41, se=0.02)) == level(figures(own=2.0)) == "nothing"
    wide = figures(0.41, 0.41, 0.41, 0.41)  # each may be worse by half of the loss
    assert level(wide) == "open" and says(wide).startswith("whether the answer reads its trace cannot be told")
    assert level(wide | {"useful_random_se": 0.02}) == "nothing"  # random tokens surely do as well


@pytest.fixture
def small(toy, tmp_path, monkeypatch):
    """A warm-up of 16 rows a phase of which 4 are held out, that can learn nothing in two steps."""
    monkeypatch.setattr(steps, "ROWS_A_PROBE", 4)
    training = {"gauge_rows": 4, "learning_rate": 0.0}
    return toy | recipes(tmp_path, str(tmp_path / "test.jsonl"), training, limit=4) | {"rounds": 1}


@pytest.mark.slow
def test_a_warmup_says_what_its_gauges_say_and_stops_if_asked_to(small, capsys):
    run_dir = Path(small["run_dir"])
    with pytest.raises(Refused, match="stopped after round1/distill, as stop_when_empty asks: the answer .* goes on"):
        warmup(WarmupArguments(**small, stop_when_empty=True))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("round1/")]
    assert [line.partition(":")[0] for line in said[:2]] == ["round1/bottleneck", "round1/distill"]
    last = json.loads((run_dir / "round1" / "distill" / "training_log.json").read_text())
    assert last["rows"] == {"rows": 24, "overlong_dropped": 0, "held_out": 8}  # masked rows of rehearsal too
    assert said[1] == f"round1/distill: {says(last['log'][-1])}" and "saw the CoT" in said[0]
    logged = read_losses(run_dir)
    assert logged["round1/distill"][-1]["useful_own"] == pytest.approx(last["log"][-1]["useful_own"])
    assert not (run_dir / "round1" / "evaluate").exists()
    before = (run_dir / "round1" / "distill" / "manifest.json").stat().st_mtime_ns
    results = warmup(WarmupArguments(**small))  # goes on
    assert len(results) == 2 and (run_dir / "round1" / "distill" / "manifest.json").stat().st_mtime_ns == before


def test_nothing_stops_where_traces_carry_or_before_phase_b(tmp_path, monkeypatch, capsys):
    log = [figures()]
    monkeypatch.setattr(warmup_module, "read_log", lambda folder: log)
    empty, stage = figures(random=0.4), Stage("round1/distill", "distill", {"output_dir": str(tmp_path)})
    judge(stage, stop_when_empty=True)
    log[:] = [figures(), empty]  # the last counts
    judge(Stage("round1/bottleneck", "bottleneck", stage.settings), stop_when_empty=True)
    judge(stage, stop_when_empty=False)
    assert capsys.readouterr().out.count("places") == 0 and "not its tokens" in says(empty)
    with pytest.raises(Refused, match="not its tokens"):
        judge(stage, stop_when_empty=True)
    for entry in ({"step": 1, "loss": 1.0}, figures(0.41, 0.41, 0.41, 0.41)):  # of too few rows, or of few
        log[:] = [entry]
        judge(stage, stop_when_empty=True)


def test_stopping_needs_gauges(toy, tmp_path):
    fields = toy | recipes(tmp_path, str(tmp_path / "test.jsonl"))
    with pytest.raises(
        Refused, match="stop_when_empty: round1/distill has no gauges: gauge_rows 64 of .* 16; give 100 rows"
    ):
        warmup(WarmupArguments(**fields, stop_when_empty=True))
    assert not Path(fields["run_dir"]).exists()


def test_the_rows_held_out_are_counted_beforehand(checkpoint, tmp_path, data):
    """By `abscot plan` and the baselines, which take as many steps."""
    fields = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 3, "gauge_rows": 4}
    trainer = run(checkpoint, tmp_path, data=data, **fields)
    assert trainer.state.global_step == steps.steps_of(200 - len(steps.probes(200, fields)), fields, 1) == 66


def test_the_report_shows_the_gauges(tmp_path):
    run_dir = tmp_path / "informed"
    run_dir.mkdir()
    logs = {
        "round1/bottleneck": [figures(own_given_cot=0.05, random_given_cot=0.06), {"step": 500.0, "loss": 1.0}],
        "round1/distill": [figures() | {"step": 200.0}, figures(own=0.2, predictable=0.01)],
    }
    text = io.StringIO()
    writer = csv.DictWriter(text, ["stage", *COLUMNS], extrasaction="ignore")
    writer.writeheader()
    writer.writerows({"stage": stage, **entry} for stage, log in logs.items() for entry in log)
    (run_dir / "losses.csv").write_text(text.getvalue())
    section = gauges_section({"informed": run_dir})
    said, table = section["tables"]
    assert said["rows"] == [
        ["informed round1/bottleneck", says(logs["round1/bottleneck"][0])],
        ["informed round1/distill", says(logs["round1/distill"][1])],
    ]
    values = ["0.410", "1.320", "1.400", "1.350"]
    assert table["rows"] == [
        ["round1/bottleneck", "400", *values, "0.050", "0.060", "1.050 of 4.17"],
        ["round1/distill", "200", *values, "", "", "1.050 of 4.17"],
        ["round1/distill", "400", "0.200", *values[1:], "", "", "0.010 of 4.17"],
    ]
    (figure,) = (figure for figure, _ in section["figures"].values())
    drawn = {tuple(line.get_ydata()) for axes in figure.axes for line in axes.lines}
    assert {(0.41, 0.2), (1.05, 0.01), (1.35,)} <= drawn
    (run_dir / "losses.csv").write_text("stage,step,loss\nround1/distill,1,2.0\n")  # of an older run
    assert gauges_section({"informed": run_dir}) is None


@pytest.mark.slow
def test_compiled_layers_read_the_same_and_compile_little(checkpoint, tmp_path, data, monkeypatch):
    """A graph more for each of the two kinds of rows, however often they are read."""
    fields = HELD | {"max_steps": 3, "gauge_steps": 1, "learning_rate": 0.0, "packing": True, "max_length": 300}
    plain = run(checkpoint, tmp_path / "plain", data=data, **fields)
    torch._dynamo.reset()
    counter, compiler = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", partial(compiler, backend=counter))
    trainer = run(checkpoint, tmp_path / "compiled", data=data, compile_layers=True, **fields)
    assert counter.frame_count <= 4  # training takes two
    assert reading(trainer) == pytest.approx({**reading(plain), "grad_norm": reading(trainer)["grad_norm"]}, abs=1e-4)
