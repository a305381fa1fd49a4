"""How training is launched: by a command, by a driver's stage, by how many processes."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from abscot_trl import cli
from abscot_trl.errors import Refused
from abscot_trl.loop import launch as stage_launch
from abscot_trl.loop.arguments import DriverOptions
from abscot_trl.loop.stages import Stage
from abscot_trl.processes import DRIVER

ROOT = Path(__file__).resolve().parents[1]


def test_a_training_phase_is_launched_as_the_command_line_says(monkeypatch):
    """The last of each: make gives its own before ARGS."""
    launched = []
    monkeypatch.setenv(DRIVER, "1")  # as the command line sets it
    monkeypatch.setattr("accelerate.commands.launch.main", lambda: launched.append(sys.argv) or sys.exit(0))
    module = ["-m", "abscot_trl.scripts.bottleneck"]
    for given, expected in {
        "--accelerate_config single --data d": ["single", *module, "--data", "d"],
        "--data d --accelerate_config=zero2 --lr -1": ["zero2", *module, "--data", "d", "--lr", "-1"],
        "--accelerate_config ddp --num_processes 4 -h": ["ddp", "--num_processes", "4", *module, "-h"],
        "--num_processes=8 --accelerate_config single --accelerate_config ddp --num_processes 1": [
            "ddp",
            "--num_processes",
            "1",
            *module,
        ],
    }.items():
        monkeypatch.setattr(sys, "argv", ["abscot", "bottleneck", *given.split()])
        with pytest.raises(SystemExit):
            cli.main()
        config = str(ROOT / "accelerate_configs" / f"{expected[0]}.yaml")
        assert launched.pop() == ["accelerate", "--config_file", config, *expected[1:]]


def test_a_training_stage_is_started_as_its_options_say(monkeypatch):
    """Without a configuration in one process; accelerate by itself would take every card, and a default of its own."""
    started, module = [], ["-m", "abscot_trl.scripts.bottleneck", "--config", "x.yaml"]
    monkeypatch.setattr(stage_launch, "run", lambda command: started.append(command[1:]) or 0)
    stage = Stage("round1/bottleneck", "bottleneck", {"output_dir": "x"})
    ddp = ["-m", "abscot_trl.cli", "bottleneck", "--accelerate_config", "ddp"]
    for options, expected in (
        (DriverOptions(), module),
        (DriverOptions(accelerate_config="ddp"), [*ddp, "--config", "x.yaml"]),
        (
            DriverOptions(accelerate_config="ddp", num_processes=4),
            [*ddp, "--num_processes", "4", "--config", "x.yaml"],
        ),
    ):
        stage_launch.launch(stage, Path("x.yaml"), options)
        assert started.pop() == expected
    stage_launch.launch(Stage("round1/evaluate", "evaluate", {}), Path("x.yaml"), options)
    assert started.pop() == ["-m", "abscot_trl.scripts.evaluate", "--config", "x.yaml"]
    monkeypatch.setattr(stage_launch, "run", lambda command: 3)
    with pytest.raises(Refused, match="stage round1/bottleneck failed with exit code 3 .*run the same command again"):
        stage_launch.launch(stage, Path("x.yaml"), options)


def test_num_processes_wins_over_the_configuration_and_must_share_the_batch():
    options = DriverOptions(accelerate_config="ddp", num_processes=4)
    assert stage_launch.launcher_of(options)["num_processes"] == 4
    assert stage_launch.launcher_of(replace(options, num_processes=None))["num_processes"] == 2
    todo = [Stage("r/bottleneck", "bottleneck", {"global_batch_size": 16, "per_device_train_batch_size": 2})]
    stage_launch.check_launch(todo, options)
    words = "r/bottleneck: global_batch_size 16 is no multiple of per_device_train_batch_size 2 x 3 processes = 6"
    with pytest.raises(Refused, match=words):
        stage_launch.check_launch(todo, replace(options, num_processes=3))
    stage_launch.check_launch(todo, replace(options, num_processes=None, launch="inline"))


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"per_device_train_batch_size": 0, "global_batch_size": 8}, "must be at least 1, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0"),
        ({"gradient_accumulation_steps": 2, "global_batch_size": 8}, "leave one of the two out"),
    ],
)
def test_batches_that_cannot_be_are_refused_before_the_traces_are_made(recipe, words):
    """They came to light with the first training stage, hours later."""
    with pytest.raises(Refused, match=f"round1/distill: .*{words}"):
        stage_launch.check_launch([Stage("round1/distill", "distill", recipe)], DriverOptions())
