"""
The grid: do traces carry on a real model, and what does each choice buy? `make evidence`.

    python recipes/smollm2-135m/evidence.py --gpus 0 1 2 3        # hours on one GPU; --runs content sft: some of it
    python recipes/smollm2-135m/evidence.py --collect             # results.json, table and picture of what is done

Every run is a warm-up (or a baseline) from recipes that are written beside it: this folder's, with fields of `GRID`
over them. All take the same number of steps from the same verbal model. A GPU takes a run at a time; the same command
goes on where a killed one was.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import yaml

from abscot_trl.errors import Refused
from abscot_trl.evaluation.results import read_results
from abscot_trl.loop.record import read_log
from abscot_trl.phases import read_yaml
from abscot_trl.report.gauges import level, readings
from abscot_trl.report.tables import results_table
from abscot_trl.report.verdict import verdicts
from abscot_trl.storage import read_manifest

HERE = Path(__file__).parent
PHASES = ("bottleneck", "distill", "evaluate", "init", "baseline.verbal")
STEPS = {"baseline.verbal": 1000, "bottleneck": 300, "distill": 1700}  # of 33,000 tokens
THREE = {"rounds": 3, "rows_per_phase": 10_000}  # a third of the steps each
# Stepwise internalisation packs no rows: about as many of them as a packed step has.
UNPACKED = {"per_device_train_batch_size": 128, "global_batch_size": 128, "max_length": 512}
# A run: fields over warmup.content.yaml; those of a phase over its own recipe. `baseline`: this one, and no warm-up.
GRID = {
    "content": {},
    "informed": {"initial": "clusters", "distill_from": "cot", "rehearsal": 1.0, "temperature": 0.7},
    "paper": {"initial": "uniform", "distill_from": "prompt", "temperature": 0.7},
    "paper-3-rounds": {"initial": "uniform", "distill_from": "prompt", "temperature": 0.7, **THREE},
    "content-3-rounds": {"distill_from": "cot", "rehearsal": 1.0, "temperature": 0.7, **THREE},
    "content-sampled": {"distill_from": "cot", "temperature": 0.7},
    "content-sampled-rehearsed": {"distill_from": "cot", "temperature": 0.7, "rehearsal": 1.0},
    "content-discrete": {"bottleneck": {"channel": "discrete"}},
    "content-ratio-4": {"ratio": 4.0},
    "content-ratio-12": {"ratio": 12.0},
    "content-ratio-20": {"ratio": 20.0},
    "content-16-codes": {"init": {"codebook_size": 16}},
    "content-256-codes": {"init": {"codebook_size": 256}},
    "content-5000-rows": {"rows_per_phase": 5_000},
    "content-100000-rows": {"rows_per_phase": 100_000},
    **{name: {"baseline": name} for name in ("base", "sft", "cot", "pause", "cut-cot")},
    "icot": {"baseline": "icot", "bottleneck": UNPACKED},
}


def abscot(log: Path, gpu: str | None, *arguments) -> None:
    """
    Raises:
        Refused: the command failed; what it said last.
    """
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
    with open(log, "a") as out:
        command = [sys.executable, "-m", "abscot_trl.cli", *map(str, arguments)]
        if subprocess.run(command, stdout=out, stderr=out, env=env).returncode:
            raise Refused(f"{log}: {log.read_text(errors='replace').strip().splitlines()[-1][:300]}")


class Grid:
    """
    The runs of one task below `folder`.

    Args:
        over (`dict`): fields by phase (`warmup`, `bottleneck`, ..) over every recipe, for another machine than ours.
    """

    def __init__(self, task: str, folder: Path, model: str | None, over: dict, steps: dict[str, int]):
        self.task, self.folder, self.model = task, folder, model
        self.over = {phase: {"max_steps": n} for phase, n in steps.items()}
        for phase, fields in over.items():
            self.over[phase] = self.over.get(phase, {}) | fields

    def recipe(self, where: Path, phase: str, fields: dict) -> Path:
        """This folder's recipe of `phase` with `fields` and what goes over every recipe, written to `where`."""
        path = HERE / f"{phase}.yaml"
        if phase == "evaluate":
            path = path if self.task == "gsm-symbolic" else HERE / f"evaluate.{self.task}.yaml"
            fields = fields | {"problems": str(self.folder.parent / "rows" / "test.jsonl")}
        where.mkdir(parents=True, exist_ok=True)
        made = where / f"{phase}.yaml"
        made.write_text(yaml.safe_dump(read_yaml(path) | self.over.get(phase, {}) | fields, sort_keys=False))
        return made

    def base(self, fields: dict, seed: int, gpu: str | None) -> tuple[Path, Path]:
        """The verbal model that runs with this codebook start from, and its data; made once."""
        size = fields.get("codebook_size", 64)
        where = self.folder / f"base-{size}-{seed}"
        init, data, verbal = where / "init", where / "data", where / "verbal"
        recipe = {"init": self.recipe(where, "init", fields), "verbal": self.recipe(where, "baseline.verbal", {})}
        if not init.is_dir():
            named = ["--base_model", self.model] if self.model else []
            abscot(where / "log", gpu, "init", "--config", recipe["init"], *named, "--output_dir", init)
        if not data.is_dir():
            rows = self.folder.parent / "rows" / "train.jsonl"
            abscot(where / "log", gpu, "data", "--config", HERE / "data.yaml", "--data", rows,
                   "--tokenizer", init, "--output_dir", data)  # fmt: skip
        if not (verbal / "training_log.json").is_file():
            abscot(where / "log", gpu, "baseline", "--config", recipe["verbal"], "--data", data,
                   "--model_name_or_path", init, "--output_dir", verbal, "--seed", seed,
                   "--resume_from_checkpoint", "true", *self.launcher())  # fmt: skip
        return verbal, data

    def launcher(self) -> list[str]:
        return [] if "accelerate_config" in self.over.get("warmup", {}) else ["--accelerate_config", "single"]

    def run(self, name: str, seed: int, gpu: str | None) -> None:
        """One run of the grid, to its end."""
        fields = dict(GRID[name])
        own = {phase: fields.pop(phase, {}) for phase in PHASES}
        where, rounds = self.folder / f"{name}-{seed}", fields.get("rounds", 1)
        for phase in ("bottleneck", "distill"):
            own[phase] = {"max_steps": self.over[phase]["max_steps"] // rounds} | own[phase]
        model, data = self.base(own["init"], seed, gpu)
        paths = {phase: str(self.recipe(where, phase, own[phase])) for phase in ("bottleneck", "distill", "evaluate")}
        shared = paths | {"run_dir": str(where / "run"), "model": str(model), "data": str(data), "seed": seed}
        over = self.over.get("warmup", {})
        if "baseline" in fields:
            warm = read_yaml(HERE / "warmup.content.yaml") | over
            kept = ("rows_per_phase", "accelerate_config", "launch")
            recipe = {key: warm[key] for key in kept if key in warm} | {"rounds": 1, "names": [fields["baseline"]]}
            recipe |= {"steps": sum(self.over[phase]["max_steps"] for phase in ("bottleneck", "distill"))}
            phase = "baselines"
        else:
            recipe, phase = read_yaml(HERE / "warmup.content.yaml") | {"name": name} | over | fields, "warmup"
        (where / f"{phase}.yaml").write_text(yaml.safe_dump(recipe | shared, sort_keys=False))
        abscot(where / "log", gpu, phase, "--config", where / f"{phase}.yaml")

    def collect(self) -> list[dict]:
        """The rows of all runs that are done, each with its `run` (and seed), hours, and the gauges of phase B."""
        rows = []
        for folder in sorted(self.folder.glob("*/run/results.json")):
            stages = [read_manifest(path.parent, "wall_s") for path in folder.parent.glob("**/manifest.json")]
            more = {"run": folder.parents[1].name, "hours": round(sum(s["wall_s"] for s in stages) / 3600, 3)}
            logs = [read_log(path) for path in sorted(folder.parent.glob("round*/distill"))]
            found = [readings(log) for log in logs if readings(log)]
            if found:
                last = found[-1]
                more |= {"gauge_first": level(last[0]), "gauge_last": level(last[-1])}
                more |= {"predictable": last[-1]["predictable"], "first_step": last[0]["step"]}
            rows += [row | more for row in read_results(folder)]
        return rows


def write_page(rows: list[dict], output: Path) -> None:
    """`results.json`, a table and a picture in `output`; how often the first gauges told the verdict."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    told = {verdict["own"]["run"]: verdict["level"] for verdict in verdicts(rows)}  # the last round's
    first = {row["run"]: row["gauge_first"] for row in rows if "gauge_first" in row}
    right = [(first[run] == "tokens") == (told[run] == "tokens") for run in first]
    (output / "results.md").write_text(
        f"{results_table(rows)}\n\nThe gauges at their first reading in phase B told whether the tokens carry in "
        f"{sum(right)} of {len(right)} runs.\n"
    )
    picture(rows, output / "frontier.png")


def picture(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for row in (row for row in rows if row["swap"] == "own"):
        reasoning = row["trace_tokens"]
        axes.plot(reasoning, row["accuracy"], "o", color="tab:blue" if row["mode"] == "abstract" else "tab:grey")
        axes.annotate(row["run"], (reasoning, row["accuracy"]), fontsize=7, xytext=(3, 3), textcoords="offset points")
    for row in (row for row in rows if row["swap"] == "random"):
        axes.plot(row["trace_tokens"], row["accuracy"], "x", color="tab:red")
    axes.set(xlabel="reasoning tokens a problem", ylabel="accuracy, %", title="own trace (o), random tokens (x)")
    axes.set_xscale("symlog", linthresh=1)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("gsm-symbolic", "facts", "states"), default="gsm-symbolic")
    parser.add_argument("--runs", nargs="+", choices=[*GRID], default=[*GRID])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--gpus", nargs="+", default=["0"], help="their numbers; cpu: none")
    parser.add_argument("--base_model", help="a folder, where the hub is not there (README.md)")
    parser.add_argument("--over", type=json.loads, default={}, help="JSON: fields by phase over every recipe")
    parser.add_argument("--steps", type=json.loads, default={}, help="JSON: steps by phase")
    parser.add_argument("--folder", type=Path, help="runs/smollm2-135m/TASK/evidence")
    parser.add_argument("--output", type=Path, help="of results; the folder's own when left out")
    parser.add_argument("--collect", action="store_true", help="run nothing")
    args = parser.parse_args()
    folder = args.folder or Path("runs/smollm2-135m") / args.task / "evidence"
    grid = Grid(args.task, folder, args.base_model, args.over, STEPS | args.steps)
    failed, free = [], Queue()
    for gpu in args.gpus:
        free.put(None if gpu == "cpu" else gpu)

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
        todo = [(name, seed) for seed in args.seeds for name in args.runs]
        try:
            for size, seed in dict.fromkeys((GRID[n].get("init", {}).get("codebook_size", 64), s) for n, s in todo):
                grid.base({"codebook_size": size}, seed, None if args.gpus[0] == "cpu" else args.gpus[0])
        except Refused as error:
            parser.exit(1, f"{error}\n")
        with ThreadPoolExecutor(len(args.gpus)) as pool:
            list(pool.map(lambda one: work(*one), todo))
    rows = grid.collect()
    if rows:
        write_page(rows, args.output or folder)
        print(results_table(rows))  # noqa: T201
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
