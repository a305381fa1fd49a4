"""vLLM itself against transformers, on CPU or a GPU: legal traces, equal log-probabilities, equal distributions."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from sampling import ENGINE, ENVIRONMENT, need_vllm, truncated_softmax
from scipy.stats import chi2_contingency, chisquare
from transformers import AutoModelForCausalLM, AutoTokenizer

from abscot_trl.data.toy import chain_arithmetic, write_problems
from abscot_trl.errors import Refused
from abscot_trl.examples import cot_columns, prompt_ids
from abscot_trl.phases import run_phase
from abscot_trl.traces.hf import HFTraceSampler
from abscot_trl.traces.vllm import VLLMTraceSampler, check_tensor_parallel
from abscot_trl.vocabulary import AbstractVocabulary

pytestmark = pytest.mark.slow
TRUNCATED = {"temperature": 2.0, "top_p": 0.9, "top_k": 12, "seed": 6}
NINE = list(range(5, 95, 10))
SCRIPT = """
import dataclasses, json, sys
from abscot_trl.phases import run_phase
from abscot_trl.traces.vllm import VLLMTraceSampler
job = json.load(open(sys.argv[1]))
sampler = VLLMTraceSampler(job["model"], **job["engine"])
results = []
for call in job["calls"]:
    try:
        method = getattr(sampler, call.pop("method", "sample"))
        results.append([dataclasses.asdict(found) for found in method(**call)])
    except ValueError as error:
        results.append(str(error))
json.dump(results, open(sys.argv[2], "w"))
if job["evaluate"]:
    run_phase("evaluate", ["--config", job["evaluate"]])  # boots an engine of its own
"""


@pytest.fixture(scope="module")
def given(checkpoint):
    """500 prefixes of mixed lengths, one of them empty."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = [e for steps in (2, 4, 8) for e in chain_arithmetic(167, steps, 5, seed=0)][:499]
    cots = [cot_columns(row.cot, tokenizer)["cot_ids"] if i % 3 else [] for i, row in enumerate(rows)]
    return [[], *(prompt_ids(row.prompt, tokenizer) + cot for row, cot in zip(rows, cots, strict=True))]


@pytest.fixture(scope="module")
def evaluated(checkpoint, tmp_path_factory):
    """A folder with recipes of an evaluation by transformers and by vLLM: hf.yaml is run, vllm.yaml by `sampled`."""
    need_vllm()
    folder = tmp_path_factory.mktemp("evaluated")
    problems = write_problems(folder / "problems.jsonl", chain_arithmetic(60, 4, 5, seed=0))
    recipe = {"model": str(checkpoint), "problems": problems, "dtype": "float32", "max_new_tokens": 12}
    recipe |= {"modes": ["verbal", "abstract"], "swaps": ["own", "random", "other"], "instruction": False}
    for backend, extra in (("hf", {}), ("vllm", {"engine": ENGINE})):
        extra |= {"backend": backend, "output_dir": str(folder / backend)}
        (folder / f"{backend}.yaml").write_text(yaml.safe_dump(recipe | extra))
    run_phase("evaluate", ["--config", str(folder / "hf.yaml")])
    return folder


@pytest.fixture(scope="module")
def sampled(checkpoint, given, evaluated, tmp_path_factory):
    """Calls, and what one engine answers to them."""
    one = given[5]
    calls = {
        "free": {"prefixes": given * 6, "m_max": 5, "m_min": 2, "seed": 1},
        "again": {"prefixes": given[:50], "m_max": 5, "m_min": 2, "seed": 1},
        "some": {"prefixes": given[20:50:3], "rows": list(range(20, 50, 3)), "m_max": 5, "m_min": 2, "seed": 1},
        "greedy": {"prefixes": given, "m_max": 6, "temperature": 0.0},
        "answer": {"method": "answer", "prefixes": given[1:], "max_new_tokens": 24},
        "cool": {"prefixes": given[:100], "m_max": 6, "temperature": 0.6},
        "first": {"prefixes": [one] * 3000, "m_max": 1, "seed": 2},
        "nucleus": {"method": "answer", "prefixes": [one] * 3000, "max_new_tokens": 1, **TRUNCATED},
        "nucleus again": {"method": "answer", "prefixes": [one] * 9, "max_new_tokens": 1, "rows": NINE, **TRUNCATED},
        "hot": {"method": "answer", "prefixes": given[1:60], "max_new_tokens": 8, "temperature": 2.0},
        "limits": {"prefixes": [one], "m_max": 3, "m_min": 4},
        "long": {"prefixes": [[3] * 300], "m_max": 3},
        "none": {"prefixes": [], "m_max": 3},
    }
    folder = tmp_path_factory.mktemp("vllm")
    return calls, run(folder, checkpoint, calls, evaluate=str(evaluated / "vllm.yaml"))


def run(folder: Path, checkpoint, calls: dict[str, dict], evaluate: str | None = None, **engine) -> dict:
    """What one engine, in a process of its own, answers to the calls (booting one takes 20 s); then an evaluation."""
    job = {"model": str(checkpoint), "engine": ENGINE | engine, "calls": list(calls.values()), "evaluate": evaluate}
    (folder / "job.json").write_text(json.dumps(job))
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, folder / "script.py", folder / "job.json", folder / "out.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(calls, json.loads((folder / "out.json").read_text()), strict=True))


def test_thousands_of_legal_traces(checkpoint, sampled):
    tokenizer, vocabulary = AutoTokenizer.from_pretrained(checkpoint), AbstractVocabulary.load(checkpoint)
    codebook, (_, found) = set(vocabulary.ids(tokenizer)), sampled
    assert len(found["free"]) == 3000
    for trace in found["free"]:
        assert set(trace["token_ids"]) <= codebook and 2 <= len(trace["token_ids"]) <= 5
        assert trace["forced_end"] == (len(trace["token_ids"]) == 5) and len(trace["logps"]) == len(trace["token_ids"])
        assert (trace["end_logp"] == 0.0) == trace["forced_end"]
    assert {len(t["token_ids"]) for t in found["free"]} == {2, 3, 4, 5}
    assert [t["token_ids"] for t in found["again"]] == [t["token_ids"] for t in found["free"][:50]]
    assert [t["token_ids"] for t in found["some"]] == [t["token_ids"] for t in found["free"][20:50:3]]


def logp_errors(checkpoint, call: dict, traces: list[dict]) -> list[float]:
    """How far log-probabilities are from those of a plain forward and a log-softmax over the allowed ids."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    vocabulary, errors = AbstractVocabulary.load(checkpoint), []
    allowed = torch.tensor([*vocabulary.ids(tokenizer), vocabulary.end_id(tokenizer)])
    begin = vocabulary.begin_id(tokenizer)
    for prefix, trace in list(zip(call["prefixes"], traces, strict=True))[:300]:
        ids = torch.tensor([[*prefix, begin, *trace["token_ids"]]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prefix) :].double() / call.get("temperature", 1.0)
        steps = zip([*trace["token_ids"], allowed[-1].item()], [*trace["logps"], trace["end_logp"]], strict=True)
        for i, (token, logp) in enumerate(steps):
            if i == call["m_max"]:
                continue  # forced
            here = allowed[:-1] if i < call.get("m_min", 0) else allowed
            expected = torch.log_softmax(logits[i, here], 0)[here.tolist().index(token)].item()
            errors.append(abs(expected - logp))
    return errors


@pytest.mark.parametrize("name", ["free", "cool"])
def test_logps_equal_transformers_on_the_same_ids(checkpoint, sampled, name):
    calls, found = sampled
    errors = logp_errors(checkpoint, calls[name], found[name])
    assert len(errors) > 300 and max(errors) < 1e-4


def test_bfloat16_is_near_on_a_gpu(checkpoint, given, tmp_path):
    """FlashAttention's way, which takes no float32, against transformers in float32."""
    need_vllm(gpus=1)
    call = {"prefixes": given[:300], "m_max": 5, "m_min": 2, "seed": 1}
    errors = logp_errors(checkpoint, call, run(tmp_path, checkpoint, {"it": call}, dtype="bfloat16")["it"])
    assert sum(errors) / len(errors) < 0.03 and max(errors) < 0.3


def test_greedy_traces_equal_transformers(checkpoint, sampled, given):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    hf = HFTraceSampler(model, tokenizer, AbstractVocabulary.load(checkpoint)).sample(given, m_max=6, temperature=0.0)
    assert [t.token_ids for t in hf] == [t["token_ids"] for t in sampled[1]["greedy"]]


def test_greedy_answers_equal_transformers(checkpoint, sampled):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    calls, found = sampled
    given = calls["answer"]["prefixes"]
    hf = HFTraceSampler(model, tokenizer, AbstractVocabulary.load(checkpoint))
    answers = hf.answer(given, max_new_tokens=24)
    assert [asdict(answer) for answer in answers] == found["answer"]
    assert {answer.truncated for answer in answers} == {True, False}


def test_answers_hold_no_reserved_token(checkpoint, sampled):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    hf, given = HFTraceSampler(model, tokenizer, AbstractVocabulary.load(checkpoint)), sampled[0]["hot"]["prefixes"]
    unbarred = HFTraceSampler(model, tokenizer, None)
    assert {*hf.reserved} & {token for ids in unbarred.complete_answers(given, 8, 2.0) for token in ids}
    assert not {*hf.reserved} & {token for answer in sampled[1]["hot"] for token in answer["token_ids"]}


def test_draws_follow_the_same_distribution(checkpoint, sampled, given):
    """3,000 first tokens after one prefix, vLLM's against transformers': chi-square."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    hf = HFTraceSampler(model, tokenizer, AbstractVocabulary.load(checkpoint)).sample(
        [given[5]] * 3000, m_max=1, seed=4
    )
    drawn = [[(t.token_ids or [0])[0] for t in hf], [(t["token_ids"] or [0])[0] for t in sampled[1]["first"]]]
    tokens = sorted(set(drawn[0]) | set(drawn[1]))
    table = [[column.count(token) for token in tokens] for column in drawn]
    assert len(tokens) >= 5 and chi2_contingency(table).pvalue > 1e-3


def test_truncated_answers_follow_the_softmax(checkpoint, sampled, given):
    """3,000 first tokens under top-p and top-k against probabilities by hand: chi-square, and none from outside."""
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        logits = model(torch.tensor([given[5]])).logits[0, -1].double().numpy()
    limits = TRUNCATED["temperature"], TRUNCATED["top_p"], TRUNCATED["top_k"]
    reserved = AbstractVocabulary.load(checkpoint).all_ids(AutoTokenizer.from_pretrained(checkpoint))
    expected = 3000 * truncated_softmax(logits, *limits, reserved)
    (eos,) = {model.config.eos_token_id}
    drawn = np.bincount([(o["token_ids"] or [eos])[0] for o in sampled[1]["nucleus"]], minlength=len(expected))
    assert not drawn[expected == 0].any() and 3 < (expected > 0).sum() < 20
    assert chisquare(drawn[expected > 0], expected[expected > 0]).pvalue > 1e-3
    assert sampled[1]["nucleus again"] == [sampled[1]["nucleus"][row] for row in NINE]


def test_evaluation_by_vllm_equals_transformers(evaluated, sampled):
    """`abscot evaluate` with `backend: vllm`, greedy: every trace and answer is transformers', and every result."""
    hf, vllm = ((evaluated / name / "answers.jsonl").read_text() for name in ("hf", "vllm"))
    assert hf == vllm and len(hf.splitlines()) == 60 * 4
    hf, vllm = (json.loads((evaluated / name / "results.json").read_text()) for name in ("hf", "vllm"))
    assert [r.pop("decoding")["backend"] for r in vllm] == ["vllm"] * 4
    assert [r | {"decoding": None} for r in vllm] == [r | {"decoding": None} for r in hf]


def test_bad_input(checkpoint, sampled):
    _, found = sampled
    assert "m_min=4, m_max=3" in found["limits"]
    assert "a prefix of 300 tokens leaves no room for a trace of 3 in 256 positions" in found["long"]
    assert found["none"] == []
    with pytest.raises(ValueError, match="tensor_parallel_size 3 does not divide the 2 heads.*use one of 1, 2"):
        check_tensor_parallel(str(checkpoint), 3)


def test_a_codebook_that_would_kill_the_newer_runner_is_refused(checkpoint, monkeypatch):
    """A request may allow 1,024 ids there, and the error is raised inside the engine. (A fake one, as of a GPU.)"""
    config = SimpleNamespace(use_v2_model_runner=True, cache_config=SimpleNamespace(num_gpu_blocks=2, block_size=16))
    llm = SimpleNamespace(
        llm_engine=SimpleNamespace(vllm_config=config), model_config=SimpleNamespace(max_model_len=9)
    )
    platform = SimpleNamespace(is_cpu=lambda: False)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=lambda **_: llm))
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(
        Refused, match="has 1024 abstract tokens, .* takes 1022 at most; set VLLM_USE_V2_MODEL_RUNNER=0"
    ):
        VLLMTraceSampler(str(checkpoint), AbstractVocabulary(size=1024))
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"  # as the user wants it
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    assert VLLMTraceSampler(str(checkpoint)).cache_tokens == 32
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
