"""What a warm-up is compared with: each row and loss against its formula, stepwise internalisation against a plain
loop, concise rows from constructed answers, and the driver: same rows, same steps, killed and resumed."""

import json
import math
import signal
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from forked import abscot
from torch.utils.data import BatchSampler, SequentialSampler
from trainers import build, rows, settings, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import ModelConfig
from warmups import LORA, recipes

from abscot_trl.data.prepare import load_prepared
from abscot_trl.data.toy import chain_arithmetic, write_problems
from abscot_trl.errors import Refused
from abscot_trl.evaluation import concise as module
from abscot_trl.evaluation.concise import ConciseArguments, make_concise, shortest_right
from abscot_trl.evaluation.evaluate import EvaluateArguments, evaluate
from abscot_trl.loop import driver
from abscot_trl.loop.baselines import NAMES, BaselinesArguments, baseline_stages, baselines, warmup_steps
from abscot_trl.loop.warmup import WarmupArguments, warmup
from abscot_trl.phases import parse, run_phase
from abscot_trl.traces.constraint import Continuation
from abscot_trl.traces.hf import HFTraceSampler
from abscot_trl.training.baselines import removed_tokens
from abscot_trl.training.configs import BASELINES, BaselineConfig
from abscot_trl.training.phase import BaselineArguments, training_rows
from abscot_trl.vocabulary import AbstractVocabulary

ROOT = Path(__file__).resolve().parents[1]


def written_out(checkpoint, row: dict, kind: str) -> tuple[list[int], list[int]]:
    """Ids and labels of a baseline's row, as the formulas in `BaselineTrainer` say."""
    vocabulary, tokenizer = AbstractVocabulary.load(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    pause = tokenizer.convert_tokens_to_ids(["<beginabstract>"] + 6 * ["<TOKEN_A>"] + ["<endabstract>"])
    unread = row["prompt_ids"] + (pause if kind == "pause" else [])
    read = {"cot": row["cot_ids"], "concise": row["cot_ids"], "icot": row["cot_ids"]}.get(kind, [])
    if kind == "cut-cot":
        read = [token for place, token in enumerate(row["cot_ids"]) if place < vocabulary.m_max]
    read = read + row["answer_ids"]
    return unread + read, [-100] * len(unread) + read


@pytest.mark.parametrize("kind", BASELINES)
def test_rows_and_loss_are_the_formula(checkpoint, tmp_path, kind):
    data = rows(checkpoint, trace=False)
    # `icot` with a schedule that removes nothing in its first step and no random extra
    trainer = build(checkpoint, tmp_path, kind, per_device_train_batch_size=16, removal_smoothing=700.0)
    found = sorted((row["input_ids"], row["labels"]) for row in trainer.train_dataset)
    assert found == sorted(written_out(checkpoint, row, kind) for row in data)
    trainer.train()
    model, nll = AutoModelForCausalLM.from_pretrained(checkpoint), []
    for row in data:
        ids, labels = written_out(checkpoint, row, kind)
        with torch.no_grad():
            logps = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
        nll += [-logps[i - 1, ids[i]].item() for i in range(len(ids)) if labels[i] != -100]
    log = trainer.state.log_history[0]
    assert abs(log["loss"] - sum(nll) / len(nll)) < 1e-4
    assert log["supervised_tokens_per_step"] == len(nll) and "loss_trace" not in log
    assert "loss_end" not in log


def test_a_cut_cot_never_exceeds_the_budget(checkpoint, tmp_path):
    data = rows(checkpoint, trace=False)
    assert min(len(row["cot_ids"]) for row in data) > 6
    for row, made in zip(data, build(checkpoint, tmp_path, "cut-cot").train_dataset, strict=True):
        between = made["input_ids"][len(row["prompt_ids"]) : -len(row["answer_ids"])]
        assert len(between) == 6 and between == row["cot_ids"][:6]


def test_pauses_are_as_many_as_asked_for(checkpoint, tmp_path):
    trainer = build(checkpoint, tmp_path, "pause", pause_tokens=9)
    pause = AutoTokenizer.from_pretrained(checkpoint).convert_tokens_to_ids("<TOKEN_A>")
    assert {row["input_ids"].count(pause) for row in trainer.train_dataset} == {9}


def test_a_paused_model_answers_after_its_pauses(checkpoint, tmp_path, monkeypatch):
    """Evaluation asks with the prefix that training ended at, and samples no trace."""
    problems = write_problems(tmp_path / "problems.jsonl", chain_arithmetic(5, 3, 5, seed=0))
    asked, answer = [], HFTraceSampler.answer
    monkeypatch.setattr(HFTraceSampler, "sample", lambda *_, **__: pytest.fail("a trace was sampled"))
    monkeypatch.setattr(
        HFTraceSampler, "answer", lambda self, given, *a, **k: asked.extend(given) or answer(self, given, *a, **k)
    )
    results = evaluate(
        EvaluateArguments(
            model=str(checkpoint), problems=problems, output_dir=str(tmp_path / "out"), swaps=["own"],
            instruction=False, max_new_tokens=4, pause_tokens=6,
        )
    )  # fmt: skip
    ends = AutoTokenizer.from_pretrained(checkpoint).convert_tokens_to_ids(
        ["<beginabstract>"] + 6 * ["<TOKEN_A>"] + ["<endabstract>"]
    )
    assert len(asked) == 5 and all(prefix[-8:] == ends for prefix in asked)
    assert [(r["mode"], r["swap"], r["trace_tokens"]) for r in results] == [("abstract", "own", 6.0)]


@pytest.mark.parametrize("steps, longest, share", [(500, 36, 0.8), (40, 100, 0.7), (7, 3, 1.0), (10, 0, 0.5)])
def test_the_removal_schedule(steps, longest, share):
    removed = [removed_tokens(step, steps, longest, share, None) for step in range(steps + 1)]
    # floor(delta t / T) by exact arithmetic: delta / T = longest / (share steps) tokens a step
    rate = Fraction(longest) / (Fraction(str(share)) * steps)
    assert removed == [min(longest, math.floor(rate * step)) for step in range(steps + 1)]
    assert removed == sorted(removed) and removed[0] == 0
    assert all(tokens == longest for tokens in removed[math.ceil(share * steps) :])
    for portions in (1, 2, 5):
        staged = [removed_tokens(step, steps, longest, share, portions) for step in range(steps + 1)]
        assert (
            staged == sorted(staged) and staged[-1] == longest and set(staged[math.ceil(share * steps) :]) <= {longest}
        )
        assert len(set(staged)) - 1 <= portions
        assert all(a <= b for a, b in zip(staged, removed, strict=True))


def long_rows(n: int, length: int) -> Dataset:
    """Rows whose CoT says where each of its tokens stands."""
    made = {"prompt_ids": [3], "cot_ids": [5 + place % 20 for place in range(length)], "answer_ids": [19, 1]}
    return Dataset.from_list([made | {"trace": None} for _ in range(n)])


def test_the_random_extra_is_geometric(checkpoint, tmp_path):
    """P(o) = (1 - e^-lambda) e^(-lambda o), drawn anew for each row and step."""
    length, smoothing = 40, 0.7
    trainer = build(
        checkpoint, tmp_path, "icot", long_rows(8, length), max_steps=400, removal_smoothing=smoothing,
        removed_after=1.0, removal_stages=2,
    )  # fmt: skip
    data = trainer.train_dataset
    assert len(data) == 400 * 8
    extra = [length - (len(data[n]["input_ids"]) - 3) for n in range(200 * 8)]  # the first half: nothing removed yet
    share = [(1 - math.exp(-smoothing)) * math.exp(-smoothing * o) for o in range(6)]
    counts, n = Counter(extra), len(extra)
    chi2 = sum((counts[o] - n * p) ** 2 / (n * p) for o, p in enumerate(share))
    tail = n * math.exp(-6 * smoothing)
    chi2 += (sum(c for o, c in counts.items() if o >= 6) - tail) ** 2 / tail
    assert chi2 < 16.8  # 99 % of chi-squared with 6 degrees of freedom
    assert {tuple(extra[8 * step : 8 * step + 8]) for step in range(200)} != {tuple(extra[:8])}
    later = [length - (len(data[n]["input_ids"]) - 3) for n in range(200 * 8, 201 * 8)]
    assert min(later) >= length // 2


def test_rows_of_each_step(checkpoint, tmp_path):
    """Every epoch each row once; of each the end of its CoT, at least as short as the schedule says."""
    plain = rows(checkpoint, trace=False)
    fields = {"max_steps": 12, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = build(checkpoint, tmp_path, "icot", **fields)
    data, longest = trainer.train_dataset, max(len(row["cot_ids"]) for row in plain)
    assert len(data) == 12 * 4
    wholes = {i: written_out(checkpoint, row, "icot")[0] for i, row in enumerate(plain)}
    for epoch in range(3):
        seen = []
        for n in range(16 * epoch, 16 * epoch + 16):
            made, least = data[n], min(longest, math.floor(longest * (n // 4) / (0.8 * 12)))
            fits = [
                i
                for i, whole in wholes.items()
                for keep in range(max(0, len(plain[i]["cot_ids"]) - least) + 1)
                if made["input_ids"]
                == plain[i]["prompt_ids"]
                + plain[i]["cot_ids"][len(plain[i]["cot_ids"]) - keep :]
                + plain[i]["answer_ids"]
            ]
            assert len(fits) == 1  # prompts are distinct
            seen += fits
            supervised = [label for label in made["labels"] if label != -100]
            assert made["input_ids"] == plain[fits[0]]["prompt_ids"] + supervised
        assert sorted(seen) == list(range(16))
    assert all(len(data[n]["labels"]) - data[n]["labels"].count(-100) == 4 for n in range(40, 48))  # \boxed{ n } EOS
    # accelerate deals batches to two processes in turn: together they hold the rows of each step
    shards = [BatchSamplerShard(BatchSampler(SequentialSampler(data), 2, False), 2, p) for p in range(2)]
    for step, dealt in enumerate(zip(*shards, strict=True)):
        assert sorted(n for batch in dealt for n in batch) == list(range(4 * step, 4 * step + 4))


class Watch(TrainerCallback):
    """What AdamW remembers before each step and after it."""

    def __init__(self):
        self.before, self.after = {}, {}

    def _kept(self, optimizer) -> tuple:
        states = list(optimizer.state.values())
        return (
            {float(state["step"]) for state in states},
            [state["exp_avg"].clone() for state in states],
            [state["exp_avg_sq"].clone() for state in states],
        )

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.before[state.global_step] = self._kept(optimizer)

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.after[state.global_step] = self._kept(optimizer)


ICOT = {"max_steps": 12, "per_device_train_batch_size": 4, "removal_stages": 3, "max_grad_norm": 1.0}


def test_moments_are_forgotten_when_more_is_removed_and_only_then(checkpoint, tmp_path):
    trainer = build(checkpoint, tmp_path, "icot", **ICOT)
    watch = Watch()
    trainer.add_callback(watch)  # after the trainer's own
    trainer.train()
    removed = [trainer.train_dataset.removed(step) for step in range(12)]
    changes = [step for step in range(1, 12) if removed[step] > removed[step - 1]]
    assert changes == [4, 7, 10]  # 3 portions in 0.8 x 12 steps
    for step in range(1, 12):
        (count, first, second), (was, *moments) = watch.before[step], watch.after[step]
        if step in changes:
            assert count == {0.0} and not any(m.any() for m in first + second)
        else:
            assert count == was and all(
                torch.equal(a, b) for a, b in zip(first + second, moments[0] + moments[1], strict=True)
            )
            assert any(m.any() for m in first)


def test_stepwise_internalisation_is_a_plain_loop(checkpoint, tmp_path):
    """A new AdamW at each removal, as the authors do it; no trainer, no padding. (eps keeps rounding from growing.)"""
    trainer = build(checkpoint, tmp_path, "icot", removal_smoothing=700.0, adam_epsilon=1.0e-4, **ICOT)
    order, data = trainer.train_dataset.order.tolist(), rows(checkpoint, trace=False)
    trainer.train()
    model = AutoModelForCausalLM.from_pretrained(checkpoint).train()
    longest = max(len(row["cot_ids"]) for row in data)
    gone = -1
    for step in range(12):
        portions = sum(step >= 0.8 * 12 * portion / 3 for portion in (1, 2, 3))
        if longest * portions // 3 > gone:
            gone = longest * portions // 3
            optimiser = torch.optim.AdamW(model.parameters(), lr=1.0e-2, weight_decay=0.0, eps=1.0e-4)
        losses = []
        for row in (data[i] for i in order[4 * step : 4 * step + 4]):
            said = row["cot_ids"][gone:] + row["answer_ids"]
            ids = row["prompt_ids"] + said
            logps = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
            losses += [-logps[i - 1, ids[i]] for i in range(len(row["prompt_ids"]), len(ids))]
        optimiser.zero_grad()
        (sum(losses) / len(losses)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    for a, b in zip(weights(trainer), model.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-4


def test_internalisation_resumed_is_internalisation_uninterrupted(checkpoint, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    fields = ICOT | {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine"}
    whole = build(checkpoint, tmp_path / "whole", "icot", **fields)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        build(checkpoint, tmp_path / "cut", "icot", callbacks=[Stop()], **fields).train()
    resumed = build(checkpoint, tmp_path / "cut", "icot", **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))  # right before a removal
    for a, b in zip(weights(whole), weights(resumed), strict=True):
        assert torch.equal(a, b)
    assert resumed.state.log_history[:12] == whole.state.log_history[:12]


def test_bad_baselines_are_refused(checkpoint, tmp_path):
    for fields, words in [
        ({"baseline": "soft"}, "'soft' is not one of sft, cot, pause"),
        ({"baseline": "icot", "packing": True}, "set packing: false"),
        ({"removed_after": 0.0}, "removed_after 0.0"),
        ({"removal_smoothing": 0.0}, "removal_smoothing 0.0"),
        ({"pause_tokens": 0}, "pause_tokens must be at least 1"),
        ({"removal_stages": -1}, "removal_stages must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            BaselineConfig(**settings(tmp_path, **fields))
    with pytest.raises(ValueError, match="would all be the same one"):
        ConciseArguments(model="m", data="d", output_dir="o", temperature=0.0)


def test_the_last_of_several_recipes_wins(tmp_path):
    for name, content in [("a", "learning_rate: 1.0e-3\nseed: 1\n"), ("b", "seed: 2\nbaseline: cot\n")]:
        (tmp_path / f"{name}.yaml").write_text(content)
    paths = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    training, model = parse(
        (BaselineConfig, ModelConfig), [*paths, "--output_dir", str(tmp_path), "--bf16", "false", "--use_cpu", "true"]
    )
    assert (training.learning_rate, training.seed, training.baseline) == (1e-3, 2, "cot")
    (tmp_path / "a.yaml").write_text("learning_rte: 1\n")
    with pytest.raises(ValueError, match="a.yaml: unknown key 'learning_rte'"):
        parse((BaselineConfig,), paths)


def said(tokenizer, text: str, truncated: bool = False) -> Continuation:
    return Continuation(tokenizer(text, add_special_tokens=False)["input_ids"], truncated)


def test_the_shortest_right_answer_is_kept(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    long, short, wrong = "1+2=3;\n3+0=3;\n\\boxed{3}", "1+2=3;\n\\boxed{3}", "1=1;\n\\boxed{4}"
    bare, cut = "\\boxed{3}", "\\boxed{3}"
    outputs = [said(tokenizer, text) for text in (long, wrong, bare, short, long)] + [said(tokenizer, cut, True)]
    found = shortest_right(outputs, "3", tokenizer)
    assert found == {"cot": "1+2=3;", "answer": "\\boxed{3}", "tokens": len(outputs[3].token_ids)}
    assert shortest_right(outputs[1:2], "3", tokenizer) == "none_right"
    assert shortest_right(outputs[1:3], "3", tokenizer) == "no_reasoning"
    assert shortest_right(outputs[5:], "3", tokenizer) == "all_truncated"


def test_concise_rows(checkpoint, tmp_path, monkeypatch):
    """Rows without a right sample are dropped and counted; a killed run goes on; `abscot data` takes what it wrote."""
    tokenizer, examples = AutoTokenizer.from_pretrained(checkpoint), chain_arithmetic(12, 3, 5, seed=0)
    train = write_problems(tmp_path / "train.jsonl", examples)
    arguments = ["--data_format", "problems", "--tokenizer", str(checkpoint), "--shuffle_buffer", "0"]
    run_phase("data", ["--data", train, "--output_dir", str(tmp_path / "data"), *arguments])
    spans = []

    def oracle(self, prefixes, most, temperature, seed, numbers, bar):
        """Sample k of problem i: right, and shorter with each k; problem 3 never right, problem 4 never whole."""
        spans.append(list(numbers))
        if len(spans) == 3:
            raise KeyboardInterrupt
        outputs = []
        for prefix, number in zip(prefixes, numbers, strict=True):
            i, k = divmod(number, 3)
            assert tokenizer.decode(prefix).endswith("12<assistant>")  # the instruction, then the model's turn
            result = (int(examples[i].gold) + (i == 3)) % 5
            outputs.append(said(tokenizer, "1=1;\n" * (3 - k) + f"\\boxed{{{result}}}", truncated=i == 4))
            bar.update()
        return outputs

    monkeypatch.setattr(HFTraceSampler, "answer", oracle)
    fields = {"model": str(checkpoint), "data": str(tmp_path / "data"), "output_dir": str(tmp_path / "concise")}
    fields |= {"samples": 3, "max_new_tokens": 30, "instruction": "12", "part_tokens": 500}
    with pytest.raises(KeyboardInterrupt):
        make_concise(ConciseArguments(**fields))
    assert not (tmp_path / "concise").exists()
    with pytest.raises(ValueError, match="begun with other settings .temperature: 0.7 -> 0.5"):
        make_concise(ConciseArguments(**fields, temperature=0.5))
    counts = make_concise(ConciseArguments(**fields))
    asked = [number for n, span in enumerate(spans) if n != 2 for number in span]
    assert sorted(asked) == list(range(36)) and len(spans) == 4  # each sample once, in spite of the kill
    assert (counts["rows_read"], counts["rows_kept"]) == (12, 10)
    assert counts["dropped"] == {"none_right": 1, "all_truncated": 1}
    kept = [json.loads(line) for line in (tmp_path / "concise" / "rows.jsonl").read_text().splitlines()]
    assert [row["id"] for row in kept] == [e.id for i, e in enumerate(examples) if i not in (3, 4)]
    assert all(row["cot"] == "1=1;" for row in kept) and not (tmp_path / "concise.parts").exists()
    data = ["--data", str(tmp_path / "concise" / "rows.jsonl"), "--output_dir", str(tmp_path / "prepared")]
    run_phase("data", [*data, *arguments])
    prepared, _ = load_prepared(tmp_path / "prepared", tokenizer)
    before, _ = load_prepared(tmp_path / "data", tokenizer)
    assert prepared["prompt_ids"] == [row["prompt_ids"] for i, row in enumerate(before) if i not in (3, 4)]
    assert [tokenizer.decode(row["cot_ids"]) for row in prepared] == ["1=1;\n"] * 10
    monkeypatch.setattr(HFTraceSampler, "answer", lambda *a: [said(tokenizer, "1;\n\\boxed{9}")] * len(a[1]))
    with pytest.raises(ValueError, match="none of 12 rows right"):
        make_concise(ConciseArguments(**fields | {"output_dir": str(tmp_path / "nothing")}))


@pytest.fixture
def fields(toy, tmp_path, monkeypatch):
    """The driver's fields for a warm-up of one round and its baselines; the tiny model is said to answer right."""
    monkeypatch.chdir(ROOT)
    right = {"cot": "1+1=2;", "tokens": 9}
    monkeypatch.setattr(module, "shortest_right", lambda _, gold, *__: right | {"answer": f"\\boxed{{{gold}}}"})
    training = LORA | {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "steps", "save_steps": 2}
    (tmp_path / "concise.yaml").write_text("samples: 2\nmax_new_tokens: 8\ninstruction: ''\n")
    found = (
        toy | recipes(tmp_path, str(tmp_path / "test.jsonl"), training, limit=4) | {"rounds": 1, "rows_per_phase": 8}
    )
    found = {name: value for name, value in found.items() if name not in ("initial", "distill_from")}
    return found | {"concise": str(tmp_path / "concise.yaml"), "run_dir": str(tmp_path / "baselines")}


@pytest.mark.slow
def test_same_rows_and_steps_as_the_warm_up(fields, tmp_path):
    like = {key: value for key, value in fields.items() if key != "concise"} | {"run_dir": str(tmp_path / "warm")}
    warmup(WarmupArguments(**like))
    logs = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "warm").rglob("training_log.json")}
    steps = sum(log["log"][-1]["step"] for log in logs.values())
    assert steps == 2 + 4  # 8 rows by 4, and 16 with rehearsal
    args = BaselinesArguments(**fields, warmup=like["run_dir"])
    assert warmup_steps(args) == warmup_steps(BaselinesArguments(**fields)) == steps
    results = baselines(args)
    assert [(r["model"], r["mode"], r["swap"], r["n"]) for r in results] == [
        (name, BASELINES.get(name, "verbal"), "own", 4) for name in NAMES
    ]
    run = Path(fields["run_dir"])
    assert results == json.loads((run / "results.json").read_text())
    assert json.loads((run / "splits.json").read_text()) == json.loads((tmp_path / "warm/splits.json").read_text())
    seen = [
        json.loads(line)["row"]
        for path in (tmp_path / "warm").rglob("traces.jsonl")
        for line in path.read_text().splitlines()
    ]
    vocabulary, tokenizer = AbstractVocabulary.load(fields["model"]), AutoTokenizer.from_pretrained(fields["model"])
    data, _ = load_prepared(fields["data"])
    chosen = training_rows(BaselineArguments(fields["data"], splits=str(run / "splits.json")), vocabulary, tokenizer)
    assert sorted(chosen["prompt_ids"]) == sorted(data[row]["prompt_ids"] for row in seen) and len(seen) == 16
    for name in BASELINES:
        log = json.loads((run / name / "train" / "training_log.json").read_text())
        assert log["steps"] == log["log"][-1]["step"] == steps and log["rows"]["rows"] == 16
        assert (run / name / "merged" / "model.safetensors").is_file()
        recipe = yaml.safe_load((run / name / "train.yaml").read_text())
        phase = yaml.safe_load(Path(fields["bottleneck"]).read_text())
        same = ("learning_rate", "per_device_train_batch_size", "lora_r", "max_length")
        assert all(recipe[key] == phase[key] for key in same) and recipe["model_name_or_path"] == fields["model"]
    prompts, _ = load_prepared(run / "concise" / "data")
    assert sorted(prompts["prompt_ids"]) == sorted(chosen["prompt_ids"])
    paused = yaml.safe_load((run / "pause" / "evaluate.yaml").read_text())
    assert (paused["pause_tokens"], paused["modes"], paused["swaps"]) == (6, ["abstract"], ["own"])
    with pytest.raises(ValueError, match="drawn for something else: seed 0 there, 1 asked for"):
        baselines(BaselinesArguments(**fields | {"seed": 1, "run_dir": str(tmp_path / "x")}, warmup=like["run_dir"]))


def test_dry_run_writes_nothing_and_mistakes_are_said(fields, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert baselines(BaselinesArguments(**fields, dry_run=True, names=["icot", "concise"])) == []
    assert sorted(tmp_path.rglob("*")) == before
    shown = [line.split()[:3] for line in capsys.readouterr().out.splitlines() if "to do" in line]
    stages = ["icot/train", "icot/merge", "icot/evaluate", "concise/samples", "concise/data"]
    stages += ["concise/train", "concise/merge", "concise/evaluate"]
    assert shown == [[name, "to", "do"] for name in stages]
    with pytest.raises(ValueError, match=r"names: \['icto'\]; any of base, sft"):
        BaselinesArguments(**fields, names=["icto"])
    with pytest.raises(ValueError, match="concise needs the field concise"):
        BaselinesArguments(**fields | {"concise": None})
    with pytest.raises(Refused, match="round1/bottleneck/training_log.json is not there"):
        baselines(BaselinesArguments(**fields, warmup=str(tmp_path / "none")))
    recipe = yaml.safe_load(Path(fields["bottleneck"]).read_text())
    Path(fields["bottleneck"]).write_text(yaml.safe_dump(recipe | {"packing": True}))
    with pytest.raises(ValueError, match="bottleneck.yaml packs rows, so its steps are known from a run alone"):
        baselines(BaselinesArguments(**fields))
    args = BaselinesArguments(**fields, steps=7, names=["sft"])
    assert [stage.settings["max_steps"] for stage in baseline_stages(args) if stage.phase == "baseline"] == [7]
    assert not Path(fields["run_dir"]).exists()


@pytest.mark.slow
def test_killed_and_resumed(fields, tmp_path, monkeypatch):
    """A process killed within a training stage; the same call ends in the weights and results of an unbroken run."""
    fields |= {"names": ["base", "icot"]}
    config = tmp_path / "baselines.yaml"
    config.write_text(yaml.safe_dump(fields))
    seal = Path(fields["run_dir"]) / "icot" / "train" / "checkpoint-2" / "sealed.json"
    process = abscot(["baselines", "--config", config], tmp_path / "log")
    while not seal.is_file() and process.is_alive():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (seal.parents[1] / "manifest.json").exists()
    done, launch = [], driver.launch
    monkeypatch.setattr(driver, "launch", lambda stage, *a: done.append(stage.name) or launch(stage, *a))
    killed = baselines(BaselinesArguments(**fields))
    assert done == ["icot/train", "icot/merge", "icot/evaluate"]
    whole = baselines(BaselinesArguments(**fields | {"run_dir": str(tmp_path / "whole")}))
    assert killed == whole
    one, other = (
        AutoModelForCausalLM.from_pretrained(Path(run) / "icot" / "merged").state_dict()
        for run in (fields["run_dir"], tmp_path / "whole")
    )
    assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)
    with pytest.raises(ValueError, match=r"made with other settings \(.*seed: 0 -> 3"):
        (Path(fields["run_dir"]) / "splits.json").unlink()
        baselines(BaselinesArguments(**fields | {"seed": 3}))
