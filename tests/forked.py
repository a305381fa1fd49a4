"""
`abscot` in a process of its own that begins at once: forked by a server that has imported what a phase takes, as a
start with its imports costs ten seconds and more. Each is a real process, and really dies by SIGKILL.
"""

import multiprocessing
import os
import sys
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["abscot_trl.traces.make", "abscot_trl.training.grpo_phase"])


def _abscot(words: list[str], log: str, folder: Path) -> None:
    from abscot_trl.cli import main

    os.chdir(folder)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    sys.argv = ["abscot", *words]
    main()


def abscot(words: list, log: Path) -> multiprocessing.Process:
    """Begin `abscot <words>` in this process's folder; what it prints is added to `log`."""
    process = CONTEXT.Process(target=_abscot, args=([*map(str, words)], str(log), Path.cwd()))
    process.start()
    return process
