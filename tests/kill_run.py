"""
A warm-up that is killed again and again: a script of its own (tests/test_kill.py), so that it may fork.

Each attempt is a forked process that really dies by SIGKILL: before the n-th change to the file system, after a
checkpoint was sealed, at a stage's manifest, right after it, or at a moment the clock chooses.
Prints what happened as JSON.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

import torch

from abscot_trl.loop import driver
from abscot_trl.loop.warmup import WarmupArguments, warmup
from abscot_trl.training import phase

for name in (  # what attempts import where they use it: here once, seconds less in each of them
    "deepspeed",
    "transformers.models.qwen3.modeling_qwen3",
    "abscot_trl.evaluation.evaluate",
    "abscot_trl.report.plots",
    "abscot_trl.traces.content",
    "abscot_trl.traces.make",
):
    import_module(name)

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


class Killer:
    """An audit hook: counts changes to the file system and dies before the chosen one."""

    def __init__(self, plan: dict):
        self.plan, self.count, self.manifests, self.sealed, self.armed = plan, 0, 0, 0, True

    def __call__(self, event: str, args: tuple) -> None:
        writes = event == "open" and isinstance(args[1], str) and any(mode in args[1] for mode in "wax+")
        if not self.armed or not (event in CHANGES or writes):
            return
        self.count += 1
        if self.plan.get("seal") and self.sealed == self.plan["seal"]:
            self.die()
        self.sealed += event == "os.rename" and str(args[1]).endswith("/sealed.json")
        manifest = event == "os.rename" and str(args[1]).endswith("/manifest.json")
        if self.plan.get("after") and self.manifests == self.plan["after"]:
            self.die()
        if manifest:
            self.manifests += 1
            if self.manifests == self.plan.get("before"):
                self.die()
        if self.count == self.plan.get("change"):
            self.die()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def attempt(fields: dict, log: Path, plan: dict) -> int:
    """Run the warm-up in a forked process under `plan`; returns its wait status, -9 for SIGKILL."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        null = os.open(os.devnull, os.O_WRONLY)
        if not os.environ.get("KILL_RUN_SHOW"):
            os.dup2(null, 1), os.dup2(null, 2)
        killer = Killer(plan)
        launch, last = driver.launch, phase.last_checkpoint

        def note(kind: str, what: str) -> None:
            killer.armed = False
            with open(log, "a") as file:
                file.write(json.dumps([kind, what, time.time(), killer.count]) + "\n")
            killer.armed = True

        def launch_and_note(stage, *args):
            note("start", stage.name)
            killer.count = 0
            launch(stage, *args)
            note("end", stage.name)
            if stage.name == plan.get("stage") and not plan.keys() & {"before", "after"}:
                killer.die()  # faster than the whole run was: what was to kill it did not come

        def last_and_note(output, accelerator):
            found = last(output, accelerator)
            if found:
                note("resume", found)
            return found

        driver.launch, phase.last_checkpoint = launch_and_note, last_and_note
        sys.addaudithook(killer)
        if "delay" in plan:

            def launch_and_wait(stage, *args, inner=launch_and_note):
                if stage.name == plan["stage"]:
                    threading.Timer(plan["delay"], killer.die).start()  # math-verify has the process's one alarm
                inner(stage, *args)

            driver.launch = launch_and_wait
        try:
            warmup(WarmupArguments(**fields))
        except BaseException as error:
            note("error", repr(error))
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def is_whole(output: Path, trained: bool) -> bool:
    """Killed before its manifest, as `before` does it, or after an attempt that was faster than its killer."""
    return (output / "training_log.json").is_file() if trained else output.exists()


def main(fields: dict, folder: Path, seed: int) -> dict:
    """One whole run, and one killed in each stage: by the clock, at a random change, before and after its manifest."""
    rng = random.Random(seed)
    found = {"kills": 0, "codes": []}
    for name in ("whole", "killed"):
        (folder / name).mkdir()
    os.chdir(folder / "whole")
    assert attempt(fields, folder / "whole.jsonl", {}) == 0, (folder / "whole.jsonl").read_text()
    events = [json.loads(line) for line in (folder / "whole.jsonl").read_text().splitlines()]
    starts = {what: at for kind, what, at, _ in events if kind == "start"}
    ends = {what: (at - starts[what], changes) for kind, what, at, changes in events if kind == "end"}
    os.chdir(folder / "killed")
    tried: set[tuple[str, str]] = set()
    while True:
        done = {json.loads(path.read_text())["stage"] for path in Path().glob("run/*/*/manifest.json")}
        left = [stage for stage in starts if stage not in done]
        trains = bool(left) and left[0].endswith(("/bottleneck", "/distill"))
        kinds = ["seal"] * trains + ["delay", "change", "before", "after"]
        if left and is_whole(Path("run") / f"{left[0]}{'d' * left[0].endswith('-merge')}", trains):
            kinds = ["before", "after"]
        kinds = [kind for kind in kinds if left and (left[0], kind) not in tried]
        if not kinds:  # the last stage is done, or was killed after its manifest
            break
        stage, kind = left[0], kinds[0]
        tried.add((stage, kind))
        seconds, changes = ends[stage]
        value = {"delay": rng.uniform(0.05, 0.95) * seconds, "change": rng.randint(1, changes)}.get(kind, 1)
        code = attempt(fields, folder / "killed.jsonl", {"stage": stage, kind: value})
        found["codes"].append(code)
        found["kills"] += code == -signal.SIGKILL
    found["last"] = attempt(fields, folder / "killed.jsonl", {})
    found["again"] = attempt(fields, folder / "killed.jsonl", {})  # nothing left to do
    return found | {"stages": list(starts)}


if __name__ == "__main__":
    for given in map(json.loads, sys.argv[1:]):
        print(json.dumps(main(given["fields"], Path(given["folder"]), given["seed"])), flush=True)
