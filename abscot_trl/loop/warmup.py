"""
The warm-up by policy iteration (Stage 1): T rounds of

    traces -> bottleneck (eq. 3) -> merge -> traces -> distill (eq. 4) -> merge -> evaluate

`paper` and `informed` are the same loop with other fields: where the first traces come from (`initial`), what the
policy sees when it writes those of phase B (`distill_from`), and whether phase B rehearses the masked row.
Every stage reads files and writes a folder; it is done when its `manifest.json` is there, and is then skipped.
"""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import yaml

from abscot_trl.cli import TRAINING
from abscot_trl.data.prepare import load_prepared
from abscot_trl.data.problems import load_problems
from abscot_trl.data.splits import PHASES as PARTS
from abscot_trl.data.splits import run_splits, save_splits
from abscot_trl.errors import Refused
from abscot_trl.evaluation.results import read_results, write_results
from abscot_trl.evaluation.statistics import own_scores, paired_difference
from abscot_trl.loop.driver import Stage, is_done, launcher_of, locked, print_stages, print_times, run_stages
from abscot_trl.phases import PHASES, check_fields, parse, read_yaml
from abscot_trl.report.tables import results_table
from abscot_trl.traces.backends import SamplerArguments


@dataclass
class WarmupArguments(SamplerArguments):
    """
    The policy iteration.

    Args:
        run_dir (`str`): folder of the run; a second call continues it.
        model (`str`): extended checkpoint (`abscot init`).
        data (`str`): prepared data (`abscot data`).
        bottleneck, distill, evaluate (`str`): recipes of the phases, `{tuning}` in a name standing for `tuning`;
            `evaluate` may be left out.
        tuning (`str`): which of the phases' recipes: `lora` or `full`.
        name (`str`): the recipe's name in results: `informed`, `paper`.
        rounds (`int`): T.
        rows_per_phase (`int`): size of each part D_{t,1}, D_{t,2}.
        initial (`str`): traces of the first round: `uniform`, `cycle`, `power_law`, `clusters`.
        distill_from (`str`): what phase B's traces are drawn from: `prompt` (eq. 4) or `cot` (guided).
        rehearsal (`float`): loss weight of the masked row in phase B.
        keep (`str`): whose weights stay when no later stage needs them: `all`, `rounds` (the last model of each round)
            or `last`; all else of a stage stays.
        keep_checkpoints (`bool`): keep the checkpoints of finished phases (`save_total_limit` prunes while they run).
        from_stage, until (`str`, *optional*): first and last stage to run, such as `round2/distill`.
        dry_run (`bool`): say what is done and what is to do, and write nothing.
        launch (`str`): `accelerate`, each phase in a process of its own, or `inline`, all in this one.
    """

    run_dir: str = field(metadata={"help": "Folder of the run; a second call continues it."})
    model: str = field(metadata={"help": "Extended checkpoint (abscot init)."})
    data: str = field(metadata={"help": "Prepared data (abscot data)."})
    bottleneck: str = field(metadata={"help": "Recipe of phase A."})
    distill: str = field(metadata={"help": "Recipe of phase B."})
    evaluate: str | None = field(default=None, metadata={"help": "Recipe of the evaluation after each round."})
    tuning: str = field(
        default="lora",
        metadata={"help": "Which recipes {tuning} in their names stands for.", "choices": ["lora", "full"]},
    )
    name: str = field(default="informed", metadata={"help": "The recipe's name in results.json."})
    rounds: int = field(default=3, metadata={"help": "Rounds T."})
    rows_per_phase: int = field(default=5000, metadata={"help": "Rows of each part D_t,1 and D_t,2."})
    initial: str = field(
        default="clusters",
        metadata={
            "help": "Traces of the first round.",
            "choices": ["uniform", "cycle", "power_law", "clusters"],
        },
    )
    distill_from: str = field(
        default="cot",
        metadata={"help": "What phase B's traces are drawn from: prompt or cot.", "choices": ["prompt", "cot"]},
    )
    rehearsal: float = field(default=1.0, metadata={"help": "Loss weight of the masked row in phase B."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampled traces."})
    seed: int = field(default=0, metadata={"help": "Seed of splits, traces and training."})
    keep: str = field(
        default="all", metadata={"help": "Models whose weights stay.", "choices": ["all", "rounds", "last"]}
    )
    keep_checkpoints: bool = field(default=False, metadata={"help": "Keep the checkpoints of finished phases."})
    from_stage: str | None = field(default=None, metadata={"help": "First stage to run.", "aliases": ["--from"]})
    until: str | None = field(default=None, metadata={"help": "Last stage to run, e.g. round1/distill."})
    dry_run: bool = field(default=False, metadata={"help": "Say what is done and what is to do; write nothing."})
    launch: str = field(
        default="accelerate",
        metadata={"help": "A process a phase, or all in this one.", "choices": ["accelerate", "inline"]},
    )
    accelerate_config: str | None = field(
        default=None, metadata={"help": "accelerate configuration of the training phases: a file, or a name."}
    )

    def __post_init__(self):
        super().__post_init__()
        for phase in (*PARTS, "evaluate"):
            path = getattr(self, phase)
            setattr(self, phase, path and path.replace("{tuning}", self.tuning))
        if self.backend == "vllm" and self.launch == "inline":
            raise Refused("backend vllm hangs in a process that trains; use launch: accelerate")
        if not all(0 <= value < math.inf for value in (self.temperature, self.rehearsal)):
            raise Refused(
                f"temperature {self.temperature} and rehearsal {self.rehearsal} must be finite and not negative"
            )
        if self.rounds < 1 or self.rows_per_phase < 1:
            raise Refused(f"rounds and rows_per_phase must be at least 1, got {self.rounds}, {self.rows_per_phase}")


def stages(args: WarmupArguments) -> Iterator[Stage]:
    """The stages in order. Reads the phase recipes; what a stage needs of an earlier one is a path."""
    recipes = {phase: read_yaml(getattr(args, phase)) for phase in (*PARTS, "evaluate") if getattr(args, phase)}
    for phase, recipe in recipes.items():
        check_fields(recipe, PHASES[phase].classes, getattr(args, phase))
    run, policy = Path(args.run_dir), args.model
    sampling = {"backend": args.backend, "engine": args.engine, "server": args.server}
    for t in range(1, args.rounds + 1):
        for phase in PARTS:
            seed = args.seed + 1000 * t + (500 if phase == "distill" else 0)
            first = t == 1 and phase == "bottleneck"
            traces = run / f"round{t}" / f"{phase}-traces"
            yield Stage(
                f"round{t}/{phase}-traces",
                "traces",
                {
                    "model": policy,
                    "data": args.data,
                    "output_dir": str(traces),
                    "splits": str(run / "splits.json"),
                    "part": f"{t}.{phase}",
                    "method": args.initial if first else "policy",
                    "given": "cot" if phase == "bottleneck" else args.distill_from,
                    "temperature": args.temperature,
                    "seed": seed,
                    **({} if first else sampling),
                    "batch_tokens": args.batch_tokens,
                    "dtype": args.dtype,
                },
            )
            model = run / f"round{t}" / phase
            settings = recipes[phase] | {
                "model_name_or_path": policy,
                "data": args.data,
                "traces": str(traces),
                "output_dir": str(model),
                "resume_from_checkpoint": "true",
                "seed": seed,
            }
            if phase == "distill":
                settings["rehearsal"] = args.rehearsal
            yield Stage(f"round{t}/{phase}", phase, settings)
            if recipes[phase].get("use_peft"):
                merged = run / f"round{t}" / f"{phase}-merged"
                yield Stage(f"round{t}/{phase}-merge", "merge", {"adapter": str(model), "output_dir": str(merged)})
                model = merged
            policy = str(model)
        if args.evaluate:
            output = run / f"round{t}" / "evaluate"
            settings = recipes["evaluate"] | {"model": policy, "output_dir": str(output), "name": args.name}
            yield Stage(f"round{t}/evaluate", "evaluate", settings)


def check_stages(todo: list[Stage], args: WarmupArguments) -> None:
    """
    What can be refused before hours are spent: the stages' settings, the launcher's configuration, the problems.

    Training recipes were checked field by field in `stages`; building their `TrainingArguments` here would hold a GPU.

    Raises:
        Refused: as the stage itself would, later.
    """
    launcher_of(args)
    with tempfile.TemporaryDirectory() as folder:
        for stage in (stage for stage in todo if stage.phase not in TRAINING):
            if stage.settings.get("backend") == "vllm" and args.launch == "inline":
                raise Refused(f"{args.evaluate}: backend vllm hangs in a process that trains; use launch: accelerate")
            path = Path(folder) / f"{stage.phase}.yaml"
            path.write_text(yaml.safe_dump(stage.settings))
            try:
                parse(PHASES[stage.phase].classes, ["--config", str(path)])
            except ValueError as error:
                raise Refused(str(error).replace(str(path), str(getattr(args, stage.phase, path)))) from None
            if stage.phase == "evaluate":
                settings = stage.settings
                where = settings.get("problems_split", "test"), settings.get("problems_config")
                load_problems(settings["problems"], *where, limit=1)


def choose_stages(todo: list[Stage], args: WarmupArguments) -> list[Stage]:
    """
    Those from `from_stage` to `until`.

    Raises:
        Refused: no stage of that name, none between the two, or one before them that is not done.
    """
    names = [stage.name for stage in todo]
    for name in (args.from_stage, args.until):
        if name is not None and name not in names:
            raise Refused(f"no stage {name!r}; the run has {', '.join(names)}")
    first = names.index(args.from_stage or names[0])
    chosen = todo[first : names.index(args.until or names[-1]) + 1]
    if not chosen:
        raise Refused(f"from {args.from_stage} until {args.until} holds no stage: they are the other way round")
    missing = [stage.name for stage in todo[:first] if not is_done(stage)]
    if missing:
        raise Refused(f"from {args.from_stage}: {missing[0]} is not done; leave `from` out to run it too")
    return chosen


def collect_results(args: WarmupArguments) -> list[dict]:
    """Rows of all evaluated rounds, each with its `round`."""
    results = []
    for t in range(1, args.rounds + 1):
        path = Path(args.run_dir) / f"round{t}" / "evaluate" / "results.json"
        if path.is_file():
            results += [{**row, "round": t} for row in read_results(path)]
    return results


def lost_rounds(args: WarmupArguments) -> list[str]:
    """A sentence for each round that answers the same problems worse than the one before it (paired interval)."""
    paths = {t: Path(args.run_dir) / f"round{t}" / "evaluate" / "answers.jsonl" for t in range(1, args.rounds + 1)}
    own = {t: scores for t, path in paths.items() if path.is_file() and (scores := own_scores(path))}
    sentences = []
    for t in (t for t in own if t - 1 in own):
        difference, (low, high) = paired_difference([own[t][i] for i in own[t - 1]], list(own[t - 1].values()))
        if high < 0:
            now, before = (100 * fmean(own[r].values()) for r in (t, t - 1))
            sentences.append(
                f"round {t} ({now:.1f}) lost to round {t - 1} ({before:.1f}): {difference:.1f} points, 95 % interval "
                f"{low:.1f} to {high:.1f}; use round {t - 1}"
            )
    return sentences


def warmup(args: WarmupArguments) -> list[dict]:
    """
    `abscot warmup`: run all stages that are not done, and print results and wall times.

    Returns:
        The rows of `results.json`.

    Raises:
        Refused: recipes with unknown keys, too few rows, or a run that was started with other settings.
    """
    todo = list(stages(args))
    check_stages(todo, args)
    data, counts = load_prepared(args.data)
    longest, fits = counts["lengths"]["total"]["max"], read_yaml(args.bottleneck).get("max_length", 8192)
    if longest > fits:
        print(f"WARNING: {args.data} holds rows of {longest:.0f} tokens, {args.bottleneck} takes {fits}")  # noqa: T201
    chosen, run = choose_stages(todo, args), Path(args.run_dir)
    splits = run_splits(run / "splits.json", len(data), args.rounds, args.rows_per_phase, args.seed)
    if args.dry_run:
        print_stages(todo, chosen)
        return collect_results(args)
    run.mkdir(parents=True, exist_ok=True)

    def after(stage: Stage) -> None:
        if stage.phase == "evaluate":
            results = collect_results(args)
            write_results(run / "results.json", results)
            for sentence in lost_rounds(args):
                print(f"WARNING: {sentence}", flush=True)  # noqa: T201

    with locked(run) as lock:
        if not (run / "splits.json").is_file():
            save_splits(run / "splits.json", splits, len(data), args.seed)
        times = run_stages(run, todo, chosen, args, lock, after)
    results = collect_results(args)
    if results:
        print(results_table(results))  # noqa: T201
    print_times(times)
    return results
