"""
A table of kills: driver, launcher, trainer, sampler x SIGKILL, SIGTERM, SIGINT x LoRA, full x one and two processes.

    python tests/kill_table.py --jobs 12 --output kills.jsonl
    python tests/kill_table.py --jobs 12 --output kills.jsonl --folder kills --cells 0:30   # a part; again: the rest
    python tests/kill_table.py --output kills.jsonl --show                                  # the table so far

Each cell is a warm-up of one round, its phases in processes of their own (two ranks over gloo where two are said). At
a moment one process of it is killed; when the driver has ended, the same command is given again, at once, until it
succeeds. A cell is right if every process of the killed attempt is gone in the end, if never two trainers of the same
rank (or two samplers) were at work, and if the files are then those of a run that nobody killed.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import yaml
from kill_watch import MARK, Process, Watch
from warmups import LORA

from abscot_trl.processes import die_with_parent

VICTIMS, SIGNALS = ("driver", "launcher", "trainer", "sampler"), ("SIGKILL", "SIGTERM", "SIGINT")
TUNINGS, PROCESSES = ("lora", "full"), (1, 2)
BATCH, STEPS = 4, 10  # rows a process and step; steps of each phase, no multiple of an epoch's 8 or 4
CLOCK = {"wall_s", "attempts", "environment"}
TRAINING = {
    "dtype": "float32", "attn_implementation": "sdpa", "max_length": 2048, "pad_to_multiple_of": 8,
    "max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": 1.0e-3,
    "gradient_checkpointing": False, "bf16": False, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2,
    "save_total_limit": 2, "disable_tqdm": True,
}  # fmt: skip
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    victim: str
    signal: str
    tuning: str
    processes: int
    moment: str  # `seal`: after the next sealed checkpoint; `parts`: while sampling; `random`: any time

    @property
    def name(self) -> str:
        return f"{self.victim}-{self.signal}-{self.tuning}-{self.processes}-{self.moment}"


def all_cells() -> list[Cell]:
    """Each of the 48 at one moment, in turn, and the twelve by SIGKILL and SIGTERM of two processes at another too."""
    cells = []
    for number, (victim, kind, tuning, processes) in enumerate(product(VICTIMS, SIGNALS, TUNINGS, PROCESSES)):
        moments = {"driver": ("seal", "parts", "random"), "sampler": ("parts", "random")}.get(
            victim, ("seal", "random")
        )
        first = number % len(moments) if victim != "driver" else number // 2 % len(moments)
        cells.append(Cell(victim, kind, tuning, processes, moments[first]))
        if kind != "SIGINT" and (processes == 2 or victim == "driver"):
            cells.append(Cell(victim, kind, tuning, processes, moments[(first + 1) % len(moments)]))
    return cells


def contents(run: Path) -> dict[str, str]:
    """
    Digests of a run's files; of its manifests without the clock; without what shows wall times, locks, and the errors
    that a rank leaves beside the run when another one was killed.
    """
    found = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.name == "manifest.json":
            record = json.loads(content)
            assert record.keys() >= CLOCK
            content = json.dumps({key: value for key, value in record.items() if key not in CLOCK}).encode()
        # training_args.bin: a checkpoint's pickle, which nobody reads
        own = path.name in ("record.md", "training_args.bin", ".lock") or path.suffix == ".lock"
        if not own and not path.match("*.error*.txt"):
            found[str(path.relative_to(run))] = hashlib.sha256(content).hexdigest()
    return found


class Table:
    """Inputs, runs that nobody killed, and cells, each in a folder of its own under `folder`."""

    def __init__(self, folder: Path, seed: int = 0, until: str | None = None, timeout_s: float = 500.0):
        self.timeout_s = timeout_s  # of an attempt
        self.folder, self.watch, self.rng, self.until = folder, Watch(), random.Random(seed), until
        self.whole: dict[tuple[str, int], dict[str, str]] = {}
        self.seconds: dict[tuple[str, int], float] = {}

    def prepare(self) -> None:
        """A tiny extended Qwen3, prepared rows and the recipes; those of an earlier call are used again."""
        if (self.folder / "ready").exists():
            return
        from tiny import make_checkpoint

        from abscot_trl.data.toy import chain_arithmetic, write_problems
        from abscot_trl.phases import run_phase

        checkpoint = self.folder / "checkpoint"
        self.folder.mkdir(parents=True, exist_ok=True)
        make_checkpoint(checkpoint)
        train = write_problems(self.folder / "train.jsonl", chain_arithmetic(64, 4, 5, seed=0))
        fields = {
            "data": train,
            "data_format": "problems",
            "tokenizer": checkpoint,
            "output_dir": self.folder / "data",
        }
        run_phase("data", [part for key, value in fields.items() for part in (f"--{key}", str(value))])
        for tuning in TUNINGS:
            recipe = TRAINING | (LORA if tuning == "lora" else {})
            (self.folder / f"recipe.{tuning}.yaml").write_text(yaml.safe_dump(recipe))
        for processes in PROCESSES:
            kind = "NO" if processes == 1 else "MULTI_GPU"  # without GPUs: two ranks over gloo
            config = {"distributed_type": kind, "num_processes": processes, "compute_environment": "LOCAL_MACHINE"}
            config |= {"mixed_precision": "no", "num_machines": 1, "machine_rank": 0, "main_process_port": 0}
            (self.folder / f"accelerate.{processes}.yaml").write_text(yaml.safe_dump(config))
            for tuning in TUNINGS:
                fields = {"run_dir": "run", "model": str(checkpoint), "data": str(self.folder / "data"), "rounds": 1}
                fields |= {"initial": "content", "ratio": 4.0, "distill_from": "cot", "rehearsal": 1.0}
                fields |= {"rows_per_phase": 32, "tuning": tuning, "batch_tokens": 64, "keep_checkpoints": True}
                fields |= {name: str(self.folder / "recipe.{tuning}.yaml") for name in ("bottleneck", "distill")}
                fields |= {"accelerate_config": str(self.folder / f"accelerate.{processes}.yaml")}
                fields |= {"until": self.until} if self.until else {}
                (self.folder / f"warmup.{tuning}.{processes}.yaml").write_text(yaml.safe_dump(fields))
        (self.folder / "ready").touch()

    def fresh(self, name: str) -> Path:
        """An empty folder; or with a copy of the run `begun`, if there is one, whose stages are then done."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        if (self.folder / "begun").exists():
            shutil.copytree(self.folder / "begun", folder)
        folder.mkdir(exist_ok=True)
        return folder

    def begin(self, folder: Path, tuning: str, processes: int, attempt: str) -> subprocess.Popen:
        """The driver, as a user would start it."""
        config = str(self.folder / f"warmup.{tuning}.{processes}.yaml")
        with open(folder / "log.txt", "a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "abscot_trl.scripts.warmup", "--config", config],
                cwd=folder,
                stdout=log,
                stderr=log,
                env=os.environ | ENVIRONMENT | {MARK: attempt},
                preexec_fn=die_with_parent,  # a table that is killed leaves nothing behind
            )

    def run_whole(self, tuning: str, processes: int) -> None:
        """A run that nobody kills; its files say how many processes trained."""
        folder = self.folder / f"whole-{tuning}-{processes}"
        done = folder / "seconds"
        if not done.exists():
            self.fresh(folder.name)
            start = time.monotonic()
            code = self.begin(folder, tuning, processes, f"{folder.name}:1").wait(self.timeout_s)
            assert code == 0, (folder / "log.txt").read_text()[-3000:]
            done.write_text(str(time.monotonic() - start))
        log = json.loads((folder / "run/round1/bottleneck/training_log.json").read_text())
        assert {entry["sequences_per_step"] for entry in log["log"]} == {BATCH * processes}, "the world size"
        self.whole[tuning, processes] = contents(folder / "run")
        self.seconds[tuning, processes] = float(done.read_text())

    def alive(self, attempt: str, role: str | None = None) -> list[Process]:
        found = [process for process in self.watch.now if process.attempt == attempt]
        return [process for process in found if role in (None, process.role)]

    def _moment(self, cell: Cell, folder: Path, driver: subprocess.Popen, attempt: str) -> tuple[int, str]:
        """Wait for the moment; returns whom to kill, and when that was in words."""
        run, start = folder / "run" / "round1", time.monotonic()
        rank, sealed = self.rng.randrange(cell.processes), set(run.glob("bottleneck/checkpoint-*/sealed.json"))

        def victim() -> int | None:
            if cell.victim == "driver":
                return driver.pid
            found = self.alive(attempt, cell.victim)
            found = [process for process in found if cell.victim != "trainer" or process.rank == rank]
            return found[0].pid if found else None

        def due() -> bool:
            if cell.moment == "seal":
                return not sealed.issuperset(run.glob("bottleneck/checkpoint-*/sealed.json"))
            return any(run.glob("distill-traces.parts/settings.json"))

        wait = None
        if cell.moment == "random":  # of a driver's whole time, or of what its child takes
            longest = self.seconds[cell.tuning, cell.processes] if cell.victim == "driver" else 10.0
            wait = self.rng.uniform(0.0, longest)
        seen = None
        while driver.poll() is None:
            pid = victim()
            seen = seen or (pid and time.monotonic())
            if pid and (time.monotonic() - seen >= wait if wait is not None else due()):
                after = time.monotonic() - start
                stages = [path.stem for path in run.glob("*.running")] or ["before any stage"]
                who = f" of {cell.victim} {rank}" if cell.victim == "trainer" else ""
                words = "sealed checkpoint" if cell.moment == "seal" else "sampling"
                words = words if wait is None else f"{wait:.1f} s on"
                return pid, f"{words}{who}, {after:.0f} s, {stages[-1]}"
            if cell.victim != "driver" and wait is not None and seen and not pid:
                seen = None  # it ended before: the next one of its kind
                wait = wait / 2
            time.sleep(0.01)
        raise AssertionError(f"the moment did not come: {(folder / 'log.txt').read_text()[-2000:]}")

    def run_cell(self, cell: Cell, number: int, then: Cell | None = None) -> dict:
        """A kill and what came of it; with `then`, the first rerun is killed too, as that cell says."""
        name = f"{number:02}-{cell.name}"
        folder = self.fresh(name)
        attempt = f"{name}:1"
        driver = self.begin(folder, cell.tuning, cell.processes, attempt)
        pid, when = self._moment(cell, folder, driver, attempt)
        killed = time.monotonic()
        os.kill(pid, getattr(signal, cell.signal))
        try:
            code = driver.wait(self.timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        gone: list[float] = []

        def note_when_gone() -> None:
            while any(process.attempt == attempt for process in self.watch.fresh()):
                if time.monotonic() - killed > self.timeout_s:
                    return
                time.sleep(0.02)
            gone.append(time.monotonic() - killed)

        noting = threading.Thread(target=note_when_gone)
        noting.start()
        reruns, codes = 0, []
        while code is not None and reruns < 3:  # at once, as a script would that does not look
            reruns += 1
            with self.begin(folder, cell.tuning, cell.processes, f"{name}:{reruns + 1}") as driver:
                if then and reruns == 1:
                    pid, _ = self._moment(then, folder, driver, f"{name}:2")
                    os.kill(pid, getattr(signal, then.signal))
                try:
                    codes.append(driver.wait(self.timeout_s))
                except subprocess.TimeoutExpired:
                    driver.kill()
                    codes.append(None)
            if codes[-1] == 0:
                break
        noting.join()
        left = [process for process in self.watch.fresh() if process.attempt.startswith(f"{name}:")]
        for process in left:
            os.kill(process.pid, signal.SIGKILL)
        now = contents(folder / "run") if (folder / "run").is_dir() else {}
        whole = self.whole[cell.tuning, cell.processes]
        different = sorted(path for path in now.keys() | whole.keys() if now.get(path) != whole.get(path))
        right = bool(gone) and not left and codes[-1:] == [0] and not different and name not in self.watch.beside
        return {
            "number": number, "cell": cell.name, "moment": when, "driver_code": code,
            "gone_s": round(gone[0], 2) if gone else None, "reruns": reruns, "rerun_codes": codes,
            "files_equal": not different, "different": different[:10], "files": len(now),
            "orphans": len(left), "second_at_work": name in self.watch.beside, "right": right,
        }  # fmt: skip


def show(path: Path) -> str:
    """The results as a Markdown table."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = sorted({row["number"]: row for row in rows}.values(), key=lambda row: row["number"])
    lines = [
        "| victim | signal | weights | processes | moment | all gone after | reruns | second at work | files equal |"
    ]
    lines += ["|---|---|---|---:|---|---:|---:|---|---|"]
    for row in rows:
        victim, kind, tuning, processes, _ = row["cell"].split("-")
        gone = "never" if row["gone_s"] is None else f"{row['gone_s']:.1f} s"
        equal = "yes" if row["files_equal"] else f"no: {', '.join(row['different'][:2])}"
        second = "yes" if row["second_at_work"] else "no"
        cells = [victim, kind, tuning, processes, row["moment"], gone, row["reruns"], second, equal]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    slowest = max((row["gone_s"] or float("inf") for row in rows), default=0.0)
    lines += ["", f"{len(rows)} kills, {sum(row['right'] for row in rows)} right; the slowest end {slowest:.1f} s."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="cells side by side")
    parser.add_argument("--cells", default=":", help="i:j, a part of them")
    parser.add_argument("--output", type=Path, default=Path("kills.jsonl"), help="a line for each cell, as it ends")
    parser.add_argument("--folder", type=Path, help="where the runs go; a temporary one, removed, if not said")
    parser.add_argument("--until", help="last stage of each run")
    parser.add_argument("--timeout", type=float, default=500.0, help="seconds an attempt may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print the table of --output and end")
    args = parser.parse_args()
    if args.show:
        print(show(args.output))
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where a shell ignores it, children would too
    first, _, last = args.cells.partition(":")
    there = args.output.read_text().splitlines() if args.output.exists() else []
    there = {row["number"] for row in map(json.loads, there) if row["right"]}
    cells = list(enumerate(all_cells()))[int(first or 0) : int(last) if last else None]
    cells = [(number, cell) for number, cell in cells if number not in there]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        table = Table((args.folder or Path(temporary)).resolve(), args.seed, args.until, args.timeout)
        table.prepare()
        with ThreadPoolExecutor(args.jobs) as pool:
            kinds = sorted({(cell.tuning, cell.processes) for _, cell in cells})
            list(pool.map(lambda kind: table.run_whole(*kind), kinds))
            print(f"{len(kinds)} runs that nobody killed: {table.seconds}", flush=True)
            running = [pool.submit(table.run_cell, cell, number) for number, cell in cells]
            for done in as_completed(running):
                try:
                    row = done.result()
                except Exception:  # the other cells go on
                    print(f"ERROR {traceback.format_exc()}", flush=True)
                    continue
                with open(args.output, "a") as file:
                    file.write(json.dumps(row) + "\n")
                print(("ok   " if row["right"] else "WRONG") + f" {json.dumps(row)}", flush=True)
    print(f"\n{show(args.output) if args.output.exists() else 'no cell ended'}")


if __name__ == "__main__":
    main()
