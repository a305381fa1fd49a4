"""GRPO over trace and answer: against a slow reference, and on a task that must be learnt."""

import time
from statistics import fmean

import pytest
import torch
from grpo_runs import data, grpo, loglikelihoods, reports_logps, started
from trainers import lora, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from abscot_trl.training import grpo as module
from abscot_trl.training.policy import TracePolicy
from abscot_trl.vocabulary import AbstractVocabulary


def recorded(trainer):
    """Every call of the log-probabilities: who was asked, and what for."""
    calls, inner = [], trainer._get_per_token_logps_and_entropies

    def note(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        result = inner(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        reference = model is trainer.ref_model
        calls.append(
            (reference, input_ids, attention_mask, logits_to_keep, *(x.detach() for x in result[:2] if x is not None))
        )
        return result

    trainer._get_per_token_logps_and_entropies = note
    return calls


@pytest.mark.parametrize("temperatures", [(1.0, None), (0.7, 1.3)])
def test_logps_are_those_of_the_sampler(checkpoint, tmp_path, temperatures):
    """Policy, old policy and reference, against float64 and one row at a time; 0 where the end was forced."""
    y, z = temperatures
    fields = {"temperature": y, "trace_temperature": z, "max_steps": 1, "num_iterations": 2, "learning_rate": 1e-9}
    trainer = grpo(checkpoint, tmp_path, train=False, **fields)
    calls = recorded(trainer)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).double()
    trainer.train()
    assert {reference for reference, *_ in calls} == {False, True} and len(calls) >= 3
    forced = 0
    for _, ids, mask, keep, logps, *entropies in calls:
        for row in range(len(ids)):
            present = mask[row].bool()
            completion = ids[row, -keep:][present[-keep:]].tolist()
            prompt = ids[row, :-keep][present[:-keep]].tolist()
            ((expected, entropy),) = loglikelihoods(model, [(prompt, completion)], trainer.trace_policy, y)
            n, m = len(completion), completion.index(trainer.end)
            torch.testing.assert_close(logps[row, :n].double(), expected, atol=1e-5, rtol=1e-5)
            if entropies:
                torch.testing.assert_close(entropies[0][row, :n].double(), entropy, atol=1e-4, rtol=0)
            if m == trainer.vocabulary.m_max:
                forced += 1
                assert logps[row, m] == 0
    assert forced > 3


def test_the_sampler_agrees(checkpoint, tmp_path):
    """What `HFTraceSampler` says of its own draws."""
    from abscot_trl.traces.hf import HFTraceSampler

    tokenizer, vocabulary = AutoTokenizer.from_pretrained(checkpoint), AbstractVocabulary.load(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    trainer = grpo(checkpoint, tmp_path, train=False, trace_temperature=0.7)
    prompts, _, _ = trainer._tokenize_prompts(data()["prompt"][:])
    traces = HFTraceSampler(model, tokenizer, vocabulary).sample([p[:-1] for p in prompts], 6, 1, 0.7, seed=3)
    for prompt, trace in zip(prompts, traces, strict=True):
        completion = [*trace.token_ids, trainer.end, 5]
        ids = torch.tensor([[*prompt, *completion]])
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, torch.ones_like(ids), len(completion)
        )
        given = torch.tensor([*trace.logps, trace.end_logp])
        torch.testing.assert_close(logps[0, :-1].detach(), given, atol=1e-5, rtol=0)


def test_only_the_first_end_ends_a_trace():
    """An answer may hold codebook tokens and the end delimiter; padding is nobody's."""
    policy = TracePolicy([3, 4, 9], m_min=0, m_max=2)
    ids = torch.tensor([[3, 4, 9, 7, 9, 3, 0], [9, 3, 9, 7, 0, 0, 0]])
    trace = policy.positions(ids, ids != 0)
    assert trace.int().tolist() == [[1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]]
    assert policy.forced(trace).int().tolist() == [[0, 0, 1, 0, 0, 0, 0], [0] * 7]


@pytest.mark.parametrize("adapter", [False, True])
def test_the_reference_is_the_policy_before_the_first_step(checkpoint, tmp_path, adapter):
    trainer = grpo(checkpoint, tmp_path, peft_config=lora(checkpoint) if adapter else None)
    log = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert log[0]["kl"] == 0.0 and log[1]["kl"] > 0.0


@pytest.mark.parametrize("adapter", [False, True])
def test_every_trainable_parameter_moves(checkpoint, tmp_path, adapter):
    adapter = lora(checkpoint) if adapter else None  # its A has no gradient before B has moved
    trainer = grpo(checkpoint, tmp_path, train=False, peft_config=adapter, max_steps=3)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    trainer.train()
    assert [name for name, p in trained.items() if torch.equal(p, before[name])] == [] and len(trained) > 5


@pytest.mark.parametrize("part", ["trace", "answer"])
def test_what_is_not_trained_has_no_gradient(checkpoint, tmp_path, part):
    """Gradients of the loss by log-probabilities are zero outside of the part, and at ends that were forced."""
    trainer, seen = grpo(checkpoint, tmp_path, train=False, train_on=part), []
    inner = trainer._get_per_token_logps_and_entropies

    def note(model, input_ids, attention_mask, keep, *args, **kwargs):
        logps, *rest = inner(model, input_ids, attention_mask, keep, *args, **kwargs)
        if logps.requires_grad:
            logps.retain_grad()
            seen.append((input_ids[:, -keep:], attention_mask[:, -keep:].bool(), logps))
        return logps, *rest

    trainer._get_per_token_logps_and_entropies = note
    trainer.train()
    for ids, present, logps in seen:
        trace = trainer.trace_policy.positions(ids, present)
        forced = trainer.trace_policy.forced(trace)
        wanted = (trace if part == "trace" else present & ~trace) & ~forced
        assert not logps.grad[~wanted].any() and (logps.grad[wanted] != 0).float().mean() > 0.8


def test_a_reward_that_is_missing_is_no_zero(checkpoint, tmp_path, monkeypatch):
    """A row without the judge's part trains nothing; rewards that none of a group has take no row out."""
    trainer, seen = grpo(checkpoint, tmp_path, train=False), []
    columns = [[1.0, 0.0, None, 1.0, 0.0, 1.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5, None, None, None, None]]
    trainer.reward_funcs = [lambda column=column, **_: column for column in columns]
    trainer.reward_func_names, trainer.reward_processing_classes = ["judge", "accuracy"], [None, None]
    trainer.reward_weights = torch.ones(2)
    inner = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: seen.append(inner(inputs)) or seen[-1]
    trainer.train()
    advantages = seen[0]["advantages"]
    assert advantages[2] == 0 and (advantages[[0, 1, 3, 4, 5, 6, 7]].abs() > 0.4).all()
    assert advantages[0] == advantages[3] > 0  # the mean is of those that have it


def test_groups_that_are_all_alike_are_counted_as_such(checkpoint, tmp_path):
    """1 - 0.2 eight times has, by float32's rounding, a deviation of 6e-8, and trl calls that variance.
    A rollout that got no reward is no other one."""
    trainer = grpo(checkpoint, tmp_path, train=False, num_generations=8, per_device_train_batch_size=16)
    columns = [[1.0] * 7 + [None] + [1.0, 0.0] * 4, [-1.0] * 7 + [None] + [-1.0] * 8]
    trainer.reward_funcs = [lambda column=column, **_: column for column in columns]
    trainer.reward_func_names, trainer.reward_processing_classes = ["accuracy", "length"], [None, None]
    trainer.reward_weights = torch.tensor([1.0, 0.2])
    trainer.train()
    assert [e["frac_reward_zero_std"] for e in trainer.state.log_history if "reward" in e] == [0.5, 0.5]


def test_ratio_is_one_with_the_samplers_own_logps(checkpoint, tmp_path):
    trainer = grpo(checkpoint, tmp_path, trainer=reports_logps(), max_steps=4, learning_rate=1e-3)
    steps = [entry for entry in trainer.state.log_history if "ratio/mean" in entry]
    assert len(steps) == 4
    for entry in steps:
        assert entry["ratio/mean"] == pytest.approx(1.0, abs=1e-4) and entry["ratio/outside"] == 0.0


@pytest.mark.parametrize("beta", [0.04, 0.0])
def test_seconds_of_a_step_by_part(checkpoint, tmp_path, beta):
    """Each is where it was spent, all together no more than was; the probe's are its own."""
    fields = {"beta": beta, "max_steps": 4, "logging_steps": 2, "gradient_accumulation_steps": 2, "probe_steps": 4}
    trainer = grpo(checkpoint, tmp_path, train=False, **fields)
    inner = trainer.reward_funcs[0]
    trainer.reward_funcs = [lambda **columns: time.sleep(0.2) or inner(**columns)]  # once a step
    start = time.perf_counter()
    trainer.train()
    wall = time.perf_counter() - start
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in steps:
        parts = {key.removeprefix("time/"): value for key, value in entry.items() if key.startswith("time/")}
        assert {*parts} == {"rollout", "rewards", "update", "other"} | ({"scoring"} if beta else set())
        assert min(parts.values()) > 0 and parts["rewards"] >= 0.2
        assert sum(parts.values()) == pytest.approx(entry["step_time"], rel=0.05)
        wall -= 2 * sum(parts.values())
    probes = [entry["time/probe"] for entry in trainer.state.log_history if "time/probe" in entry]
    assert len(steps) == len(probes) == 2 and min(probes) > 0 and wall > sum(probes)


@pytest.mark.slow
@pytest.mark.parametrize("renormalised", [True, False])
def test_it_learns_and_only_with_renormalised_logps(tmp_path_factory, tmp_path, monkeypatch, renormalised):
    """
    From half right to nine in ten, by writing traces that the answer reads and nobody has taught. Without
    renormalisation each rollout weighs S^n, the mass that A holds for each of its n trace tokens (trl#6789).
    """
    checkpoint, rows = started(tmp_path_factory.getbasetemp() / "started")
    if not renormalised:
        monkeypatch.setattr(module, "renormalise_traces", lambda model, policy: None)
    fields = {"max_steps": 70, "learning_rate": 6e-4, "per_device_train_batch_size": 64, "num_generations": 8}
    fields |= {"beta": 0.0, "probe_steps": 1000, "max_completion_length": 18}
    trainer = grpo(checkpoint, tmp_path, trainer=reports_logps(), rows=rows, probes=rows, **fields)
    log = trainer.state.log_history
    rewards = [100 * entry["reward"] for entry in log if "reward" in entry]
    probes = [(entry["probe/own"], entry["probe/random"]) for entry in log if "probe/own" in entry]
    first, last = fmean(rewards[:5]), fmean(rewards[-10:])  # 320 and 640 rollouts
    assert 30 <= first <= 60
    if renormalised:
        assert last >= first + 20 and probes[-1][0] >= probes[0][0] + 20
        assert probes[-1][0] >= probes[-1][1] + 30  # by its trace, not past it
    else:
        assert last <= first + 10 and probes[-1][0] <= probes[0][0] + 10


@pytest.mark.parametrize("step", [4, 12])  # of 8 an epoch
def test_resumed_as_if_never_killed(checkpoint, tmp_path, step):
    """Losses, draws, order of prompts and weights."""
    fields = {"max_steps": 14, "save_strategy": "steps", "save_steps": 4, "num_iterations": 2, "learning_rate": 1e-3}
    fields |= {"rows": data(8), "probes": None}
    whole = grpo(checkpoint, tmp_path / "whole", **fields)
    half = grpo(checkpoint, tmp_path / "half", train=False, **fields)
    half.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    kept = ("loss", "reward", "rollouts", "codebook_counts", "kl", "grad_norm", "learning_rate", "step")
    logs = [[{k: e.get(k) for k in kept} for e in t.state.log_history if "loss" in e] for t in (whole, half)]
    assert len(logs[0]) == 14 and logs[0] == logs[1]
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(half), strict=True))
    prompts = [e["rollouts"][0]["prompt"] for e in logs[0]]
    assert len(set(prompts)) > 2


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"max_completion_length": 7}, "use 8 at least"),
        ({"top_p": 0.9}, "top_p: 0.9 changes what is sampled"),
        ({"trace_temperature": 0.0}, "trace_temperature must be over 0"),
        ({"save_strategy": "steps", "save_steps": 3, "num_iterations": 2}, "save_steps 3: .* serve 2 steps"),
        ({"save_strategy": "epoch", "gradient_accumulation_steps": 4, "steps_per_generation": 1}, "multiple of the 4"),
        ({"eval_strategy": "steps"}, "eval_strategy"),
        ({"sync_ref_model": True}, "sync_ref_model: the reference is the warm start"),
        ({"generation_kwargs": {"top_k": 20}}, "generation_kwargs has no effect"),
        ({"global_batch_size": 12}, "global_batch_size 12 is no multiple"),
    ],
)
def test_refused(checkpoint, tmp_path, fields, words):
    with pytest.raises(ValueError, match=words):
        grpo(checkpoint, tmp_path, train=False, **fields)
