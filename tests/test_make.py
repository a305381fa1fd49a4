"""What `make` runs: the recipe's own values unless the user names others."""

import shlex
import subprocess
from functools import cache
from pathlib import Path

import pytest

from abscot_trl.phases import parse_phase, read_yaml
from abscot_trl.training.configs import BASELINES

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = sorted({path.parent for path in (ROOT / "recipes").rglob("warmup.*.yaml") if "tuning" in read_yaml(path)})
OTHER = {"lora": ("full", "zero3"), "full": ("lora", "single")}
ON_CPU = ["--use_cpu", "true", "--bf16", "false", "--use_liger_kernel", "false", "--attn_implementation", "sdpa"]
GIVEN = ["--model_name_or_path", "m", "--data", "d", "--output_dir", "o"]


def printed(target: str, *variables: str) -> list[str]:
    """The words of the last command of `make target`, after `abscot`."""
    command = ["make", "--dry-run", "--no-print-directory", target, *variables]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.replace("\\\n", " ").splitlines()[-1])[1:]


@cache
def parsed(phase: str, *words: str):
    return parse_phase(phase, list(words))[0]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("RECIPE", "METHOD", "TUNING", "ACCELERATE", "RUN", "ARGS", "NAME", "BENCHMARK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_make_runs_what_the_recipe_says(folder):
    recipe = str(folder.relative_to(ROOT / "recipes"))
    methods = [name for name in ("informed", "paper") if (folder / f"warmup.{name}.yaml").is_file()]

    def made(target: str, *variables: str) -> list[str]:
        phase, *words = printed(target, f"RECIPE={recipe}", *variables)
        assert phase == target
        return words

    def warm(*variables: str):
        words = made("warmup", *variables)
        assert "RUN=mine" in variables or made("plan", *variables) == words  # plan writes nothing
        return parsed("warmup", *words)

    for given, method in ((), methods[0]), *(((f"METHOD={name}",), name) for name in methods):
        own = parsed("warmup", "--config", f"recipes/{recipe}/warmup.{method}.yaml")
        assert warm(*given) == own  # every field
        assert warm(*given, f"TUNING={own.tuning}") == own  # what it says already
        assert warm(*given, "RUN=mine").run_dir == f"runs/{recipe}/mine"
        assert made("traces", *given) == ["--config", f"recipes/{recipe}/traces.{method}.yaml"]
        assert made("sweep", *given)[:2] == ["--run", own.run_dir]
        assert made("sweep", *given, "RUN=mine")[:2] == ["--run", f"runs/{recipe}/mine"]
        other, launcher = OTHER[own.tuning]
        for variables, tuning, config in (
            ((), own.tuning, own.accelerate_config),
            ((f"TUNING={other}",), other, launcher),
            (("ACCELERATE=zero2",), own.tuning, "zero2"),
            ((f"TUNING={other}", "ACCELERATE=fsdp2"), other, "fsdp2"),
        ):
            found = warm(*given, *variables)
            assert (found.tuning, found.accelerate_config) == (tuning, config)
            for phase in ("bottleneck", "distill"):
                path = f"recipes/{recipe}/{phase}.{tuning}.yaml"
                assert made(phase, *given, *variables) == ["--config", path, "--accelerate_config", config]
            words = made("baseline", *given, *variables, "NAME=cot")
            assert words[:2] == ["--config", f"recipes/{recipe}/bottleneck.{tuning}.yaml"]
            assert words[2:] == ["--config", "recipes/baselines/baseline.cot.yaml", "--accelerate_config", config]
            if (folder / "baselines.yaml").is_file():
                args = parsed("baselines", *made("baselines", *given, *variables))
                assert (args.tuning, args.accelerate_config, args.warmup) == (tuning, config, own.run_dir)
                assert args.run_dir == f"{own.run_dir}-baselines"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_each_phase_by_make_parses(folder):
    recipe = f"RECIPE={folder.relative_to(ROOT / 'recipes')}"
    for phase in ("init", "data", "evaluate", "concise"):
        if (folder / f"{phase}.yaml").is_file():
            more = ["--model", "m", "--output_dir", "o"] if phase == "evaluate" else []
            assert printed(phase, recipe)[1:] == ["--config", f"recipes/{recipe[7:]}/{phase}.yaml"]
            parse_phase(phase, printed(phase, recipe)[1:] + more)
    for phase in ("bottleneck", "distill", *(f"baseline NAME={name}" for name in BASELINES)):
        phase, *name = phase.split()
        words = printed(phase, recipe, *name)[1:]
        at = words.index("--accelerate_config")
        words = words[:at] + words[at + 2 :] + ON_CPU + GIVEN
        _, training, model = parse_phase(phase, words + (["--traces", "t"] if phase != "baseline" else []))
        assert model.use_peft == (read_yaml(next(folder.glob("warmup.*")))["tuning"] == "lora")


def test_the_two_recipes_that_lost_their_values():
    """Full fine-tuning became LoRA on one card, and a run of two cards one of one."""
    assert printed("warmup", "RECIPE=qwen3-8b") == ["warmup", "--config", "recipes/qwen3-8b/warmup.informed.yaml"]
    words = printed("warmup", "RECIPE=qwen3-4b/production")
    assert words == ["warmup", "--config", "recipes/qwen3-4b/production/warmup.paper.yaml"]
    assert printed("bottleneck", "RECIPE=qwen3-4b/production")[-2:] == ["--accelerate_config", "ddp"]


def test_a_recipe_without_tunings_or_launcher():
    assert printed("bottleneck", "RECIPE=demo") == ["bottleneck", "--config", "recipes/demo/bottleneck.yaml"]
    assert printed("warmup", "RECIPE=demo", "METHOD=paper") == ["warmup", "--config", "recipes/demo/warmup.paper.yaml"]
    small = ["--config", "recipes/smollm2-135m/bottleneck.yaml"]
    assert printed("bottleneck", "RECIPE=smollm2-135m") == ["bottleneck", *small, "--accelerate_config", "single"]
