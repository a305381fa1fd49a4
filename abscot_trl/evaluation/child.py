"""
Child processes for arithmetic that no signal ends.

A timeout by signal works on the main thread only and does not reach arithmetic in C, where `10^{10^{10}}!` would go on
for hours and take the memory of the machine. A child has an address space of its own and a watchdog that needs no
Python. Where they end it, that one request is lost; the next one gets another child.
"""

import atexit
import faulthandler
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import IO, Any

TIMEOUT = 3  # seconds for one step of a request; a second more and the child is killed
MEMORY = 2**31  # bytes of the child's address space
LIMITS = f"{TIMEOUT + 1} s and {MEMORY / 2**30:.0f} GiB"  # in words

_nowhere: IO | None = None  # in a child: what its watchdog writes to as the process ends


class Child:
    """A `python -m module` that calls [`serve`]: started when asked, one for each process that asks (a fork's own)."""

    def __init__(self, module: str):
        self.module, self._lock = module, threading.Lock()
        self._process: tuple[int, subprocess.Popen] | None = None  # with the process that started it
        atexit.register(self.stop)

    def ask(self, request: Any) -> Any:
        """The child's reply to what JSON can say; `...` where it was killed over it."""
        with self._lock:
            child = self._running()
            try:
                child.stdin.write(json.dumps(request) + "\n")
                child.stdin.flush()
                reply = child.stdout.readline()
            except OSError:
                reply = ""
            if not reply.endswith("\n"):
                self.stop()
                return ...
            return json.loads(reply)

    def _running(self) -> subprocess.Popen:
        if self._process is None or self._process[0] != os.getpid():
            pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._process = os.getpid(), subprocess.Popen([sys.executable, "-m", self.module], **pipe)
        return self._process[1]

    def stop(self) -> None:
        if self._process is not None and self._process[0] == os.getpid():
            self._process[1].kill()
            self._process[1].communicate()
        self._process = None


def limited(function: Callable, *args, **kwargs) -> Any:
    """In a child: the function's result, or the end of the child after `TIMEOUT` and a second."""
    faulthandler.dump_traceback_later(TIMEOUT + 1, exit=True, file=_nowhere)
    try:
        return function(*args, **kwargs)
    finally:
        faulthandler.cancel_dump_traceback_later()


def serve(reply: Callable) -> None:
    """In a child: reply to each request on stdin, within `MEMORY`, until it ends."""
    global _nowhere
    _nowhere = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)
    pipe, sys.stdout = sys.stdout, sys.stderr  # what is printed on the way is no reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business; without it stdin ends
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard < 0 else min(MEMORY, hard), hard))
    for line in sys.stdin:
        pipe.write(json.dumps(reply(json.loads(line))) + "\n")
        pipe.flush()
