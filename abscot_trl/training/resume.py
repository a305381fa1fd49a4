"""
A training phase that may die at any second goes on from its last whole checkpoint.

transformers writes a checkpoint file by file, each process its share, and removes older ones before the new one is
whole. Here a checkpoint counts once it is sealed, after all processes have written; only then do older ones go.

A phase begins in a folder that is absent or empty and leaves its mark there; in a folder without the mark nothing is
ever removed or overwritten.
"""

import json
import math
import platform
import shutil
from pathlib import Path
from typing import NoReturn

import torch
from transformers import TrainerCallback

from abscot_trl.errors import Refused
from abscot_trl.storage import look_again, write_whole

MARK = ".abscot"  # in the folder of a training phase from its beginning
SEAL = "sealed.json"
FINAL = ".final"  # where the trained model is written before it is moved into place
LOG_FILE = "training_log.json"  # the last file to be moved into place: with it a phase has ended

# Several processes on CPU load their optimisers to "cpu:0" and "cpu:1", places that torch.load does not know.
torch.serialization.register_package(
    11, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
)


def sealed_checkpoints(output_dir: str | Path) -> list[Path]:
    """The whole checkpoints of an unfinished phase, oldest first."""
    sealed = [seal.parent for seal in Path(output_dir).glob(f"checkpoint-*/{SEAL}")]
    return sorted(sealed, key=lambda path: int(path.name.rpartition("-")[2]))


def last_checkpoint(output_dir: str | Path, accelerator) -> str | None:
    """
    The newest sealed checkpoint as the first process sees it: a network disk may show others an older state.

    Raises:
        Refused: a process on another machine does not see the folder that the first has marked.
    """
    sealed = sealed_checkpoints(output_dir)
    step = float(sealed[-1].name.rpartition("-")[2]) if sealed and accelerator.is_main_process else 0.0
    step = int(accelerator.reduce(torch.tensor(step, device=accelerator.device), reduction="sum").item())
    look_again(output_dir)
    if not look_again(Path(output_dir) / MARK):
        raise Refused(
            f"output_dir {output_dir} is not on a disk that all machines share: {platform.node()} does not see what "
            "the first process wrote there"
        )
    return str(Path(output_dir) / f"checkpoint-{step}") if step else None


def remove_checkpoint(path: Path) -> None:
    """The seal goes first: what a kill leaves of it counts no more."""
    (path / SEAL).unlink(missing_ok=True)
    shutil.rmtree(path)


class SealCheckpoints(TrainerCallback):
    """
    Seals each checkpoint, then keeps the newest `keep` sealed ones (all when it is `None`).

    A step that is saved is logged too, so that a resumed phase repeats the log of an uninterrupted one.
    """

    def __init__(self, trainer, keep: int | None):
        self.trainer, self.keep = trainer, keep

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step > state.max_steps:
            raise Refused(
                f"the checkpoint in {args.output_dir} has taken {state.global_step} steps, more than max_steps "
                f"{state.max_steps}; raise it, or choose another output_dir"
            )
        logged = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
        self.trainer._total_train_tokens = max(logged, default=0)
        self.trainer._logged_step = self.trainer._begun_at = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save

    on_epoch_end = on_step_end  # save_strategy: epoch

    def on_save(self, args, state, control, **kwargs):
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_whole(folder / SEAL, json.dumps({"step": state.global_step, "of": state.max_steps}) + "\n")
            if self.keep:
                for old in sealed_checkpoints(args.output_dir)[: -self.keep]:
                    remove_checkpoint(old)


class SealedTrainer:
    """
    What the trainers share, before trl's class: weights and losses that are not finite end a phase before they are
    written, and the codebook goes with the weights. Has `vocabulary`; `_logged_step` is the last step logged,
    `_begun_at` the step of the checkpoint that the phase goes on from.
    """

    _finite = True
    _logged_step = _begun_at = 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Of a resumed phase without transformers' means: they divide what this attempt did by the steps of all."""
        if self._begun_at:
            for name in ("train_loss", "train_samples_per_second", "train_steps_per_second"):
                logs.pop(name, None)
        super().log(logs, start_time)

    def _run_epoch(self, **kwargs):
        """Nothing is left to train after a checkpoint of the last step; transformers would take one step more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)

    def _issue_warnings_after_load(self, load_result):
        """A tied weight is saved once: that a checkpoint lacks its second name means nothing."""
        tied = getattr(self.model, "all_tied_weights_keys", {})
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """
        As in `Trainer`, on all processes.

        Raises:
            Refused: the weights are not finite; nothing was written.
        """
        super().save_model(output_dir, _internal_call)
        finite = torch.tensor(float(self._finite), device=self.accelerator.device)  # only one process has looked
        if self.accelerator.reduce(finite, reduction="sum").item() < self.accelerator.num_processes:
            logged = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
            what = f"after step {self.state.global_step} the weights are not finite"
            self._diverged(what + (f" (last loss {logged[-1]:g})" if logged else ""))

    def _save(self, output_dir: str | None = None, state_dict=None):
        trained = state_dict or {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._finite = all(bool(weight.isfinite().all()) for weight in trained.values())
        if self._finite:
            super()._save(output_dir, state_dict)
            self.vocabulary.save(output_dir or self.args.output_dir)

    def _diverged(self, what: str) -> NoReturn:
        sealed = sealed_checkpoints(self.args.output_dir)
        stays = f"; {sealed[-1]} stays" if sealed else ""
        raise Refused(
            f"{what}: training diverged at learning_rate {self.args.learning_rate:g}. Lower it or raise warmup_steps, "
            f"and begin in another output_dir{stays}"
        )

    def _check_loss(self, logs: dict[str, float]) -> None:
        """
        Raises:
            Refused: the logged loss, the mean over all processes, is not finite: they stop together.
        """
        if not math.isfinite(logs.get("loss", 0.0)):
            first, last = self._logged_step + 1, self.state.global_step
            steps = f"step {last}" if first == last else f"steps {first} to {last}"
            self._diverged(f"the loss of {steps} is {logs['loss']}")


def check_output(output_dir: str | Path, resume: bool) -> None:
    """
    Refuse a folder that a phase must not write to; nothing is changed, so that inputs can be read first.

    Raises:
        Refused: it is no folder, or holds files but not our mark;
            a trained model is there, or checkpoints without `resume`.
    """
    output = Path(output_dir)
    try:
        empty = not any(output.iterdir())
    except OSError as error:
        if not isinstance(error, FileNotFoundError) or output.is_symlink():
            raise Refused(f"output_dir {output} is no folder that could be written ({error.strerror})") from error
        return
    if empty:
        return
    written = [name for name in (LOG_FILE, "config.json", "adapter_config.json") if (output / name).is_file()]
    if LOG_FILE in written:
        raise Refused(f"{output} holds a trained model ({LOG_FILE}); choose another output_dir or remove it")
    if not (output / MARK).is_file():
        raise Refused(f"{output} holds files that no phase of ours wrote; choose another output_dir")
    sealed = sealed_checkpoints(output)
    if sealed and not resume:
        raise Refused(
            f"{output} holds {sealed[-1].name} of a phase that did not end; go on from it with "
            "--resume_from_checkpoint true, or remove the folder"
        )
    if written and not sealed:
        raise Refused(f"{output} holds a trained model ({written[0]}); choose another output_dir or remove it")


def begin_output(output_dir: str | Path) -> None:
    """Mark a folder that `check_output` has let pass, and clear what a killed phase left half written there."""
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARK).write_text("A training phase of abscot_trl writes here.\n")
    half = {*output.glob("checkpoint-[0-9]*/"), *output.glob(FINAL)} - {*sealed_checkpoints(output)}
    for path in half:
        shutil.rmtree(path)
