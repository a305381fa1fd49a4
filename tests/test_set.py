"""Fields of the phases from a run's command line: what they reach, and what is refused."""

import json
from pathlib import Path

import pytest
from warmups import recipes

from abscot_trl.errors import Refused
from abscot_trl.loop.plan import PlanArguments, plan
from abscot_trl.loop.warmup import WarmupArguments, stages, warmup
from abscot_trl.phases import parse_phase

ROOT = Path(__file__).resolve().parents[1]
WARMUP = ["--config", "recipes/qwen3-4b/warmup.informed.yaml"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def settings(*words: str, config: tuple = tuple(WARMUP)) -> dict[str, dict]:
    (args,) = parse_phase("warmup", [*config, *words])
    return {stage.phase: stage.settings for stage in stages(args)}


def test_a_field_reaches_its_phase_and_no_other(tmp_path):
    (tmp_path / "more.yaml").write_text("set: [distill.max_length=1024, evaluate.limit=9]\n")
    words = ["--set", "bottleneck.max_length=4096", "distill.learning_rate=2e-5", "--set", "distill.max_length=2048"]
    plain, found = settings(), settings(*words, config=(*WARMUP, "--config", str(tmp_path / "more.yaml")))
    for phase in ("bottleneck", "distill", "evaluate"):
        changed = {key: value for key, value in found[phase].items() if plain[phase].get(key) != value}
        assert (
            changed
            == {
                "bottleneck": {"max_length": 4096},
                "distill": {"learning_rate": 2e-5, "max_length": 2048},  # the command line's comes last
                "evaluate": {"limit": 9},
            }[phase]
        )
    assert settings("--set", "bottleneck.lora_target_modules=[q_proj]")["bottleneck"]["lora_target_modules"] == [
        "q_proj"
    ]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("botleneck.max_length=1", "no recipe of 'botleneck'; it has bottleneck, distill, evaluate"),
        ("grpo.max_steps=1", "no recipe of 'grpo'; it has bottleneck, distill, evaluate"),
        ("distill.max_lenght=1", r"did you mean 'max_length'\?\); its recipe sets dtype, .*max_length"),
        ("max_length=1", "is not of the form phase.field=value"),
        ("distill.max_length", "is not of the form phase.field=value"),
        ("distill.max_length=long", "'long' does not fit; int"),
        ("distill.report_to=[", "is not valid YAML"),
        ("evaluate.backend=tgi", "'tgi' is not one of hf, vllm, server"),
        ("distill.seed=1", "the run sets seed of distill itself"),
        ("bottleneck.output_dir=x", "the run sets output_dir of bottleneck itself"),
    ],
)
def test_what_does_not_fit_is_refused(word, expected):
    with pytest.raises(Refused, match=expected):
        settings("--set", word)


def test_a_phases_field_given_to_the_run_is_told_its_place():
    with pytest.raises(Refused, match=r"--set bottleneck.use_cpu=true distill.use_cpu=true; .*new --hardware cpu"):
        settings("--use_cpu", "true")
    with pytest.raises(Refused, match="--set evaluate.max_new_tokens=99$"):
        settings("--max_new_tokens=99")


def test_a_plan_sees_it_and_a_run_that_goes_on_compares_it(toy, tmp_path):
    fields = toy | recipes(tmp_path, str(tmp_path / "test.jsonl")) | {"rounds": 1, "until": "round1/bottleneck"}
    told = {"set": ["bottleneck.max_steps=3"]}
    steps = {line["name"]: line["steps"] for line in plan(PlanArguments(**fields | told))["stages"] if "steps" in line}
    assert steps == {"round1/bottleneck": 3, "round1/distill": 2}
    warmup(WarmupArguments(**fields | told))
    log = json.loads((tmp_path / "run/round1/bottleneck/training_log.json").read_text())
    assert log["steps"] == 3
    with pytest.raises(Refused, match="max_steps: 3 -> 2"):
        warmup(WarmupArguments(**fields))
