"""The command line, as a user meets it: help, mistakes, exit codes; and every recipe in the repository."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers.integrations import HfDeepSpeedConfig
from trl import ModelConfig

from abscot_trl import cli
from abscot_trl.errors import Refused
from abscot_trl.evaluation.alpaca import AlpacaArguments
from abscot_trl.loop.baselines import BaselinesArguments
from abscot_trl.loop.plan import PlanArguments
from abscot_trl.loop.sweep import SweepArguments
from abscot_trl.loop.warmup import WarmupArguments
from abscot_trl.phases import PHASES, parse
from abscot_trl.report.make import ReportArguments
from abscot_trl.scripts.demo import DemoArguments
from abscot_trl.training.adapters import lora_config

ROOT = Path(__file__).resolve().parents[1]
CLASSES = {name: classes for name, (_, classes) in PHASES.items()}
CLASSES |= {
    "alpaca": (AlpacaArguments,),
    "plan": (PlanArguments,),
    "sweep": (SweepArguments,),
    "warmup": (WarmupArguments,),
    "baselines": (BaselinesArguments,),
    "report": (ReportArguments,),
    "demo": (DemoArguments,),
}


def abscot(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "abscot_trl.cli", *arguments], capture_output=True, text=True, cwd=ROOT
    )


def test_every_phase_has_a_script_and_help(capsys):
    assert set(cli.PHASES) == set(CLASSES)
    for name, classes in CLASSES.items():
        assert (ROOT / "abscot_trl" / "scripts" / f"{name}.py").is_file()
        with pytest.raises(SystemExit) as exit:
            parse(classes, ["--help"])
        assert exit.value.code == 0
    assert "--rehearsal" in capsys.readouterr().out
    shown = abscot("--help")
    assert shown.returncode == 0 and all(name in shown.stdout for name in cli.PHASES)
    assert abscot().returncode == 2


def test_mistakes_exit_1_with_one_line(tmp_path):
    recipe = tmp_path / "init.yaml"
    recipe.write_text(f"base_model: {tmp_path}\ncodebok_size: 8\noutput_dir: {tmp_path / 'out'}\n")
    done = abscot("init", "--config", str(recipe))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"abscot init: {recipe}: unknown key 'codebok_size'; did you mean 'codebook_size'?"
    )
    recipe.write_text(f"base_model: {tmp_path}\nm_min: 9\nm_max: 8\noutput_dir: {tmp_path / 'out'}\n")
    done = abscot("init", f"--config={recipe}")
    assert done.returncode == 1 and "0 <= m_min <= m_max" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    done = abscot("plan", "--gpu", "b200")
    assert done.returncode == 1 and "usage:" not in done.stderr
    assert "invalid choice: 'b200'" in done.stderr.splitlines()[-1]
    unknown = abscot("tarces")
    assert unknown.returncode == 1 and "no phase 'tarces'" in unknown.stderr


def test_accelerate_configurations():
    for path in sorted((ROOT / "accelerate_configs").glob("*.yaml")):
        assert cli.accelerate_config_path(path.stem) == str(path)
        assert {"distributed_type", "num_processes", "mixed_precision"} <= yaml.safe_load(path.read_text()).keys()
    with pytest.raises(Refused, match="'zero4' is neither a file nor one of cpu, ddp"):
        cli.accelerate_config_path("zero4")
    done = abscot("bottleneck", "--accelerate_config", "zero4", "--config", "x.yaml")
    assert done.returncode == 1 and "zero4" in done.stderr


def test_lora_is_refused_under_zero3(checkpoint):
    arguments = ModelConfig(model_name_or_path=str(checkpoint), use_peft=True)
    assert lora_config(arguments, [41]).trainable_token_indices == {"embed_tokens": [41]}
    zero3 = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # as a launched run sets it
    with pytest.raises(ValueError, match="does not work under DeepSpeed ZeRO-3.*zero2"):
        lora_config(arguments, [41])
    del zero3
