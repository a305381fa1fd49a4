"""Who is at work for a cell of tests/kill_table.py, whoever their parent is by now."""

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

MARK = "ABSCOT_KILL_TABLE"  # in the environment of all processes of an attempt: which cell, which attempt
ROLES = {
    "abscot_trl.cli": "launcher",
    "abscot_trl.scripts.bottleneck": "trainer",
    "abscot_trl.scripts.distill": "trainer",
    "abscot_trl.scripts.traces": "sampler",
}


@dataclass(frozen=True)
class Process:
    pid: int
    attempt: str  # cell and number of the attempt
    command: str
    rank: int

    @property
    def role(self) -> str | None:
        """Which of the `VICTIMS` this is."""
        words = self.command.split("\0")
        return ROLES.get(words[words.index("-m") + 1]) if "-m" in words[:-1] else None


class Watch(threading.Thread):
    """Looks again and again at all processes that carry `MARK`, whoever their parent is by now."""

    def __init__(self):
        super().__init__(daemon=True)
        self.known: dict[tuple[int, str], Process | None] = {}
        self.now: list[Process] = []
        self.looks = 0
        self.beside: set[str] = set()  # cells with two trainers of one rank, or two samplers, at work at once
        self.ended = False
        self.start()

    def run(self) -> None:
        while not self.ended:
            found, known = [], {}
            for pid in filter(str.isdecimal, os.listdir("/proc")):
                try:
                    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                    command = Path(f"/proc/{pid}/cmdline").read_text()
                    if stat[0] == "Z" or not command:
                        continue
                    key = int(pid), stat[19] + command  # when it began: process ids come back
                    if key not in self.known:
                        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                        pairs = dict(entry.decode(errors="replace").partition("=")[::2] for entry in environment)
                        mine = Process(int(pid), pairs[MARK], command, int(pairs.get("RANK", 0)))
                        self.known[key] = mine if MARK in pairs else None
                except (OSError, KeyError):
                    continue
                known[key] = self.known[key]
                found += [self.known[key]] if self.known[key] else []
            seen = {}
            for process in found:
                if process.role in ("trainer", "sampler"):
                    cell = process.attempt.partition(":")[0]
                    other = seen.setdefault((cell, process.role, process.rank), process)
                    if other.attempt != process.attempt:
                        self.beside.add(cell)
            self.known, self.now = known, found
            self.looks += 1
            time.sleep(0.2)  # each takes milliseconds of a core; a process lives for seconds

    def fresh(self) -> list[Process]:
        """What a look that began after this call finds."""
        looks = self.looks
        while self.looks < looks + 2:
            time.sleep(0.005)
        return self.now
