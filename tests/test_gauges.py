"""The two gauges: as computed by hand, on rows that are not trained; what carries is told from what does not."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from trainers import LAST, lora, rows, run, settings, token_ids, weights
from transformers import AutoModelForCausalLM

from abscot_trl.errors import Refused
from abscot_trl.report.gauges import level, says
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
    assert level(found) == (expected if trained else "nothing")
    if expected == "tokens":
        assert found["useful_own"] < 0.2 and min(found[name] for name in BLIND[1:]) > 0.5
    if trained:  # two uniform tokens, and their end
        assert found["predictable"] == pytest.approx(2 / 3 * math.log(8), abs=0.2)
