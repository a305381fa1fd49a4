"""A stage and its process: started from a configuration file, and ended when its driver is."""

import sys
from pathlib import Path

from abscot_trl.cli import accelerate_config_path
from abscot_trl.errors import Refused
from abscot_trl.loop.arguments import DriverOptions
from abscot_trl.loop.stages import Stage
from abscot_trl.phases import TRAINING, read_yaml, run_phase
from abscot_trl.processes import run
from abscot_trl.training.steps import accumulation_of


def launcher_of(options: DriverOptions) -> dict:
    """
    The accelerate configuration, with the options' `num_processes` where they have one; empty without one.

    Raises:
        Refused: no such file or name, or no such configuration; processes that it would not start.
    """
    given = options.num_processes
    if given is not None and (options.accelerate_config is None or options.launch == "inline"):
        raise Refused(f"num_processes {given} goes with an accelerate_config, such as ddp, and launch: accelerate")
    if options.accelerate_config is None:
        return {}
    path = accelerate_config_path(options.accelerate_config, given)
    config = read_yaml(path) | ({} if given is None else {"num_processes": given})
    processes = config.get("num_processes", 1)
    if type(processes) is not int or processes < 1:
        raise Refused(f"{path}: num_processes: {processes!r:.80} is no number of processes")
    deepspeed = config.get("deepspeed_config", {})
    if not isinstance(deepspeed, dict):
        raise Refused(f"{path}: deepspeed_config: {deepspeed!r:.80} is no mapping")
    stage = deepspeed.get("zero_stage", 2)
    if type(stage) is not int or stage not in range(4):
        raise Refused(f"{path}: deepspeed_config: zero_stage: {stage!r:.80} is none of 0, 1, 2, 3")
    return config


def check_launch(todo: list[Stage], options: DriverOptions) -> None:
    """
    Raises:
        Refused: as `launcher_of`; or a recipe's `global_batch_size` cannot be shared by that many processes.
    """
    processes = launcher_of(options).get("num_processes", 1)
    if options.launch == "inline":
        return
    for stage in (stage for stage in todo if stage.phase in TRAINING):
        try:
            accumulation_of(stage.settings, processes)
        except Refused as error:
            raise Refused(f"{stage.name}: {error}") from None


def launch(stage: Stage, config: Path, options: DriverOptions) -> None:
    """
    Run a stage from its configuration file.

    Raises:
        Refused: the stage's process failed.
    """
    if options.launch == "inline":
        run_phase(stage.phase, ["--config", str(config)])
        return
    module = ["-m", f"abscot_trl.scripts.{stage.phase}", "--config", str(config)]
    command = [sys.executable, *module]
    if stage.phase in TRAINING and options.accelerate_config:
        accelerate = ["--accelerate_config", options.accelerate_config]
        if options.num_processes is not None:
            accelerate += ["--num_processes", str(options.num_processes)]
        command = [sys.executable, "-m", "abscot_trl.cli", stage.phase, *accelerate, "--config", str(config)]
    code = run(command)
    if code:
        raise Refused(
            f"stage {stage.name} failed with exit code {code} (its settings: {config}); mend its recipe and run the "
            "same command again to continue from it"
        )
