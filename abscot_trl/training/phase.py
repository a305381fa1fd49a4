"""`abscot bottleneck`, `distill` and `baseline`: load the inputs of a training phase, train, save."""

import copy
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, List, Value
from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl import ModelConfig

from abscot_trl.card import read_origin, save_origin, write_card
from abscot_trl.checkpoint import check_model, load_tokenizer, verify_checkpoint
from abscot_trl.data.prepare import load_prepared
from abscot_trl.data.splits import part_rows
from abscot_trl.storage import at_work
from abscot_trl.traces.files import read_traces
from abscot_trl.training.adapters import lora_config
from abscot_trl.training.baselines import BaselineTrainer
from abscot_trl.training.bottleneck import BottleneckSFTTrainer
from abscot_trl.training.configs import BaselineConfig, BottleneckConfig, DistillationConfig, built, check_settings
from abscot_trl.training.distillation import SelfDistillationTrainer
from abscot_trl.training.resume import FINAL, LOG_FILE, SealedTrainer, begin_output, check_output, last_checkpoint
from abscot_trl.vocabulary import AbstractVocabulary

STARTS = (
    "loss_trace may start far above loss_trace_uniform (ln M): the new tokens first compete with the whole "
    "vocabulary. Below it something was learnt about the trace."
)


@dataclass
class TrainArguments:
    """
    Inputs of `abscot bottleneck` and `distill`.

    Args:
        data (`str`): prepared data (`abscot data`).
        traces (`str`): folder written by `abscot traces`; its rows are trained.
    """

    data: str = field(metadata={"help": "Prepared data (abscot data)."})
    traces: str = field(metadata={"help": "Folder written by abscot traces; its rows are trained."})


@dataclass
class BaselineArguments:
    """
    Inputs of `abscot baseline`.

    Args:
        data (`str`): prepared data (`abscot data`).
        splits, part (`str`, *optional*): staged splits, and the part whose rows are trained; without `part` those of
            all parts, without `splits` all rows.
    """

    data: str = field(metadata={"help": "Prepared data (abscot data)."})
    splits: str | None = field(default=None, metadata={"help": "Staged splits; none: all rows."})
    part: str | None = field(default=None, metadata={"help": "Part of the splits; none: all of them."})


def training_rows(
    args: TrainArguments | BaselineArguments, vocabulary: AbstractVocabulary, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """The prepared rows of a phase, as its trainer takes them: with their `trace` column unless it is a baseline's."""
    data, _ = load_prepared(args.data, tokenizer)
    columns = data.select_columns(["prompt_ids", "cot_ids", "answer_ids"])
    if isinstance(args, BaselineArguments):
        return columns.select(part_rows(args.splits, args.part, len(data)))
    traces: list[list[int] | None] = [None] * len(data)
    records = read_traces(args.traces, data["id"][:], vocabulary)
    for record in records:
        traces[record["row"]] = record["trace"]
    # The column first, then the rows: the other way round would write all chosen rows again.
    columns = columns.add_column("trace", traces, feature=List(Value("int32")))
    return columns.select([record["row"] for record in records])


def train(
    trainer_class: type[SealedTrainer],
    inputs: Callable[[AbstractVocabulary, PreTrainedTokenizerBase], dict],
    training_args: TrainingArguments,
    model_args: ModelConfig,
) -> dict:
    """
    Train one phase and save a full checkpoint, or an adapter to be merged, in `training_args.output_dir`.

    With `resume_from_checkpoint: true` a killed phase goes on from its last sealed checkpoint (see `resume.py`) and
    ends in the same files; without one it begins.

    Args:
        inputs (`Callable`): what the trainer gets of the phase's data, and `row_counts` for its log; read when all
            else has been looked at.

    Returns:
        `dict`: the trainer's final metrics.

    Raises:
        Refused: the folder holds files of others, a trained model, or checkpoints of a phase that did not end;
            rows that do not fit, data of another tokenizer, settings that cannot work together;
            a loss or weights that are not finite.
    """
    path, output = model_args.model_name_or_path, Path(training_args.output_dir)
    check_output(output, training_args.resume_from_checkpoint)
    vocabulary = AbstractVocabulary.load(path)
    tokenizer = load_tokenizer(path)
    check_settings(training_args, model_args)
    check_model(path, model_args.dtype)
    token_ids = vocabulary.all_ids(tokenizer)
    training_args = copy.copy(training_args)  # the caller's stays as it is
    training_args.model_init_kwargs = {
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation or "sdpa",
    }
    peft_config = lora_config(model_args, token_ids)  # refuses before rows are read
    given = inputs(vocabulary, tokenizer)
    counts = given.pop("row_counts", None)
    trainer = built(
        trainer_class,
        model=path,
        args=training_args,
        **given,
        vocabulary=vocabulary,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.accelerator.wait_for_everyone()  # all have found the folder as it was
    if trainer.is_world_process_zero():
        begin_output(output)
        if trainer_class in (BottleneckSFTTrainer, SelfDistillationTrainer):
            print(STARTS, flush=True)  # noqa: T201
    trainer.accelerator.wait_for_everyone()
    trainer.train(resume_from_checkpoint=last_checkpoint(output, trainer.accelerator))
    final = output / FINAL  # moved into place once it is whole
    trainer.save_model(str(final))
    if trainer.is_world_process_zero():
        (final / "training_args.bin").unlink(missing_ok=True)  # a pickle, and nobody reads it
        log = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
        log = {"rows": counts or trainer.row_counts, "steps": trainer.state.global_step, "log": log}
        (final / LOG_FILE).write_text(json.dumps(log, indent=2, sort_keys=True) + "\n")
        origin = read_origin(path)
        save_origin(final, origin | {"trained": [*origin.get("trained", []), trainer_class.__name__]})
        if not model_args.use_peft:
            verify_checkpoint(final)
            write_card(final, vocabulary)
        for file in sorted(final.iterdir(), key=lambda file: file.name == LOG_FILE):
            file.replace(output / file.name)
        final.rmdir()
    trainer.accelerator.wait_for_everyone()
    return trainer.state.log_history[-1]


def train_alone(trainer_class: type[SealedTrainer], inputs: Callable, training_args, model_args: ModelConfig) -> dict:
    """`train`, one job at a time: each of its processes holds the folder's lock, so that none is overlooked."""
    output, state = training_args.output_dir, PartialState()
    with ExitStack() as held:
        if state.is_main_process:
            held.enter_context(at_work(output))
        state.wait_for_everyone()
        if not state.is_main_process:
            held.enter_context(at_work(output, beside=True))
        return train(trainer_class, inputs, training_args, model_args)


def rows_of(args: TrainArguments | BaselineArguments) -> Callable:
    return lambda vocabulary, tokenizer: {"train_dataset": training_rows(args, vocabulary, tokenizer)}


def train_bottleneck(args: TrainArguments, training_args: BottleneckConfig, model_args: ModelConfig) -> dict:
    """`abscot bottleneck`: phase A (eq. 3)."""
    return train_alone(BottleneckSFTTrainer, rows_of(args), training_args, model_args)


def train_distill(args: TrainArguments, training_args: DistillationConfig, model_args: ModelConfig) -> dict:
    """`abscot distill`: phase B (eq. 4)."""
    return train_alone(SelfDistillationTrainer, rows_of(args), training_args, model_args)


def train_baseline(args: BaselineArguments, training_args: BaselineConfig, model_args: ModelConfig) -> dict:
    """`abscot baseline`: what a warm-up is compared with."""
    return train_alone(BaselineTrainer, rows_of(args), training_args, model_args)
