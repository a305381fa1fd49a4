"""`abscot bottleneck`, `distill` and `baseline`: load the inputs of a training phase, train, save."""

import json
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset, List, Value
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig

from abscot_trl.checkpoint import verify_checkpoint, write_model_card
from abscot_trl.data.prepare import load_prepared
from abscot_trl.data.splits import part_rows
from abscot_trl.storage import at_work
from abscot_trl.traces.files import read_traces
from abscot_trl.training.adapters import lora_config
from abscot_trl.training.baselines import BaselineTrainer
from abscot_trl.training.bottleneck import BottleneckSFTTrainer
from abscot_trl.training.configs import BaselineConfig, BottleneckConfig, DistillationConfig
from abscot_trl.training.distillation import SelfDistillationTrainer
from abscot_trl.training.resume import LOG_FILE, prepare_output, sealed_checkpoints
from abscot_trl.vocabulary import AbstractVocabulary


@dataclass
class TrainArguments:
    """
    Inputs of a training phase.

    Args:
        data (`str`): prepared data (`abscot data`).
        traces (`str`, *optional*): folder written by `abscot traces`; its rows are trained. Without it, rows of
            `part` are trained without a trace: SFT with CoT by `abscot bottleneck`, without CoT by `abscot distill`.
        splits, part (`str`, *optional*): staged splits and part, where no traces choose the rows; without `part`,
            the rows of all parts.
    """

    data: str = field(metadata={"help": "Prepared data (abscot data)."})
    traces: str | None = field(default=None, metadata={"help": "Folder written by abscot traces; none: plain SFT."})
    splits: str | None = field(default=None, metadata={"help": "Staged splits, where no traces choose the rows."})
    part: str | None = field(default=None, metadata={"help": "Part of the splits; none: all of them."})


def training_rows(args: TrainArguments, vocabulary: AbstractVocabulary, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The prepared rows of a phase with their `trace` column, as the trainers take them."""
    data, _ = load_prepared(args.data, tokenizer)
    traces: list[list[int] | None] = [None] * len(data)
    if args.traces is None:
        rows = part_rows(args.splits, args.part, len(data))
    else:
        rows = []
        for record in read_traces(args.traces, data["id"][:], vocabulary):
            rows.append(record["row"])
            traces[record["row"]] = record["trace"]
    # The column first, then the rows: the other way round would write all chosen rows again.
    columns = data.select_columns(["prompt_ids", "cot_ids", "answer_ids"])
    return columns.add_column("trace", traces, feature=List(Value("int32"))).select(rows)


def train(
    trainer_class: type[BottleneckSFTTrainer],
    args: TrainArguments,
    training_args: BottleneckConfig,
    model_args: ModelConfig,
) -> dict:
    """
    Train one phase and save a full checkpoint, or an adapter to be merged, in `training_args.output_dir`.

    With `resume_from_checkpoint: true` a killed phase goes on from its last sealed checkpoint (see `resume.py`) and
    ends in the same files; without one it begins.

    Returns:
        `dict`: the trainer's final metrics.

    Raises:
        Refused: the folder holds a trained model already, or checkpoints of a phase that did not end;
            rows that do not fit, data of another tokenizer, settings that cannot work together.
    """
    path, output = model_args.model_name_or_path, Path(training_args.output_dir)
    if PartialState().is_main_process:
        prepare_output(output, bool(training_args.resume_from_checkpoint))
    PartialState().wait_for_everyone()
    vocabulary = AbstractVocabulary.load(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    token_ids = vocabulary.all_ids(tokenizer)
    training_args.model_init_kwargs = {
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation or "sdpa",
    }
    peft_config = lora_config(model_args, token_ids)  # refuses before rows are read
    trainer = trainer_class(
        model=path,
        args=training_args,
        train_dataset=training_rows(args, vocabulary, tokenizer),
        vocabulary=vocabulary,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    sealed = sealed_checkpoints(output)
    trainer.train(resume_from_checkpoint=str(sealed[-1]) if sealed else None)
    final = output / ".final"  # moved into place once it is whole
    trainer.save_model(str(final))
    if trainer.is_world_process_zero():
        (final / "training_args.bin").unlink(missing_ok=True)  # a pickle, and nobody reads it
        log = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
        log = {"rows": trainer.row_counts, "steps": trainer.state.global_step, "log": log}
        (final / LOG_FILE).write_text(json.dumps(log, indent=2, sort_keys=True) + "\n")
        if not model_args.use_peft:
            verify_checkpoint(final)
            write_model_card(final, vocabulary)
        for file in sorted(final.iterdir(), key=lambda file: file.name == LOG_FILE):
            file.replace(output / file.name)
        final.rmdir()
    trainer.accelerator.wait_for_everyone()
    return trainer.state.log_history[-1]


def _train_alone(*inputs) -> dict:
    """`train`, one job at a time: each of its processes holds the folder's lock, so that none is overlooked."""
    output, state = inputs[2].output_dir, PartialState()
    if inputs[2].device.type == "cpu":  # accelerate's "cpu:1" of rank 1 is no place that torch.load knows
        vars(inputs[2])["_setup_devices"] = torch.device("cpu")
    with ExitStack() as held:
        if state.is_main_process:
            held.enter_context(at_work(output))
        state.wait_for_everyone()
        if not state.is_main_process:
            held.enter_context(at_work(output, beside=True))
        return train(*inputs)


def train_bottleneck(args: TrainArguments, training_args: BottleneckConfig, model_args: ModelConfig) -> dict:
    """`abscot bottleneck`: phase A (eq. 3)."""
    return _train_alone(BottleneckSFTTrainer, args, training_args, model_args)


def train_distill(args: TrainArguments, training_args: DistillationConfig, model_args: ModelConfig) -> dict:
    """`abscot distill`: phase B (eq. 4)."""
    return _train_alone(SelfDistillationTrainer, args, training_args, model_args)


def train_baseline(args: TrainArguments, training_args: BaselineConfig, model_args: ModelConfig) -> dict:
    """`abscot baseline`: what a warm-up is compared with."""
    return _train_alone(BaselineTrainer, args, training_args, model_args)
