"""`abscot <phase>` and `python -m abscot_trl.scripts.<phase>`: what a terminal gets of a phase, and of its errors."""

import argparse
import atexit
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from abscot_trl.errors import Refused, save_error
from abscot_trl.phases import PHASES, TRAINING, Phase, parse_phase, read_yaml
from abscot_trl.processes import DRIVER


def accelerate_config_path(name: str, processes: int | None = None) -> str:
    """
    A file as given, or `accelerate_configs/<name>.yaml` of this repository.

    Args:
        processes (`int`, *optional*): how many in place of the configuration's `num_processes`.

    Raises:
        Refused: neither is there; the message lists the names;
            several processes are asked for where accelerate would start one without a word.
    """
    folder = Path(__file__).resolve().parent.parent / "accelerate_configs"
    for path in (Path(name), folder / f"{name}.yaml"):
        if path.is_file():
            _check_processes(path, processes)
            return str(path)
    names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise Refused(f"accelerate_config {name!r} is neither a file nor one of {names}")


def _check_processes(path: Path, given: int | None) -> None:
    config = read_yaml(path)
    kind, processes = config.get("distributed_type"), config.get("num_processes") if given is None else given
    if given is not None and given < 1:
        raise Refused(f"num_processes must be at least 1, got {given}")
    if (
        isinstance(processes, int)
        and processes > 1
        and kind in ("NO", "MULTI_CPU")
        and not config.get("mpirun_config")
    ):
        remedy = "write distributed_type: MULTI_GPU" if given is None else "take ddp"
        raise Refused(
            f"{path}: num_processes is {processes}, but accelerate starts one for distributed_type {kind}; {remedy}, "
            "which starts them on a machine without GPUs too"
        )


@contextmanager
def _machine_refuses() -> Iterator[None]:
    """A full disk, missing rights and packages are the machine's state, whatever met them: said in one line."""
    try:
        yield
    except ImportError as error:
        # Without a name a library says in words what it wants installed.
        if error.name and (error.name.startswith("abscot_trl") or find_spec(error.name.partition(".")[0])):
            raise
        raise Refused(f"{error}; install it, or change what asks for it") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise Refused(f"{error.filename or 'here'}: {error.strerror}; mend that and run the same command") from error


def _means_something(record: logging.LogRecord) -> bool:
    """DeepSpeed, which peft and accelerate import, warns of a machine without GPU whether or not it is used."""
    return not record.getMessage().startswith("Setting accelerator to CPU.")


def run_script(name: str) -> None:
    """
    What `python -m abscot_trl.scripts.<name>` does: run the phase and show its result.

    A mistake of the user's is one line (with ABSCOT_TRACEBACK=1 also where it arose). Any other error shows its
    traceback and leaves it beside what the phase writes. The exit code is 1 in both cases.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half-written folders are removed
    phase, folder = PHASES[name], None
    logging.getLogger("DeepSpeed").addFilter(_means_something)
    try:
        with _machine_refuses():
            given = parse_phase(name)
            folder = phase.folder and next(vars(part)[phase.folder] for part in given if phase.folder in vars(part))
            result = resolve_name(phase.function)(*given)
            text = _shown(phase, result)
    except KeyboardInterrupt:
        if folder and name in ("warmup", "baselines"):
            print(f"abscot {name}: stopped; the same command goes on from where it was, in {folder}", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    except Refused as error:
        if os.environ.get("ABSCOT_TRACEBACK"):
            raise
        sys.exit(f"abscot {name}: {' '.join(str(error).split())}")
    except Exception as error:
        traceback.print_exc()
        words = " ".join(f"{type(error).__name__}: {error}".split())
        sys.exit(f"abscot {name}: {words}{_kept(folder)}")
    if text:
        print(text)  # noqa: T201
    atexit.register(leave_group)  # after what else this process may do


def leave_group() -> None:
    """A process that is still in a group of gloo's can crash while it exits, all its work done: its threads run on."""
    if "torch" in sys.modules:  # most commands never import it
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "gloo":
            distributed.destroy_process_group()  # NCCL's is left to it and vLLM, which shares it


def _kept(folder: str | None) -> str:
    """Where the traceback of the error at hand was left, in words; a disk may be full."""
    if not folder:
        return ""
    try:
        return f" (traceback: {save_error(folder, traceback.format_exc())})"
    except OSError as error:
        return f" (the traceback could not be left beside {folder}: {error})"


def _shown(phase: Phase, result: Any) -> str:
    """A phase's result for the terminal; empty where it has printed all there is to say."""
    if phase.show:
        return resolve_name(phase.show)(result) if result else ""
    if isinstance(result, dict):
        return json.dumps({key: value for key, value in result.items() if key != "settings"}, indent=2)
    return str(result) if isinstance(result, Path | str) else ""


def main() -> None:
    """Entry point of the console script; exits 0 only on success."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, PHASES))
        lines = "\n".join(f"  {name:<{width}}  {phase.sentence}" for name, phase in PHASES.items())
        print(  # noqa: T201
            "usage: abscot <phase> --config FILE.yaml [--field value ..] [--accelerate_config NAME] "
            "[--num_processes N]\n\n"
            f"{lines}\n\nabscot <phase> --help lists a phase's fields; --accelerate_config (bottleneck, distill, "
            "grpo, baseline,\nbaselines, warmup, plan) is a file or the name of one in accelerate_configs/, "
            "--num_processes its GPUs"
        )
        sys.exit(0 if arguments else 2)
    phase, *rest = arguments
    if phase not in PHASES:
        sys.exit(f"abscot: no phase {phase!r}; one of {', '.join(PHASES)}")
    if phase in TRAINING:
        try:
            launcher, rest = _launcher(rest)
        except (Refused, argparse.ArgumentError) as error:
            sys.exit(f"abscot {phase}: {error}")
        if launcher:
            _launch(phase, launcher, rest)
            return
    sys.argv = [f"abscot {phase}", *rest]
    run_script(phase)


def _launcher(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What accelerate is told of the command line (nothing: no configuration is named), and what the phase is."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--accelerate_config")
    parser.add_argument("--num_processes", type=int)
    given, rest = parser.parse_known_args(arguments)
    processes = [] if given.num_processes is None else ["--num_processes", str(given.num_processes)]
    if given.accelerate_config is not None:
        config = accelerate_config_path(given.accelerate_config, given.num_processes)
        machines = read_yaml(config).get("num_machines")
        # accelerate would start fewer, and wait for the others
        if processes and isinstance(machines, int) and machines > 1 and given.num_processes % machines:
            raise Refused(f"{config}: num_processes {given.num_processes} is no multiple of num_machines {machines}")
        return ["--config_file", config, *processes], rest
    if processes:
        raise Refused("--num_processes goes with --accelerate_config, one that starts several, such as ddp")
    return [], rest


def _launch(phase: str, launcher: list[str], arguments: list[str]) -> None:
    """The phase by accelerate; exits with its code where it failed, for it has said why."""
    from accelerate.commands.launch import main as launch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault(DRIVER, str(os.getpid()))  # so that what is launched ends with this process
    sys.argv = ["accelerate", *launcher, "-m", f"abscot_trl.scripts.{phase}", *arguments]
    try:
        launch()
    except KeyboardInterrupt:
        sys.exit(130)
    except SignalException as error:  # by torchrun
        sys.exit(128 + error.sigval)
    except subprocess.CalledProcessError as error:  # one process
        sys.exit(error.returncode)
    except ChildFailedError as error:  # several
        sys.exit(error.get_first_failure()[1].exitcode)


if __name__ == "__main__":
    main()
