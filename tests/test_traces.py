"""Initial traces by their distribution, sampled ones against a log-softmax written out here."""

import random

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, AutoTokenizer

from abscot_trl.data.toy import chain_arithmetic
from abscot_trl.errors import Refused
from abscot_trl.examples import cot_columns, prompt_ids
from abscot_trl.traces.batching import batches
from abscot_trl.traces.files import describe_traces, read_traces, summarise_traces, write_traces
from abscot_trl.traces.hf import HFTraceSampler
from abscot_trl.traces.initial import cot_steps, random_trace, uniform_trace
from abscot_trl.vocabulary import AbstractVocabulary


@pytest.fixture(scope="module")
def policy(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    return model, AutoTokenizer.from_pretrained(checkpoint), AbstractVocabulary.load(checkpoint)


def prefixes(tokenizer, n: int) -> list[list[int]]:
    """Prompts, every other one with its CoT: lengths vary."""
    rows = chain_arithmetic(n, 4, 5, seed=0)
    cots = [cot_columns(row.cot, tokenizer)["cot_ids"] if i % 2 else [] for i, row in enumerate(rows)]
    return [prompt_ids(row.prompt, tokenizer) + cot for row, cot in zip(rows, cots, strict=True)]


def test_thousands_of_traces_are_legal(policy):
    model, tokenizer, vocabulary = policy
    traces = HFTraceSampler(model, tokenizer, vocabulary).sample(prefixes(tokenizer, 3000), m_max=5, m_min=2, seed=1)
    codebook = set(vocabulary.ids(tokenizer))
    assert len(traces) == 3000
    for trace in traces:
        assert set(trace.token_ids) <= codebook and 2 <= len(trace.token_ids) <= 5
        assert len(trace.logps) == len(trace.token_ids)
        assert trace.forced_end == (len(trace.token_ids) == 5)
        assert trace.end_logp == 0.0 if trace.forced_end else trace.end_logp < 0.0
    assert {len(t.token_ids) for t in traces} == {2, 3, 4, 5}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logps_equal_a_log_softmax_over_the_allowed_ids(policy, temperature):
    """Each trace scored again by one plain forward pass of its own, without padding or cache."""
    model, tokenizer, vocabulary = policy
    given = prefixes(tokenizer, 200)
    traces = HFTraceSampler(model, tokenizer, vocabulary, batch_tokens=2000).sample(
        given, m_max=5, m_min=1, temperature=temperature, seed=2
    )
    allowed = torch.tensor([*vocabulary.ids(tokenizer), vocabulary.end_id(tokenizer)])
    begin, end = vocabulary.begin_id(tokenizer), vocabulary.end_id(tokenizer)
    for prefix, trace in zip(given, traces, strict=True):
        ids = torch.tensor([[*prefix, begin, *trace.token_ids]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prefix) :].double() / temperature
        for i, token in enumerate([*trace.token_ids, end]):
            ids_here = allowed[:-1] if i == 0 else allowed  # m_min = 1 keeps END out of the first step
            logp = torch.log_softmax(logits[i, ids_here], 0)[ids_here.tolist().index(token)].item()
            found = trace.logps[i] if i < len(trace.token_ids) else trace.end_logp
            if i == 5:
                assert found == 0.0
            else:
                assert abs(found - logp) < 1e-5


def test_first_tokens_follow_the_policy(policy):
    """4,000 draws after one prefix against its probabilities: chi-square."""
    model, tokenizer, vocabulary = policy
    prefix = prefixes(tokenizer, 1)[0]
    traces = HFTraceSampler(model, tokenizer, vocabulary).sample([prefix] * 4000, m_max=1, seed=3)
    codebook, end = vocabulary.ids(tokenizer), vocabulary.end_id(tokenizer)
    with torch.no_grad():
        logits = model(torch.tensor([[*prefix, vocabulary.begin_id(tokenizer)]])).logits[0, -1]
    expected = torch.softmax(logits[torch.tensor([*codebook, end])].double(), 0).numpy()
    counts = [sum(t.token_ids == [token] for t in traces) for token in codebook]
    counts.append(sum(not t.token_ids for t in traces))
    assert sum(counts) == 4000 and counts[-1] > 0
    assert chisquare(counts, 4000 * expected).pvalue > 1e-3


def test_seeds_and_batches(policy):
    model, tokenizer, vocabulary = policy
    given = prefixes(tokenizer, 60)

    def draw(seed: int, batch_tokens: int = 32768, temperature: float = 1.0) -> list[list[int]]:
        sampler = HFTraceSampler(model, tokenizer, vocabulary, batch_tokens)
        return [t.token_ids for t in sampler.sample(given, m_max=6, temperature=temperature, seed=seed)]

    assert draw(0) == draw(0) == draw(0, batch_tokens=300)  # a row's draw does not depend on its neighbours
    assert draw(0) != draw(1)
    assert draw(0, temperature=0) == draw(1, temperature=0)


def test_generation_settings_of_the_checkpoint_do_not_leak(policy):
    model, tokenizer, vocabulary = policy
    given = prefixes(tokenizer, 40)
    sampler = HFTraceSampler(model, tokenizer, vocabulary)
    before = sampler.sample(given, m_max=6, seed=0)
    config = model.generation_config
    try:
        model.generation_config.repetition_penalty, model.generation_config.top_k = 5.0, 1
        assert sampler.sample(given, m_max=6, seed=0) == before
        assert model.generation_config is config and config.repetition_penalty == 5.0
    finally:
        model.generation_config.repetition_penalty = model.generation_config.top_k = None


def test_bad_limits_are_refused(policy):
    model, tokenizer, vocabulary = policy
    sampler = HFTraceSampler(model, tokenizer, vocabulary)
    with pytest.raises(ValueError, match="m_min=4, m_max=3"):
        sampler.sample([[3]], m_max=3, m_min=4)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        sampler.sample([[3]], m_max=3, temperature=-1)
    with pytest.raises(ValueError, match="prefix of 600 tokens leaves no room"):
        sampler.sample([[3] * 600], m_max=3)
    assert sampler.sample([], m_max=3) == []


def test_random_lengths_and_tokens(policy):
    """rand(1, l/2) a step: mean and range by hand for steps of 6 tokens; tokens uniform, or proportional to 1 / k."""
    _, tokenizer, _ = policy
    cot = "\n".join(["1+2=3;;"] * 3 + ["", "7"])  # steps of 6, 6, 6 and 1 tokens
    assert [len(tokenizer(step)["input_ids"]) for step in cot_steps(cot)] == [6, 6, 6, 1]
    rng = np.random.default_rng(1)
    traces = [uniform_trace(cot, 8, 99, rng, tokenizer) for _ in range(4000)]
    lengths = [len(t) for t in traces]
    assert min(lengths) == 4 and max(lengths) == 10 and abs(np.mean(lengths) - 7) < 0.1
    counts = np.bincount([i for t in traces for i in t], minlength=8)
    assert chisquare(counts).pvalue > 1e-3
    assert all(len(uniform_trace(cot, 8, 5, rng, tokenizer)) <= 5 for _ in range(200))
    assert uniform_trace(cot, 8, 9, random.Random(1), tokenizer) == uniform_trace(
        cot, 8, 9, random.Random(1), tokenizer
    )
    steps = [6, 6, 6, 1]
    assert random_trace("cycle", steps, 3, 4, random.Random(0)) == [0, 1, 2, 0]
    power = np.bincount([i for _ in range(4000) for i in random_trace("power_law", steps, 8, 99, rng)], minlength=8)
    weights = 1 / np.arange(1, 9)
    assert chisquare(power, power.sum() * weights / weights.sum()).pvalue > 1e-3


def test_prepared_steps_give_the_traces_of_the_text(policy):
    """A token of this tokenizer never spans a step's end, so that its steps are as long alone as in the CoT."""
    _, tokenizer, _ = policy
    for i, example in enumerate(chain_arithmetic(200, 6, 5, seed=0)):
        lengths = cot_columns(example.cot, tokenizer)["step_lengths"]
        found = random_trace("uniform", lengths, 8, 6, random.Random(i))
        assert found == uniform_trace(example.cot, 8, 6, random.Random(i), tokenizer) and lengths == [5] * 6


def test_step_ends(policy):
    _, tokenizer, _ = policy
    cot = "1+2=3;\n\n4+1=0;\n7"
    columns = cot_columns(cot, tokenizer)
    ids, ends, lengths = columns.values()
    assert ids == tokenizer(cot + "\n", add_special_tokens=False)["input_ids"] and lengths == [5, 5, 1]
    assert [tokenizer.decode(ids[end]) for end in ends] == ["\n"] * 3 and ends[-1] == len(ids) - 1
    assert tokenizer.decode(ids[: ends[1] + 1]) == "1+2=3;\n\n4+1=0;\n"


def test_trace_files(tmp_path):
    records = [{"row": 1, "id": "b", "trace": [0, 7]}, {"row": 0, "id": "a", "trace": []}]
    write_traces(tmp_path, records)
    assert read_traces(tmp_path, ["a", "b"], AbstractVocabulary(8, 0, 3)) == records
    with pytest.raises(ValueError, match="line 1: row 1 is 'b' here and 'c' in the data"):
        read_traces(tmp_path, ["a", "c"], AbstractVocabulary(8, 0, 3))
    with pytest.raises(ValueError, match="leaves the codebook of 7"):
        read_traces(tmp_path, ["a", "b"], AbstractVocabulary(7, 0, 3))
    with pytest.raises(ValueError, match="row 1 has 2 tokens, m_max is 1"):
        read_traces(tmp_path, ["a", "b"], AbstractVocabulary(8, 0, 1))
    write_traces(tmp_path, [records[0], records[0]])
    with pytest.raises(ValueError, match="line 2: row 1 stands twice"):
        read_traces(tmp_path, ["a", "b"], AbstractVocabulary(8, 0, 3))
    write_traces(tmp_path, [{"row": 1, "id": "b", "trace": ["1"]}])
    with pytest.raises(ValueError, match="line 1 is no trace record"):
        read_traces(tmp_path, ["a", "b"], AbstractVocabulary(8, 0, 3))
    write_traces(tmp_path, [])
    with pytest.raises(ValueError, match="is empty"):
        read_traces(tmp_path, ["a", "b"], AbstractVocabulary(8, 0, 3))
    write_traces(tmp_path, records)
    text = (tmp_path / "traces.jsonl").read_bytes()
    for line in (b'{"row": 1, "tra', b"\xed\xa0", b"[" * 100_000, b"9" * 5000, b'{"row": 1, "id": "b", "trace": {}}'):
        (tmp_path / "traces.jsonl").write_bytes(text + line)
        with pytest.raises(Refused, match="line 3 is no trace record"):
            read_traces(tmp_path, ["a", "b"], AbstractVocabulary(8, 0, 3))
    with pytest.raises(Refused, match="abscot traces"):
        read_traces(tmp_path / "none", [], AbstractVocabulary(8))


def test_summary_by_hand():
    summary = summarise_traces([[0, 1], [0, 1], [0], []], AbstractVocabulary(4, 1, 2))
    assert summary["share_at_m_min"] == 0.25 and summary["share_at_m_max"] == 0.5
    assert summary["token_counts"] == [3, 2, 0, 0] and summary["entropy_by_position"] == [0.0, 0.0]
    mixed = summarise_traces([[0, 1], [0, 0], [3], [2]], AbstractVocabulary(4, 0, 9))
    assert np.allclose(mixed["entropy_by_position"], [0.5 * np.log(2) + 0.5 * np.log(4), np.log(2)])
    text = describe_traces(mixed | {"dropped_too_long": 7})
    assert "4 traces, 4 distinct, 0 empty, 7 rows dropped" in text and "0.0 % at m_max 9" in text
    assert "<TOKEN_B>" in text and "<TOKEN_C>" not in describe_traces(summary | {"dropped_too_long": 7})  # not used
    assert summary["traces"] == 4 and summary["distinct"] == 3 and summary["empty"] == 1
    assert summary["lengths"] == {"0": 1, "1": 1, "2": 2} and summary["length_mean"] == 1.25
    assert (
        summary["tokens_used"] == 2 and abs(summary["token_entropy"] - -(0.6 * np.log(0.6) + 0.4 * np.log(0.4))) < 1e-9
    )


def test_batches_cover_all_rows_within_the_budget():
    lengths = np.random.default_rng(0).integers(1, 500, size=400).tolist()
    found = list(batches(lengths, 2000))
    assert sorted(i for batch in found for i in batch) == list(range(400))
    assert all(len(b) * max(lengths[i] for i in b) <= 2000 for b in found)
    assert list(batches([5000, 10], 2000)) == [[0], [1]]
