"""A stage and its process: started from a configuration file, and ended when its driver is."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import yaml

from abscot_trl.cli import accelerate_config_path
from abscot_trl.errors import Refused
from abscot_trl.loop.arguments import DriverOptions
from abscot_trl.loop.stages import Stage
from abscot_trl.phases import TRAINING, read_yaml, run_phase
from abscot_trl.processes import run, run_elsewhere
from abscot_trl.storage import look_again, write_whole
from abscot_trl.traces.initial import RANDOM_METHODS
from abscot_trl.training.steps import accumulation_of, check_recipe


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
        Refused: as `launcher_of`; or as `check_batches`.
    """
    processes = launcher_of(options).get("num_processes", 1)
    check_batches(todo, 1 if options.launch == "inline" else processes)


def check_batches(todo: list[Stage], processes: int) -> None:
    """
    Raises:
        Refused: a training stage whose recipe cannot be (`check_recipe`), or whose batch sizes so many processes
            cannot share.
    """
    for stage in (stage for stage in todo if stage.phase in TRAINING):
        try:
            check_recipe(stage.settings)
            accumulation_of(stage.settings, processes)
        except Refused as error:
            raise Refused(f"{stage.name}: {error}") from None


def check_nodes(options: DriverOptions) -> None:
    """
    Raises:
        Refused: `nodes` and `launcher` do not go together, or not with the accelerate configuration.
    """
    config = launcher_of(options)
    if options.nodes is None and options.launcher is None:
        if config.get("num_machines", 1) != 1 and options.launch == "accelerate":
            raise Refused(
                f"accelerate_config {options.accelerate_config} is for {config['num_machines']} machines: name them in"
                " nodes, and in launcher what starts a command on one"
            )
        return
    nodes, launcher = options.nodes or [], options.launcher or ""
    named = nodes and all(re.fullmatch(r"[\w.:%-]+", node) for node in nodes)  # no list in one word: `n[1-4]`, `a,b`
    if not named or "{node}" not in launcher or len({*nodes}) < len(nodes):
        raise Refused(
            f"nodes {nodes} and launcher {launcher!r} go together: names of machines, each once, and what starts a "
            "command on the machine {node}, such as 'srun --nodes=1 --ntasks=1 --nodelist={node}'"
        )
    try:
        command = shlex.split(launcher)[0]
        if shutil.which(command) is None:
            raise Refused(f"{command!r} is not installed here")
    except ValueError as error:
        raise Refused(f"launcher: {launcher!r:.200} is no command ({error})") from error
    if options.launch == "inline" or not config:
        raise Refused("nodes need launch: accelerate, and an accelerate_config such as ddp")
    processes = config.get("num_processes", 1)
    if processes % len(nodes):
        raise Refused(
            f"{options.accelerate_config}: num_processes {processes} counts the processes of all nodes, and is no "
            f"multiple of {len(nodes)}"
        )


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
    if options.nodes and stage.phase in TRAINING:
        _train_on_nodes(stage, config, options)
        return
    if options.nodes and stage.phase == "traces" and stage.settings["method"] not in RANDOM_METHODS:
        _make_traces_on_nodes(stage, command, options)
        return
    if stage.phase in TRAINING and options.accelerate_config:
        accelerate = ["--accelerate_config", options.accelerate_config]
        if options.num_processes is not None:
            accelerate += ["--num_processes", str(options.num_processes)]
        command = [sys.executable, "-m", "abscot_trl.cli", stage.phase, *accelerate, "--config", str(config)]
    code = run(command)
    if code:
        raise _failed(stage, f"with exit code {code} (its settings: {config})")


def _failed(stage: Stage, how: str) -> Refused:
    return Refused(
        f"stage {stage.name} failed {how}; mend its recipe and run the same command again to continue from it"
    )


def _run_on_nodes(stage: Stage, commands: list[list[str]], options: DriverOptions) -> None:
    """
    A command on each of the first nodes, side by side.

    Raises:
        Refused: one of them failed; the others were ended.
    """
    prefix = shlex.split(options.launcher)
    there = [[word.replace("{node}", node) for word in prefix] for node in options.nodes]
    failed = run_elsewhere([[*start, *command] for start, command in zip(there, commands, strict=False)])
    look_again(stage.output)
    if failed:
        raise _failed(stage, f"on node {options.nodes[failed[0]]} with exit code {failed[1]}")


def _train_on_nodes(stage: Stage, config: Path, options: DriverOptions) -> None:
    """Each node has an accelerate configuration of its own, which says where rank 0 is and which node this is."""
    launcher = launcher_of(options)
    launcher |= {"num_machines": len(options.nodes), "main_process_ip": options.nodes[0]}
    launcher["main_process_port"] = launcher.get("main_process_port") or 29500  # the same for all: none is found
    if "deepspeed_config" in launcher:
        launcher["deepspeed_config"] |= {"deepspeed_multinode_launcher": "standard"}  # each node starts its own
    commands = []
    for rank in range(len(options.nodes)):
        path = config.with_name(f"{stage.output.name}.node{rank}.yaml")
        write_whole(path, yaml.safe_dump(launcher | {"machine_rank": rank}))
        arguments = ["--accelerate_config", str(path), "--config", str(config)]
        commands.append([sys.executable, "-m", "abscot_trl.cli", stage.phase, *arguments])
    _run_on_nodes(stage, commands, options)


def _make_traces_on_nodes(stage: Stage, command: list[str], options: DriverOptions) -> None:
    """
    A share of the parts on each node. Whoever ends last joins them, or, where none has seen the parts of the others
    yet (a network disk), the first node.
    """
    shares = [[*command, "--shard", f"{node + 1}/{len(options.nodes)}"] for node in range(len(options.nodes))]
    for commands in (shares, [command]):
        try:
            _run_on_nodes(stage, commands, options)
        except Refused:  # of a node too, that had nothing left to do and came when the others had joined
            if not look_again(stage.output):
                raise
        if look_again(stage.output):
            return
    raise _failed(stage, f"to write {stage.output}")
