"""The codebook's analysis against samples whose truth is known, and against scikit-learn."""

import json

import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

from abscot_trl.report.codebook import analyse, design_effect, fit_zipf, mutual_information
from abscot_trl.report.runs import over_training
from abscot_trl.traces.files import summarise_traces
from abscot_trl.vocabulary import AbstractVocabulary


def zipf(size, exponent):
    p = np.arange(1.0, size + 1) ** -exponent
    return p / p.sum()


@pytest.mark.parametrize(("size", "tokens", "exponent"), [(64, 2000, 1.0), (32, 1000, 0.4), (8, 6000, 0.3)])
def test_exponent_is_unbiased_and_its_interval_covers(size, tokens, exponent):
    rng, trials = np.random.default_rng(7), 60
    draws = rng.permuted(rng.multinomial(tokens, zipf(size, exponent), size=trials), axis=1)
    fits = [fit_zipf(counts, draws=60, seed=i) for i, counts in enumerate(draws)]
    found, intervals = np.array([fit["exponent"] for fit in fits]), np.array([fit["interval"] for fit in fits])
    assert abs(found.mean() - exponent) < 4 * found.std() / trials**0.5 + 0.002
    covered = ((intervals[:, 0] <= exponent) & (exponent <= intervals[:, 1])).mean()
    assert 0.86 <= covered <= 1.0 and 2.5 < (intervals[:, 1] - intervals[:, 0]).mean() / found.std() < 6


def test_uniform_tokens_are_no_power_law():
    """Ranks from the counts themselves make plain maximum likelihood find a slope in noise; the fit does not."""
    rng = np.random.default_rng(0)
    fits = [fit_zipf(rng.multinomial(1000, zipf(64, 0.0)), draws=60) for _ in range(20)]
    assert np.mean([fit["uncorrected"] for fit in fits]) > 0.2
    assert np.mean([fit["interval"][0] <= 1e-9 for fit in fits]) > 0.85
    assert fit_zipf(np.array([5, 0, 0])) is None


def test_traces_are_the_units():
    """Tokens that repeat within a trace tell less: the interval is that of as many tokens as traces."""
    rng = np.random.default_rng(3)
    once = rng.choice(64, size=(400, 1), p=zipf(64, 1.0))
    traces = np.repeat(once, 10, axis=1).tolist()
    counts = np.bincount(np.ravel(traces), minlength=64)
    assert design_effect(traces, counts) == pytest.approx(10, rel=1e-6)
    independent = rng.choice(64, size=(400, 10), p=zipf(64, 1.0)).tolist()
    assert 1 <= design_effect(independent, np.bincount(np.ravel(independent), minlength=64)) < 1.3
    few, many = fit_zipf(counts / 10), fit_zipf(counts, 10)
    assert many["interval"] == pytest.approx(few["interval"], abs=0.02) and many["tokens"] == 4000


def test_information_on_known_data():
    rng = np.random.default_rng(1)
    gold = rng.integers(5, size=800).astype(str).tolist()
    nothing = mutual_information(rng.integers(16, size=800).tolist(), gold)
    assert 0.5 * nothing["baseline"] < nothing["information"] < 1.5 * nothing["baseline"] and nothing["p"] > 0.02
    assert nothing["baseline"] == pytest.approx(15 * 4 / (2 * 800), rel=0.2)  # the plug-in's bias, to first order
    everything = mutual_information([int(g) * 3 for g in gold], gold)
    assert everything["information"] == pytest.approx(mutual_info_score(gold, gold)) and everything["p"] < 0.02
    # A symmetric channel over 4 letters that keeps one in 1 - e: ln 4 - H(e) - e ln 3.
    first, noise = rng.integers(4, size=40_000), rng.random(40_000) < 0.3
    second = np.where(noise, (first + rng.integers(1, 4, size=40_000)) % 4, first)
    truth = np.log(4) + 0.7 * np.log(0.7) + 0.3 * np.log(0.3) - 0.3 * np.log(3)
    found = mutual_information(first.tolist(), second.tolist(), permutations=5)
    assert found["information"] == pytest.approx(truth, abs=0.01)
    for a, b in ((first[:500], second[:500]), (rng.integers(300, size=500), rng.integers(400, size=500))):
        assert mutual_information(a.tolist(), b.tolist(), 1)["information"] == pytest.approx(mutual_info_score(a, b))
    with pytest.raises(ValueError, match="needs pairs"):
        mutual_information([], [])


def test_analysis_of_traces():
    """Traces of 2 or 3 tokens whose second token is the answer."""
    rng, vocabulary = np.random.default_rng(2), AbstractVocabulary(16, 2, 3)
    gold = rng.integers(4, size=600)
    traces = [[int(rng.integers(16)), 4 + int(g), *[15] * (i % 2)] for i, g in enumerate(gold)]
    found = analyse(traces, gold.astype(str).tolist(), vocabulary)
    first, second, third = found["positions"]
    assert second["information"] == pytest.approx(found["gold_entropy"]) and second["p"] < 0.02
    assert first["information"] < 2 * first["baseline"] and third["information"] == 0 and third["n"] == 300
    assert found["golds"] == 4 and found["share_at_m_min"] == 0.5 and found["traces"] == 600
    assert found["whole"]["information"] == pytest.approx(found["gold_entropy"]) and found["distinct"] < 600
    unique = [[i // 16, i % 16] for i in range(200)]
    assert analyse(unique, gold[:200].tolist(), vocabulary)["whole"] is None


def test_over_training(tmp_path):
    assert over_training(tmp_path) == []
    for t in (10, 2):
        for phase in ("distill", "bottleneck"):
            folder = tmp_path / f"round{t}" / f"{phase}-traces"
            folder.mkdir(parents=True)
            (folder / "summary.json").write_text(json.dumps(summarise_traces([[t]], AbstractVocabulary(16))))
    stages = [f"round{t}/{phase}-traces" for t in (2, 10) for phase in ("bottleneck", "distill")]
    assert [summary["stage"] for summary in over_training(tmp_path)] == stages
