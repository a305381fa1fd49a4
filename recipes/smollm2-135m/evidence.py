"""
The grid: do traces carry on a real model, and what does each choice buy? `make evidence`.

    python recipes/smollm2-135m/evidence.py --gpus 0 1 2 3        # hours on one GPU; --runs informed sft: some of it
    python recipes/smollm2-135m/evidence.py --collect             # results.json, table and picture of what is done
    python recipes/smollm2-135m/evidence.py --small --runs informed sft     # minutes on a CPU: does all of it run?

Every run is a warm-up (or a baseline) from recipes that are written beside it: this folder's, with fields of `GRID`
over them. All train on as many packed tokens, from a verbal model of their codebook and seed, and are evaluated on
both of the task's tests. A GPU takes a run at a time; given again the command goes on.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from statistics import fmean
from threading import Lock

import yaml

from abscot_trl.errors import Refused
from abscot_trl.evaluation.results import read_results
from abscot_trl.loop.record import read_log
from abscot_trl.phases import read_yaml
from abscot_trl.processes import start
from abscot_trl.report.gauges import level, readings
from abscot_trl.report.tables import results_table
from abscot_trl.report.verdict import verdicts
from abscot_trl.storage import read_manifest, write_whole

HERE = Path(__file__).parent
VERBAL = "baseline.verbal"
PHASES = ("bottleneck", "distill", "evaluate", "init", VERBAL)
STEPS = {VERBAL: 1000, "bottleneck": 600, "distill": 3400}  # of 33,000 tokens, and 16,000 (a batch of 2)
HELD_OUT = {"gsm-symbolic": "templates", "facts": "longer", "states": "longer"}  # what the second test holds
PAPER = {"initial": "uniform", "distill_from": "prompt", "temperature": 0.7}
SAMPLED = {"distill_from": "cot", "temperature": 0.7}
THREE = {"rounds": 3, "rows_per_phase": 30_000}  # a third of the steps each
STABLE = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 400}}
LARGE = dict.fromkeys(("bottleneck", "distill"), {"per_device_train_batch_size": 4, "global_batch_size": 4})
# Stepwise internalisation packs no rows: about as many of them as a packed step has.
UNPACKED = {"per_device_train_batch_size": 64, "global_batch_size": 64, "max_length": 512}
# On a CPU, with figures that mean nothing: a few rows, steps and problems.
ON_CPU = {"use_cpu": True, "bf16": False, "attn_implementation": "sdpa", "compile_layers": False, "gauge_rows": 0}
ON_CPU |= {"dataloader_num_workers": 0, "max_length": 512, "per_device_train_batch_size": 1, "global_batch_size": 1}
SMALL = dict.fromkeys(("bottleneck", "distill", VERBAL), ON_CPU)
SMALL |= {"warmup": {"backend": "hf", "dtype": "float32", "launch": "inline", "accelerate_config": None}}
SMALL["warmup"] |= {"rows_per_phase": 12}
SMALL |= {"evaluate": {"backend": "hf", "dtype": "float32", "limit": 2, "max_new_tokens": 32}}
# A run: fields over warmup.informed.yaml; those of a phase over its own recipe. `baseline`: this one, and no warm-up.
GRID = {
    "informed": {},
    "paper": PAPER,
    **{name: {"baseline": name} for name in ("base", "sft", "cot", "pause", "cut-cot")},
    "icot": {"baseline": "icot", "bottleneck": UNPACKED},
    "paper-3-rounds": PAPER | THREE,
    "informed-3-rounds": THREE,
    "informed-3-rounds-sampled": SAMPLED | {"rehearsal": 1.0} | THREE,
    "informed-sampled": SAMPLED,
    "informed-sampled-rehearsed": SAMPLED | {"rehearsal": 1.0},
    "informed-stable-rate": {"distill": STABLE},
    "informed-large-batch": LARGE,
    "informed-large-batch-ratio-4": {"ratio": 4.0, **LARGE},
    "informed-discrete": {"bottleneck": {"channel": "discrete"}},
    "informed-ratio-4": {"ratio": 4.0},
    "informed-ratio-12": {"ratio": 12.0},
    "informed-ratio-20": {"ratio": 20.0},
    "informed-16-codes": {"init": {"codebook_size": 16}},
    "informed-256-codes": {"init": {"codebook_size": 256}},
    "informed-10000-rows": {"rows_per_phase": 10_000},
    "informed-30000-rows": {"rows_per_phase": 30_000},
    "informed-100000-rows": {"rows_per_phase": 100_000},
    "informed-300000-rows": {"rows_per_phase": 300_000},
}


def abscot(log: Path, gpu: str, *arguments) -> None:
    """
    One command on one GPU (an empty text: none); its output is added to `log`.

    Raises:
        Refused: the command failed; what it said last.
    """
    with open(log, "a") as out:
        before = out.tell()
        command = [sys.executable, "-m", "abscot_trl.cli", *map(str, arguments)]
        code = start(command, stdout=out, stderr=out, env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu}).wait()
    if code:
        said = log.read_bytes()[before:].decode(errors="replace").split("\n")
        raise Refused(f"{log}: ended with {code}: {next(filter(str.strip, reversed(said)), 'no word')[:300]}")


class Grid:
    """
    The runs of one task below `folder`.

    Args:
        model (`str`, *optional*): in place of init.yaml's.
        over (`dict`): fields by phase (`warmup`, `bottleneck`, ..) over every recipe, for another machine than ours.
        steps (`dict`): optimiser steps by phase.
    """

    def __init__(self, task: str, folder: Path, model: str | None, over: dict, steps: dict[str, int]):
        self.task, self.folder, self.over, self.steps = task, folder, over, steps
        self.init = read_yaml(HERE / "init.yaml") | ({"base_model": model} if model else {})
        self.warmup = read_yaml(HERE / "warmup.informed.yaml")
        self.rows = folder.parent / "rows" / "train.jsonl"
        self.making = defaultdict(Lock)  # a base or its data: runs share them

    def check(self, names: list[str]) -> None:
        """
        Raises:
            Refused: there are no rows, or too few for one of these runs.
        """
        if not self.rows.is_file():
            make = f"tasks.py {self.task} --rows 600000 --output_dir {self.rows.parent}"
            raise Refused(f"{self.rows} is not there; make it by {make}")
        with open(self.rows, "rb") as file:
            there = sum(1 for _ in file)
        for name in names:
            fields = self.warmup | GRID[name] | self.over.get("warmup", {})
            needed = 2 * fields["rounds"] * fields["rows_per_phase"]
            if needed > there:
                raise Refused(
                    f"{name} needs {needed} rows, {self.rows} has {there}: tasks.py --rows {needed} makes them"
                )

    def recipe(self, where: Path, phase: str, fields: dict) -> Path:
        """
        This folder's recipe of `phase` with `fields` and what goes over every recipe, written to `where`.

        Raises:
            Refused: another one is there.
        """
        path = HERE / f"{phase}.yaml"
        if phase == "evaluate":
            path = path if self.task == "gsm-symbolic" else HERE / f"evaluate.{self.task}.yaml"
            fields = fields | {"problems": str(self.folder.parent / "rows" / "test.jsonl")}
        return self.write(where / f"{phase}.yaml", read_yaml(path) | fields | self.over.get(phase, {}))

    def write(self, path: Path, fields: dict) -> Path:
        text = yaml.safe_dump(fields, sort_keys=False)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)  # another grid may be reading
        elif path.read_text() != text:
            raise Refused(f"{path} was begun with other fields; give the same again, or another --folder")
        return path

    def base(self, fields: dict, seed: int, gpu: str) -> tuple[Path, Path]:
        """The verbal model that runs with this codebook and seed start from, and its data; each made once."""
        fields = self.init | fields
        size = fields["codebook_size"]
        where, data = self.folder / f"base-{size}-{seed}", self.folder / f"data-{size}"
        init, verbal = where / "init", where / "verbal"
        with self.making[str(where)]:
            steps = {"max_steps": self.steps[VERBAL]}
            recipe = {name: self.recipe(where, name, more) for name, more in (("init", fields), (VERBAL, steps))}
            if not init.is_dir():
                abscot(where / "log", gpu, "init", "--config", recipe["init"], "--output_dir", init)
            with self.making[str(data)]:
                if not data.is_dir():
                    abscot(where / "log", gpu, "data", "--config", HERE / "data.yaml", "--data", self.rows,
                           "--tokenizer", init, "--output_dir", data)  # fmt: skip
            if not (verbal / "training_log.json").is_file():
                abscot(where / "log", gpu, "baseline", "--config", recipe[VERBAL], "--data", data,
                       "--model_name_or_path", init, "--output_dir", verbal, "--seed", seed,
                       "--resume_from_checkpoint", "true", *self.launcher())  # fmt: skip
        return verbal, data

    def launcher(self) -> list[str]:
        config = (self.warmup | self.over.get("warmup", {}))["accelerate_config"]
        return ["--accelerate_config", config] if config else []

    def run(self, name: str, seed: int, gpu: str) -> None:
        """One run of the grid, to its end."""
        fields = dict(GRID[name])
        own = {phase: fields.pop(phase, {}) for phase in PHASES}
        where, rounds = self.folder / f"{name}-{seed}", fields.get("rounds", 1)
        for phase in ("bottleneck", "distill"):
            steps = self.steps[phase] * 2 // own[phase].get("global_batch_size", 2)  # of an icot, baselines' own
            own[phase] = {"max_steps": max(1, steps // rounds)} | own[phase]
        model, data = self.base(own["init"], seed, gpu)
        paths = {phase: str(self.recipe(where, phase, own[phase])) for phase in ("bottleneck", "distill", "evaluate")}
        shared = paths | {"run_dir": str(where / "run"), "model": str(model), "data": str(data), "seed": seed}
        over = self.over.get("warmup", {})
        if "baseline" in fields:
            warm = self.warmup | over
            kept = ("rows_per_phase", "accelerate_config", "launch")
            recipe = {key: warm[key] for key in kept if key in warm} | {"rounds": 1, "names": [fields["baseline"]]}
            recipe |= {"steps": self.steps["bottleneck"] + self.steps["distill"]}
            phase = "baselines"
        else:
            recipe, phase = self.warmup | {"name": name} | fields | over, "warmup"
        abscot(where / "log", gpu, phase, "--config", self.write(where / f"{phase}.yaml", recipe | shared))
        held_out = where / "held-out"
        if not (held_out / "results.json").is_file():
            last = max((where / "run").glob("**/evaluate.yaml"))  # the last round's
            kind = HELD_OUT[self.task]
            abscot(where / "log", gpu, "evaluate", "--config", last, "--task", f"{self.task}-{kind}",
                   "--problems", self.rows.with_name(f"{kind}.jsonl"), "--output_dir", held_out)  # fmt: skip

    def collect(self) -> list[dict]:
        """The rows of all runs that are done, on both tests. What `base` answers verbally is called `verbal`."""
        rows = []
        for folder in sorted(self.folder.glob("*/run/results.json")):
            found, held_out = read_results(folder), folder.parents[1] / "held-out" / "results.json"
            if held_out.is_file():  # answered by the last round's model
                last = {key: found[-1][key] for key in ("round",) if key in found[-1]}
                found += [row | last for row in read_results(held_out)]
            about = about_run(folder.parent)
            rows += [row | about | ({"model": "verbal"} if row["model"] == "base" else {}) for row in found]
        return rows


def about_run(run: Path) -> dict:
    """Its name (and seed), hours and card, and the gauges of the last phase B."""
    stages = [read_manifest(path.parent, "wall_s") for path in run.glob("**/manifest.json")]
    cards = sorted({gpu.split(",")[0] for stage in stages for gpu in stage.get("environment", {}).get("gpus", [])})
    about = {"run": run.parent.name, "hours": round(sum(stage["wall_s"] for stage in stages) / 3600, 3)}
    about["card"] = ", ".join(cards) or "cpu"
    gauges = [found for path in sorted(run.glob("round*/distill")) if (found := readings(read_log(path)))]
    if gauges:
        first, last = gauges[-1][0], gauges[-1][-1]
        about |= {"gauge_first": level(first), "gauge_last": level(last), "first_step": first["step"]}
        about["predictable"] = last["predictable"]
    return about


def write_page(rows: list[dict], task: str, output: Path) -> None:
    """
    `results.json`, a table and a picture in `output`; how often the first gauges told the verdict on the task's first
    test.
    """
    output.mkdir(parents=True, exist_ok=True)
    main = [row for row in rows if row["task"] == task]
    (output / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    told = {verdict["own"]["run"]: verdict["level"] for verdict in verdicts(main)}  # the last round's
    first = {row["run"]: row["gauge_first"] for row in main if "gauge_first" in row}
    right = [(first[run] == "tokens") == (told[run] == "tokens") for run in first]
    (output / "results.md").write_text(
        f"{results_table(rows)}\n\nThe gauges at their first reading in phase B told whether the tokens carry in "
        f"{sum(right)} of {len(right)} runs.\n"
    )
    picture(main, output / "frontier.png")


def picture(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    own = defaultdict(list)
    for row in (row for row in rows if row["swap"] == "own"):
        own[row["model"]].append((row["trace_tokens"], row["accuracy"]))
        axes.plot(*own[row["model"]][-1], "o", color="tab:blue" if row["mode"] == "abstract" else "tab:grey")
    below = 100.0
    for name, points in sorted(own.items(), key=lambda item: -fmean(y for _, y in item[1])):
        x, y = (fmean(values) for values in zip(*points, strict=True))
        below = min(y, below - 3.5)  # a line a name: the first ones stand where they belong
        axes.annotate(f"{name}{f' x{len(points)}' * (len(points) > 1)}", (x, y), (x * 1.25 + 0.1, below), fontsize=7,
                      va="center", arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "tab:grey"})  # fmt: skip
    for row in (row for row in rows if row["swap"] == "random"):
        axes.plot(row["trace_tokens"], row["accuracy"], "x", color="tab:red")
    axes.set(xlabel="reasoning tokens a problem", ylabel="accuracy, %", ylim=(0, 100), xlim=(-0.2, 400))
    axes.set_title("own trace (o), random tokens (x)")
    axes.set_xscale("symlog", linthresh=1)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def fields_by_phase(text: str) -> dict:
    """An object of JSON whose keys are phases, for argparse."""
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is no JSON ({error})") from None
    phases = ("warmup", *PHASES)
    if not isinstance(given, dict) or not {*given} <= {*phases}:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is no object with keys among {', '.join(phases)}")
    return given


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("gsm-symbolic", "facts", "states"), default="gsm-symbolic")
    parser.add_argument("--runs", nargs="+", choices=[*GRID], default=[*GRID])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--gpus", nargs="+", default=["0"], help="their numbers; cpu: none")
    parser.add_argument("--base_model", help="a folder, where the hub is not there (README.md)")
    parser.add_argument("--over", type=fields_by_phase, default={}, help="JSON: fields by phase over every recipe")
    parser.add_argument(
        "--steps", type=fields_by_phase, default={}, help=f"JSON: steps by phase over {json.dumps(STEPS)}"
    )
    parser.add_argument("--small", action="store_true", help="a few steps and problems on a CPU: does all of it run?")
    parser.add_argument("--folder", type=Path, help="runs/smollm2-135m/TASK/evidence; evidence-small")
    parser.add_argument("--output", type=Path, help="of results; the folder's own when left out")
    parser.add_argument("--collect", action="store_true", help="run nothing")
    args = parser.parse_args()
    folder = args.folder or Path("runs/smollm2-135m") / args.task / ("evidence-small" if args.small else "evidence")
    if args.small:
        over = {phase: SMALL.get(phase, {}) | args.over.get(phase, {}) for phase in SMALL | args.over}
        args.gpus, args.over, args.steps = ["cpu"], over, dict.fromkeys(STEPS, 2) | args.steps
    grid = Grid(args.task, folder, args.base_model, args.over, STEPS | args.steps)
    failed, free = [], Queue()
    for gpu in args.gpus:
        free.put("" if gpu == "cpu" else gpu)

    def work(name: str, seed: int) -> None:
        gpu = free.get()
        try:
            grid.run(name, seed, gpu)
            print(f"{name}, seed {seed}: done", flush=True)  # noqa: T201
        except Refused as error:
            failed.append(name)
            print(f"{name}, seed {seed}: {error}", flush=True)  # noqa: T201
        finally:
            free.put(gpu)

    if not args.collect:
        todo = [(name, seed) for name in args.runs for seed in args.seeds]
        try:
            grid.check(args.runs)
        except Refused as error:
            parser.exit(1, f"{error}\n")
        with ThreadPoolExecutor(len(args.gpus)) as pool:
            list(pool.map(lambda one: work(*one), todo))
    rows = grid.collect()
    if rows:
        write_page(rows, grid.task, args.output or folder)
        print(results_table(rows))  # noqa: T201
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
