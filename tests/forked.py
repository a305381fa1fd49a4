"""
`abscot` in a process of its own that begins at once: forked by a server that has imported what a phase takes, as a
start with its imports costs ten seconds and more. Each is a real process, and really dies by SIGKILL.
"""

import multiprocessing
import os
import sys
from importlib import reload
from pathlib import Path

import huggingface_hub

os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read once, by the server
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["abscot_trl.traces.make", "abscot_trl.training.grpo_phase"])


def _abscot(
    words: list[str], log: Path, folder: Path, errors: Path, environment: dict | None, terminal: str | None
) -> None:
    from abscot_trl.cli import main

    os.chdir(folder)
    for stream, path in ((1, log), (2, errors)):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), stream)
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
        reload(huggingface_hub.constants)  # which were read from the server's
    if terminal is not None:
        sys.stdin = open(terminal)
    sys.argv = ["abscot", *words]
    main()


def abscot(
    words: list,
    log: Path,
    errors: Path | None = None,
    environment: dict[str, str] | None = None,
    terminal: str | None = None,
) -> multiprocessing.Process:
    """
    Begin `abscot <words>` in this process's folder. What it prints is added to `log`, and its errors to `errors`, if
    that is another file; `environment` stands for the server's, the device `terminal` for no stdin.
    """
    given = ([*map(str, words)], log, Path.cwd(), errors or log, environment, terminal)
    process = CONTEXT.Process(target=_abscot, args=given)
    process.start()
    return process
