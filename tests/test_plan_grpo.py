"""What the plan says of GRPO: counts against a real run's, hours by the phases' arithmetic, and what it leaves out."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from grpo_runs import RECIPE, recipe, run
from safetensors.torch import load_file
from test_plan import config_of
from warmups import LORA, recipes

from abscot_trl.data.prepare import load_prepared, row_lengths
from abscot_trl.loop.duration import GPUS, batch_seconds
from abscot_trl.loop.memory import shape_of
from abscot_trl.loop.plan import PlanArguments, describe_plan, plan
from abscot_trl.training.resume import LOG_FILE


@pytest.fixture
def planned(toy, tmp_path):
    """The plan of a warm-up whose GRPO has these fields: its line, the words on it, and the table."""

    def of(asked=None, **fields):
        arguments = toy | recipes(tmp_path, "", LORA) | {"evaluate": None, "rounds": 1}
        arguments |= {"grpo": recipe(tmp_path, **fields), "gpu": "h100"} | (asked or {})
        found = plan(PlanArguments(**arguments))
        (words,) = (words for words in found["warnings"] if words.startswith("grpo/train: "))
        return next(line for line in found["stages"] if line["name"] == "grpo/train"), words, describe_plan(found)

    return of


def test_counts_are_those_of_a_run(planned, checkpoint, toy, tmp_path):
    """Steps, completions a step, parameters; tokens by the warm-up's rows, which its rollouts need not be like."""
    fields = {"global_batch_size": 16, "max_steps": 2, "save_strategy": "no", **LORA}
    line, words, table = planned(**fields)
    run(checkpoint, tmp_path, tmp_path / "out", **fields)
    log = json.loads((tmp_path / "out" / LOG_FILE).read_text())
    steps = [entry for entry in log["log"] if "loss" in entry]
    assert line["steps"] == log["steps"] == 2
    drawn = sum(steps[0]["codebook_counts"]) / steps[0]["trace/length"]
    assert f"a step draws {drawn:.0f} completions" in words
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors").values()
    assert line["stays"] == sum(weight.nbytes for weight in weights) == 4 * line["trained"]
    lengths = row_lengths(load_prepared(Path(toy["data"]))[0])
    room = RECIPE["max_completion_length"] - 7  # m_max 6, and the end
    row = np.mean(lengths["prompt"]) + 1 + np.mean(np.minimum(lengths["cot"] // 2, 6)) + 1
    row += np.mean(np.minimum(lengths["answer"], room))
    assert line["tokens"] == pytest.approx(2 * 16 * row)
    assert "| grpo/train |  | 2 |" in table and "their speed is not known here" in table


def test_hours_are_those_of_scoring_and_update(planned):
    """More with every reading of the rollouts, less where one serves several steps; none of an unknown card."""
    line, words, _ = planned(beta=0.0)
    update = line["hours"]
    assert ", 0 s of scoring" in words and "memory" not in line
    once, twice = planned(beta=0.1)[0]["hours"], planned(beta=0.1, num_iterations=2)[0]["hours"]
    assert update < once < 2 * update  # forward alone is less than forward and backward
    assert twice == pytest.approx(once)  # scored by two, of half as many rollouts
    assert planned(use_vllm=True)[0]["hours"] - update == pytest.approx(2 * (once - update))
    assert planned(max_steps=8, beta=0.0)[0]["hours"] == pytest.approx(2 * update)


def test_what_is_not_known_is_left_out(planned):
    line, words, table = planned(max_steps=-1)
    assert not {"steps", "tokens", "hours", "rows"} & {*line} and line["disk"] > 0
    assert "without max_steps neither are its steps" in words and "| grpo/train |  |  |  |" in table


def test_a_forward_pass_is_part_of_a_batch(tmp_path):
    shape, card = shape_of(config_of("4b", tmp_path)), GPUS["h100"]
    for fields in ({"use_peft": True}, {}, {"gradient_checkpointing": False}):
        whole, forward = (batch_seconds(shape, fields, 8192, 1024, card, forward=f) for f in (False, True))
        assert 0.15 * whole < forward < 0.5 * whole


def test_the_recipes_plan(tmp_path, monkeypatch):
    """Qwen3-4B after its warm-up, as shipped: nothing is asked of the disk or the net."""
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    fields = yaml.safe_load(Path("recipes/qwen3-4b/warmup.informed.yaml").read_text())
    fields |= {"grpo": "recipes/qwen3-4b/grpo.{tuning}.yaml", "run_dir": str(tmp_path / "run"), "gpu": "h100"}
    found = plan(PlanArguments(**fields, model_config=config_of("4b", tmp_path) + "/config.json"))
    (line,) = (line for line in found["stages"] if line["name"] == "grpo/train")
    (words,) = (words for words in found["warnings"] if words.startswith("grpo/train: "))
    assert line["steps"] == 500 and "draws 256 completions, about 183 thousand tokens" in words
    assert line["hours"] > 1
