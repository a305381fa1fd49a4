"""`abscot grpo` as a user runs it, alone and after a warm-up."""

import json
import math
import re
from pathlib import Path

import kill_grpo
import pytest
import yaml
from grpo_runs import RECIPE, recipe, run
from warmups import recipes, toy_fields

from abscot_trl.checkpoint import verify_checkpoint
from abscot_trl.errors import Refused
from abscot_trl.evaluation.results import read_results
from abscot_trl.loop.sweep import SweepArguments, sweep
from abscot_trl.loop.warmup import WarmupArguments, warmup
from abscot_trl.report.make import ReportArguments, report
from abscot_trl.report.runs import read_losses
from abscot_trl.training.resume import LOG_FILE, SealCheckpoints

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]}


def log(output: Path) -> list[dict]:
    clock = ("step_time", "epoch", "time/")
    entries = json.loads((output / LOG_FILE).read_text())["log"]
    return [{key: value for key, value in entry.items() if not key.startswith(clock)} for entry in entries]


def test_a_checkpoint_and_a_log(checkpoint, tmp_path):
    run(checkpoint, tmp_path, tmp_path / "out")
    verify_checkpoint(tmp_path / "out")
    found = json.loads((tmp_path / "out" / LOG_FILE).read_text())
    assert found["steps"] == 4 and found["rows"]["rows"] == 20 and found["rows"]["held_out"] == 4
    before, first, *_ = found["log"]
    assert before["step"] == 0 and {"probe/own", "probe/random"} <= {*before}
    assert first["kl"] == 0.0 and sum(first["codebook_counts"]) == pytest.approx(8 * first["trace/length"])
    assert first["rewards/trace_length/mean"] == pytest.approx(-first["trace/length"] / 6)
    assert {"trace/forced_end", "answer/length"} <= {*first}
    assert 0 < first["trace/entropy"] < math.log(9)
    (rollout, *_) = first["rollouts"]
    assert rollout["trace"].startswith("<TOKEN_") and {*rollout["rewards"]} == {"accuracy", "trace_length"}


@pytest.mark.parametrize("fields", [{}, {"max_steps": 20}, {"num_iterations": 2, "max_steps": 8}, {"max_steps": -1}])
def test_it_says_how_often_a_prompt_is_drawn(checkpoint, tmp_path, capsys, fields):
    """Held against transformers' own count of passes."""
    off = {"probe_steps": 100, "save_strategy": "no", "num_train_epochs": 2}
    run(checkpoint, tmp_path, tmp_path / "out", **off | fields)
    (times,) = re.findall(r"^20 prompts, each drawn (\S+) times(?:$|: .* by heart)", capsys.readouterr().out, re.M)
    last = json.loads((tmp_path / "out" / LOG_FILE).read_text())["log"][-1]
    assert float(times) == pytest.approx(last["epoch"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3])
def test_killed_after_a_checkpoint_it_ends_in_the_same_log(checkpoint, tmp_path, monkeypatch, step):
    run(checkpoint, tmp_path, tmp_path / "whole")
    sealed = SealCheckpoints.on_save

    def dying(self, args, state, *rest, **kwargs):
        sealed(self, args, state, *rest, **kwargs)
        if state.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(SealCheckpoints, "on_save", dying)
        run(checkpoint, tmp_path, tmp_path / "killed")
    with pytest.raises(Refused, match="resume_from_checkpoint true"):
        run(checkpoint, tmp_path, tmp_path / "killed")
    run(checkpoint, tmp_path, tmp_path / "killed", "--resume_from_checkpoint", "true")
    assert log(tmp_path / "killed") == log(tmp_path / "whole")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path):
    assert kill_grpo.main(tmp_path, kills=2) == 2


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"prompt_rows": 5}, "3 are left to train on, and one generation takes 4"),
        ({"rewards": ["nothing.here:mine"]}, "nothing.here:mine' cannot be imported"),
        ({"max_prompt_tokens": 1}, "too_long"),
    ],
)
def test_refused_before_a_model_is_loaded(checkpoint, tmp_path, fields, words):
    batch = {"per_device_train_batch_size": 16} if "prompt_rows" in fields else {}
    with pytest.raises(Refused, match=words):
        run(checkpoint, tmp_path, tmp_path / "out", **fields | batch)


@pytest.mark.slow
def test_after_a_warmup_by_one_command(checkpoint, tmp_path):
    fields = toy_fields(checkpoint, tmp_path) | {"rounds": 1, "tuning": "lora"}
    fields |= recipes(tmp_path, str(tmp_path / "test.jsonl"))
    fields["grpo"] = recipe(tmp_path, **LORA).replace("grpo.yaml", "grpo.{tuning}.yaml")
    (tmp_path / "grpo.yaml").rename(tmp_path / "grpo.lora.yaml")
    for wrong, words in (({"prompts": ["nowhere.jsonl"]}, "nowhere"), ({"rewards": ["judge"]}, "needs judge_url")):
        prompts = {"prompts": [str(tmp_path / "prompts.jsonl")]}
        (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(RECIPE | prompts | wrong))
        with pytest.raises(Refused, match=f"wrong.yaml: .*{words}"):
            warmup(WarmupArguments(**fields | {"grpo": str(tmp_path / "wrong.yaml")}))
    rows = warmup(WarmupArguments(**fields))
    found = [row for row in rows if row["model"] == "informed-grpo"]
    assert found and "round" not in found[0] and any(row["model"] == "informed" for row in rows)
    run = Path(fields["run_dir"])
    assert read_results(run / "results.json") == rows
    verify_checkpoint(run / "grpo" / "train-merged")
    card = (run / "grpo" / "train-merged" / "README.md").read_text()
    assert all(words in card for words in ("AbstractGRPOTrainer", "| informed-grpo ", "20 prompts (grpo/train)"))
    assert next(entry["kl"] for entry in log(run / "grpo" / "train") if "kl" in entry) == 0.0
    rewards, kept = (
        [entry["reward"] for entry in entries if "reward" in entry]
        for entries in (log(run / "grpo" / "train"), read_losses(run)["grpo/train"])
    )
    assert rewards == kept and len(rewards) == 4
    swept = sweep(SweepArguments(str(run), fields["evaluate"], stages=["base", "grpo/train"], launch="inline"))
    assert [(row["model"], row.get("round")) for row in swept] == [("base", 0)] * 2 + [("run-grpo", None)] * 2
    text = report(ReportArguments([str(run)])).read_text()
    assert "grpo/train: 4 steps, reward from" in text and "run-grpo grpo/train" in text and "max_steps 4" in text
