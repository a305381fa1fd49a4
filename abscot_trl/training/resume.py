"""
A training phase that may die at any second goes on from its last whole checkpoint.

transformers writes a checkpoint file by file, each process its share, and removes older ones before the new one is
whole. Here a checkpoint counts once it is sealed, after all processes have written; only then do older ones go.
"""

import json
import shutil
from pathlib import Path

from transformers import TrainerCallback

from abscot_trl.errors import Refused
from abscot_trl.storage import write_whole

MARK = ".abscot"  # in the folder of a training phase from its beginning
SEAL = "sealed.json"
LOG_FILE = "training_log.json"  # the last file to be moved into place: with it a phase has ended


def sealed_checkpoints(output_dir: str | Path) -> list[Path]:
    """The whole checkpoints of an unfinished phase, oldest first."""
    found = [seal.parent for seal in Path(output_dir).glob(f"checkpoint-*/{SEAL}")]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def remove_checkpoint(path: Path) -> None:
    """The seal goes first: what a kill leaves of it counts no more."""
    (path / SEAL).unlink(missing_ok=True)
    shutil.rmtree(path)


class SealCheckpoints(TrainerCallback):
    """
    Seals each checkpoint, then keeps the newest `args.save_total_limit` sealed ones (all when it is `None`).

    A resumed phase repeats the log of an uninterrupted one, which needs checkpoints at logged steps.

    Raises:
        Refused: `save_steps` is no multiple of `logging_steps`.
    """

    def __init__(self, args, trainer):
        self.keep, args.save_total_limit = args.save_total_limit, None  # transformers' own would run before the seal
        self.trainer = trainer
        if args.save_strategy == "steps" and args.save_steps % args.logging_steps:
            raise Refused(
                f"save_steps {args.save_steps} must be a multiple of logging_steps {args.logging_steps}: the losses "
                "between would be missing from a resumed run's log"
            )

    def on_train_begin(self, args, state, control, **kwargs):
        logged = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
        self.trainer._total_train_tokens, self.trainer._logged_step = max(logged, default=0), state.global_step

    def on_save(self, args, state, control, **kwargs):
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_whole(folder / SEAL, json.dumps({"step": state.global_step, "of": state.max_steps}) + "\n")
            if self.keep:
                for old in sealed_checkpoints(args.output_dir)[: -self.keep]:
                    remove_checkpoint(old)


def prepare_output(output_dir: str | Path, resume: bool) -> None:
    """
    Clear what a killed phase left half written; its sealed checkpoints stay.

    Raises:
        Refused: a trained model is there, or checkpoints without `resume`.
    """
    output = Path(output_dir)
    written = [name for name in (LOG_FILE, "config.json", "adapter_config.json") if (output / name).is_file()]
    sealed = sealed_checkpoints(output)
    if LOG_FILE in written or (written and not (resume and sealed)):
        raise Refused(f"{output} holds a trained model ({written[0]}); choose another output_dir or remove it")
    if sealed and not resume:
        raise Refused(
            f"{output} holds {sealed[-1].name} of a phase that did not end; go on from it with "
            "--resume_from_checkpoint true, or remove the folder"
        )
    for path in output.iterdir() if output.is_dir() else ():
        if path in sealed or path.name == MARK:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    output.mkdir(parents=True, exist_ok=True)
    (output / MARK).write_text("A training phase of abscot_trl writes here.\n")
