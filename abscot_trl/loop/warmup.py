"""
The warm-up by policy iteration (Stage 1): T rounds of

    traces -> bottleneck (eq. 3) -> merge -> traces -> distill (eq. 4) -> merge -> evaluate

`paper` and `informed` are the same loop with other fields: where the first traces come from (`initial`), and what
phase B's are drawn or made from (`distill_from`).
Every stage reads files and writes a folder; it is done when its `manifest.json` is there, and is then skipped.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean

from abscot_trl.checkpoint import load_tokenizer
from abscot_trl.data.prepare import load_prepared, row_lengths
from abscot_trl.data.prompts import load_prompts
from abscot_trl.data.splits import PHASES as PARTS
from abscot_trl.data.splits import run_splits
from abscot_trl.errors import Refused
from abscot_trl.evaluation.results import read_results
from abscot_trl.evaluation.statistics import own_scores, paired_difference
from abscot_trl.loop.arguments import RunArguments
from abscot_trl.loop.driver import drive, tell
from abscot_trl.loop.launch import check_launch
from abscot_trl.loop.lengths import check_lengths
from abscot_trl.loop.stages import Stage, check_stages, phase_recipes
from abscot_trl.report.gauges import WORDS, level, readings, says
from abscot_trl.report.runs import read_log
from abscot_trl.storage import check_folder
from abscot_trl.traces.backends import SamplerArguments
from abscot_trl.traces.initial import RANDOM_METHODS
from abscot_trl.training.steps import GAUGE_ROWS, ROWS_A_PROBE, probes
from abscot_trl.vocabulary import AbstractVocabulary


@dataclass(kw_only=True)
class WarmupArguments(SamplerArguments, RunArguments):
    """
    The policy iteration.

    Args:
        name (`str`): the recipe's name in results: `informed`, `paper`.
        initial (`str`): traces of the first round: `uniform`, `cycle`, `power_law`, `content`. The codes of
            `content` begin as the tokens that they stand for.
        ratio (`float`): of `content`: tokens of the CoT for each token of its trace.
        distill_from (`str`): what phase B's traces are drawn from: `prompt` (eq. 4) or `cot` (guided); or `content`:
            all traces are made as phase A's first ones, by the same codes, and nothing is sampled.
        prompt_tokens, cot_tokens, answer_tokens (`int`): mean lengths of the rows, as `abscot plan` takes them while
            `data` is not there yet (less in proportion where a phase's `max_length` is); else they say nothing.
        grpo (`str`, *optional*): recipe of stage 2, `{tuning}` as in the phases': after the last round its model is
            trained on by `abscot grpo` and evaluated once more, as `<name>-grpo`.
        stop_when_empty (`bool`): stop after a phase B whose gauges say that the answer does not read its trace: its
            loss after the own is not 2 standard errors, paired by row, below those after random tokens, another row's
            trace and none. Where that cannot be told it does not stop. The same command without it goes on.
    """

    name: str = field(default="informed", metadata={"help": "The recipe's name in results.json."})
    initial: str = field(
        default="content",
        metadata={
            "help": "Traces of the first round.",
            "choices": ["uniform", "cycle", "power_law", "content"],
        },
    )
    ratio: float = field(default=8.0, metadata={"help": "content: tokens of the CoT for each token of its trace."})
    distill_from: str = field(
        default="content",
        metadata={
            "help": "What phase B's traces are drawn from: prompt, cot, or made from: content.",
            "choices": ["prompt", "cot", "content"],
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampled traces."})
    prompt_tokens: int = field(default=200, metadata={"help": "Mean prompt length, for a plan without data."})
    cot_tokens: int = field(default=4500, metadata={"help": "Mean CoT length, for a plan without data."})
    answer_tokens: int = field(default=600, metadata={"help": "Mean answer length, for a plan without data."})
    grpo: str | None = field(default=None, metadata={"help": "Recipe of GRPO after the last round."})
    stop_when_empty: bool = field(
        default=False, metadata={"help": "Stop after a phase B whose answers do not read their traces, by its gauges."}
    )

    def __post_init__(self):
        SamplerArguments.__post_init__(self)
        RunArguments.__post_init__(self)
        if self.grpo == "":
            raise Refused("grpo names no recipe")
        self.grpo = self.grpo and self.grpo.replace("{tuning}", self.tuning)
        if self.backend == "vllm" and self.launch == "inline":
            raise Refused("backend vllm hangs in a process that trains; use launch: accelerate")
        if self.distill_from == "content" != self.initial:
            raise Refused(f"distill_from: content goes with initial: content, not {self.initial}")
        for name in ("prompt_tokens", "cot_tokens", "answer_tokens"):
            if getattr(self, name) < 1:
                raise Refused(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.temperature < math.inf:
            raise Refused(f"temperature {self.temperature} must be finite and not negative")


def trace_making(args: WarmupArguments, phase: str, policy: str, first: bool) -> dict:
    """How a phase's traces are made: the `first` of all as `initial` says; the others so again, or sampled."""
    if not first and args.distill_from != "content":
        given = "cot" if phase == "bottleneck" else args.distill_from
        how = {"model": policy, "method": "policy", "given": given}
        return how | {"backend": args.backend, "engine": args.engine, "server": args.server}
    how = {"model": args.model, "method": args.initial, "given": "cot"}
    if not first:
        how["codes"] = f"{args.run_dir}/round1/bottleneck-traces"
    elif args.initial == "content":
        how["ratio"] = args.ratio
    if args.initial not in RANDOM_METHODS and "data_parallel_size" in (args.engine or {}):
        how["engine"] = {"data_parallel_size": args.engine["data_parallel_size"]}
    return how


def stages(args: WarmupArguments) -> Iterator[Stage]:
    """The stages in order. Reads the phase recipes; what a stage needs of an earlier one is a path."""
    check_folder(args.run_dir)
    recipes = phase_recipes(args)
    run, policy = Path(args.run_dir), args.model
    for t in range(1, args.rounds + 1):
        for phase in PARTS:
            seed = args.seed + 1000 * t + (500 if phase == "distill" else 0)
            first = t == 1 and phase == "bottleneck"
            traces = run / f"round{t}" / f"{phase}-traces"
            settings = trace_making(args, phase, policy, first) | {
                "data": args.data,
                "output_dir": str(traces),
                "splits": str(run / "splits.json"),
                "part": f"{t}.{phase}",
                "temperature": args.temperature,
                "seed": seed,
                "batch_tokens": args.batch_tokens,
                "dtype": args.dtype,
            }
            yield Stage(f"round{t}/{phase}-traces", "traces", settings)
            if first and args.initial == "content":
                codes = str(run / "round1" / "codes")
                yield Stage("round1/codes", "init", {"base_model": policy, "codes": str(traces), "output_dir": codes})
                policy = codes
            model = run / f"round{t}" / phase
            settings = recipes[phase] | {
                "model_name_or_path": policy,
                "data": args.data,
                "traces": str(traces),
                "output_dir": str(model),
                "resume_from_checkpoint": True,
                "seed": seed,
            }
            if phase == "distill":
                settings["rehearsal"] = args.rehearsal
            yield from merged(stage := Stage(f"round{t}/{phase}", phase, settings))
            policy = trained(stage)
        if args.evaluate:
            yield evaluation(recipes["evaluate"], policy, run / f"round{t}", args.name)
    if args.grpo:
        settings = recipes["grpo"] | {
            "model_name_or_path": policy,
            "output_dir": str(run / "grpo" / "train"),
            "resume_from_checkpoint": True,
            "seed": args.seed,
        }
        yield from merged(stage := Stage("grpo/train", "grpo", settings))
        if args.evaluate:
            yield evaluation(recipes["evaluate"], trained(stage), run / "grpo", f"{args.name}-grpo")


def trained(stage: Stage) -> str:
    """The full checkpoint that a training stage ends in."""
    return f"{stage.output}-merged" if stage.settings.get("use_peft") else str(stage.output)


def merged(stage: Stage) -> Iterator[Stage]:
    """A training stage and, where it trains an adapter, the merge of it."""
    yield stage
    if stage.settings.get("use_peft"):
        yield Stage(f"{stage.name}-merge", "merge", {"adapter": str(stage.output), "output_dir": trained(stage)})


def evaluation(recipe: dict, model: str, folder: Path, name: str) -> Stage:
    settings = recipe | {"model": model, "output_dir": str(folder / "evaluate"), "name": name}
    return Stage(f"{folder.name}/evaluate", "evaluate", settings)


def collect_results(args: WarmupArguments) -> list[dict]:
    """Rows of all evaluated rounds, each with its `round`, and of GRPO."""
    results = []
    for t in range(1, args.rounds + 1):
        path = Path(args.run_dir) / f"round{t}" / "evaluate" / "results.json"
        if path.is_file():
            results += [{**row, "round": t} for row in read_results(path)]
    path = Path(args.run_dir) / "grpo" / "evaluate" / "results.json"
    return results + (read_results(path) if path.is_file() else [])


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


def check_gauges(todo: list[Stage], rows: int) -> None:
    """
    Raises:
        Refused: phases have no gauges, so that `stop_when_empty` could never stop.
    """
    for stage in (stage for stage in todo if stage.phase == "distill" and not probes(rows, stage.settings)):
        wanted, most = stage.settings.get("gauge_rows", GAUGE_ROWS), rows // ROWS_A_PROBE
        remedy = f"set gauge_rows to between 2 and {most}" if most >= 2 else f"give {2 * ROWS_A_PROBE} rows a phase"
        raise Refused(
            f"stop_when_empty: {stage.name} has no gauges: gauge_rows {wanted} of rows_per_phase {rows}; {remedy}, or "
            "leave stop_when_empty out"
        )


def check_grpo(args: WarmupArguments, recipe: dict) -> None:
    """
    What stage 2 would refuse of its prompts and rewards when the warm-up has ended.

    Raises:
        Refused: as `abscot grpo`, of the fields that need no GPU to be looked at; the message names the recipe.
    """
    from abscot_trl.training.grpo_phase import GRPOArguments  # with trl's GRPO trainer

    names = {field.name for field in fields(GRPOArguments)}
    try:
        load_prompts(GRPOArguments(**{key: recipe[key] for key in names & recipe.keys()}), load_tokenizer(args.model))
    except (Refused, TypeError) as error:
        raise Refused(f"{args.grpo}: {error}") from error
    if recipe.get("use_vllm") and args.launch == "inline":
        raise Refused(f"{args.grpo}: use_vllm hangs in a process that has trained; use launch: accelerate")


def judge(stage: Stage, stop_when_empty: bool) -> None:
    """
    Say what the gauges of a training stage were at its end.

    Raises:
        Refused: `stop_when_empty`, and after phase B the answer does not read its trace.
    """
    found = readings(read_log(stage.output)) if stage.phase in PARTS else []
    if found:
        print(f"{stage.name}: {says(found[-1])}", flush=True)  # noqa: T201
        if stop_when_empty and stage.phase == "distill" and level(found[-1]) not in ("tokens", "open"):
            raise Refused(
                f"stopped after {stage.name}, as stop_when_empty asks: {WORDS[level(found[-1])]}. All that was made "
                "stays; the same command without stop_when_empty goes on from there"
            )
    elif stage.phase in PARTS and (wanted := stage.settings.get("gauge_rows", GAUGE_ROWS)):
        print(  # noqa: T201
            f"{stage.name}: whether its answers read their traces is not known: gauge_rows {wanted} takes "
            f"{ROWS_A_PROBE * wanted} rows a phase, 2, the fewest, {2 * ROWS_A_PROBE}",
            flush=True,
        )


def warmup(args: WarmupArguments) -> list[dict]:
    """
    `abscot warmup`: run all stages that are not done, and print results and wall times.

    Returns:
        The rows of `results.json`.

    Raises:
        Refused: recipes with unknown keys, too few rows, rows that a phase will refuse for their length, or a run
            that was started with other settings; or traces that carry nothing, with `stop_when_empty`.
    """
    todo = list(stages(args))
    check_launch(todo, args)
    check_stages(todo, args)
    for stage in todo:
        if stage.phase == "grpo" and not args.dry_run:  # it may ask the hub
            check_grpo(args, stage.settings)
    if args.stop_when_empty:
        check_gauges(todo, args.rows_per_phase)
    data, _ = load_prepared(args.data)
    splits = run_splits(Path(args.run_dir) / "splits.json", len(data), args.rounds, args.rows_per_phase, args.seed)
    for sentence in check_lengths(todo, row_lengths(data), splits, AbstractVocabulary.load(args.model), args.model):
        print(f"WARNING: {sentence}", flush=True)  # noqa: T201

    def ended(stage: Stage) -> None:
        if stage.phase == "evaluate":
            tell(args.run_dir, stage.settings["model"])
        judge(stage, args.stop_when_empty)

    return drive(
        todo,
        args,
        args.name,
        splits,
        len(data),
        collect=lambda: collect_results(args),
        warn=lambda: lost_rounds(args),
        judge=ended,
    )
