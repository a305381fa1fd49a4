"""
Processes that end with the one that started them. The kernel sees to it (Linux), so that no kill leaves one behind:
driver, launcher, trainers, and what those fork. Elsewhere `storage.at_work` keeps a second one from starting.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress

DRIVER = "ABSCOT_DRIVER"  # in the environment of what a driver or `abscot` launched: its process id
PR_SET_PDEATHSIG = 1
STOP_S = 20.0  # what a child may take to end after SIGTERM
STOP_ELSEWHERE_S = 60.0  # the same of one on another machine: torchrun gives ranks that hang in a collective 30
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: not between a fork and what follows


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send `number` when the thread that started this process ends."""
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, number)


def end_with_launcher() -> None:
    """
    At the start of a phase's process: end with the driver or launcher that started it (one started by hand outlives
    its shell), and let what it forks end with it.
    """
    if DRIVER in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
        if os.getppid() == 1 and os.environ.get(DRIVER) != "1":  # it ended before we asked
            os._exit(1)
    forking: list[tuple[int, bool]] = [(0, True)]  # this process, and whether its main thread forks

    def note() -> None:
        forking[0] = os.getpid(), threading.current_thread() is threading.main_thread()

    def tie() -> None:
        parent, by_main_thread = forking[0]
        if by_main_thread:  # other threads may end before the process does
            die_with_parent()
            if os.getppid() != parent:  # it ended before we asked
                os._exit(1)

    os.register_at_fork(before=note, after_in_child=tie)


def start(command: list[str], elsewhere: bool = False, **options) -> subprocess.Popen:
    """
    `subprocess.Popen` of a process that ends with this one, and with it what it launches of this package.

    Args:
        elsewhere (`bool`): the command starts another on a further machine (`srun`, `ssh`): it is told to end
            (SIGTERM), not killed, so that it ends that one, to which a process number of this machine means nothing.
    """
    parent = os.getpid()

    def tie() -> None:
        die_with_parent(signal.SIGTERM if elsewhere else signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    environment = {name: value for name, value in options.pop("env", os.environ).items() if name != DRIVER}
    options["env"] = environment | ({} if elsewhere else {DRIVER: str(parent)})
    return subprocess.Popen(command, preexec_fn=tie, **options)


def _end(processes: list[subprocess.Popen], within_s: float) -> None:
    """Tell them to stop, so that they may tidy up; then stop them."""
    try:
        for process in processes:
            process.terminate()
        end = time.monotonic() + within_s
        with suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(max(end - time.monotonic(), 0.0))
    finally:
        for process in processes:
            process.kill()


def run(command: list[str]) -> int:
    """Exit code of a command; when this process is told to stop, the command is first: it may tidy up."""
    with start(command) as process:
        try:
            return process.wait()
        except BaseException:
            _end([process], STOP_S)
            raise


def run_elsewhere(commands: list[list[str]]) -> tuple[int, int] | None:
    """
    Commands that each start one on a machine of its own, side by side; the others end when one of them fails, or when
    this process is told to stop.

    Returns:
        Which of them failed first and its exit code; `None` when all ended well.
    """
    with ExitStack() as started:
        processes = []
        try:
            for command in commands:
                process = start(command, elsewhere=True, stdin=subprocess.DEVNULL)
                processes.append(started.enter_context(process))
            while True:
                codes = [process.poll() for process in processes]
                for number, code in enumerate(codes):
                    if code:
                        return number, code
                if None not in codes:
                    return None
                time.sleep(0.2)
        finally:
            _end(processes, STOP_ELSEWHERE_S)
