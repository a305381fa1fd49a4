"""Fields of the commands that drive a list of stages."""

import math
from dataclasses import dataclass, field

from abscot_trl.errors import Refused


@dataclass(kw_only=True)
class DriverOptions:
    """
    How the stages of a run are driven.

    Args:
        keep (`str`): whose weights stay when no later stage needs them: `all`, `rounds` (the last model of each round)
            or `last`; all else of a stage stays.
        keep_checkpoints (`bool`): keep the checkpoints of finished phases (`save_total_limit` prunes while they run).
        from_stage, until (`str`, *optional*): first and last stage to run, such as `round2/distill`.
        dry_run (`bool`): say what is done, what has begun and what is to do, and write nothing.
        launch (`str`): `accelerate`, each phase in a process of its own, or `inline`, all in this one.
        accelerate_config (`str`, *optional*): accelerate's configuration of the training phases; without one they
            are trained in one process, on one card.
        num_processes (`int`, *optional*): how many in place of that configuration's.
        nodes (`list[str]`, *optional*): names of the machines that train, and sample traces, together. This command
            runs on the first, where the first process is, and which the others reach by that name. All of them share
            the disk that holds model, data, run and this Python. Its `num_processes` counts the processes of all.
        launcher (`str`, *optional*): what starts a command on the machine `{node}`, such as
            `srun --nodes=1 --ntasks=1 --nodelist={node}` or `ssh -tt {node} cd /where/this/runs &&`. It ends with that
            command and its exit code, and ends it when it is told to (SIGTERM).
    """

    keep: str = field(
        default="all", metadata={"help": "Models whose weights stay.", "choices": ["all", "rounds", "last"]}
    )
    keep_checkpoints: bool = field(default=False, metadata={"help": "Keep the checkpoints of finished phases."})
    from_stage: str | None = field(default=None, metadata={"help": "First stage to run.", "aliases": ["--from"]})
    until: str | None = field(default=None, metadata={"help": "Last stage to run, e.g. round1/distill."})
    dry_run: bool = field(default=False, metadata={"help": "Say what is done, begun and to do; write nothing."})
    launch: str = field(
        default="accelerate",
        metadata={"help": "A process a phase, or all in this one.", "choices": ["accelerate", "inline"]},
    )
    accelerate_config: str | None = field(
        default=None, metadata={"help": "accelerate configuration of the training phases: a file, or a name."}
    )
    num_processes: int | None = field(
        default=None, metadata={"help": "Processes that train, in place of the accelerate configuration's."}
    )
    nodes: list[str] | None = field(
        default=None, metadata={"help": "Machines that train and sample together; this runs on the first."}
    )
    launcher: str | None = field(
        default=None, metadata={"help": "Starts a command on {node}: 'srun --nodes=1 --ntasks=1 --nodelist={node}'."}
    )


@dataclass(kw_only=True)
class RunArguments(DriverOptions):
    """
    What a warm-up and the baselines it is compared with have in common: rows, steps, evaluation.

    Args:
        run_dir (`str`): folder of the run; a second call continues it.
        model (`str`): extended checkpoint (`abscot init`).
        data (`str`): prepared data (`abscot data`).
        bottleneck, distill, evaluate (`str`): recipes of the phases, `{tuning}` in a name standing for `tuning`;
            a warm-up may leave `evaluate` out.
        tuning (`str`): which of the phases' recipes: `lora` or `full`.
        rounds (`int`): T.
        rows_per_phase (`int`): size of each part D_{t,1}, D_{t,2}.
        rehearsal (`float`): loss weight of the masked row in phase B.
        set (`list[str]`): `phase.field=value`, over the recipe of that phase (bottleneck, distill, evaluate, grpo);
            the value is YAML. Those of the command line come after those of `--config`, the last of a field holds.
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
    rounds: int = field(default=1, metadata={"help": "Rounds T."})
    rows_per_phase: int = field(default=5000, metadata={"help": "Rows of each part D_t,1 and D_t,2."})
    rehearsal: float = field(default=0.0, metadata={"help": "Loss weight of the masked row in phase B."})
    seed: int = field(default=0, metadata={"help": "Seed of splits, traces and training."})
    set: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Fields of the phases, over their recipes: bottleneck.max_length=4096 ..",
            "action": "extend",
        },
    )

    def __post_init__(self):
        for phase in ("bottleneck", "distill", "evaluate"):
            path = getattr(self, phase)
            if path == "":
                raise Refused(f"{phase} names no recipe")
            setattr(self, phase, path and path.replace("{tuning}", self.tuning))
        if not 0 <= self.rehearsal < math.inf:
            raise Refused(f"rehearsal {self.rehearsal} must be finite and not negative")
        if self.rounds > 1000:
            raise Refused(f"rounds {self.rounds} are over 1000; the paper has 3")
        if self.rounds < 1 or self.rows_per_phase < 1:
            raise Refused(f"rounds and rows_per_phase must be at least 1, got {self.rounds}, {self.rows_per_phase}")
