"""
What a warm-up is compared with, as trainers on the same rows: plain SFT rows, pause tokens, stepwise internalisation.

The rows hold one segment order, so the block mask is the causal one and this is the bottleneck trainer on other rows.
"""

import math

import numpy as np
from datasets import Dataset
from transformers import TrainerCallback

from abscot_trl.examples import IGNORE, Segment, join
from abscot_trl.training.bottleneck import BottleneckSFTTrainer, TrainingRows
from abscot_trl.training.configs import BaselineConfig
from abscot_trl.training.steps import steps_of


def removed_tokens(step: int, steps: int, longest: int, removed_after: float, stages: int | None) -> int:
    """
    s(t), the CoT tokens removed from the left at optimiser step `step` (from 0) of `steps`; `longest` means all.

    With `stages` = `None` it is floor(delta t) at delta = longest / (removed_after steps) tokens a step, the linear
    schedule of arXiv:2405.14838; with `stages` the tokens go in so many portions of longest / stages.
    """
    portions = min(stages or longest, longest)
    done = min(portions, math.floor(portions * step / (removed_after * steps) + 1e-9))
    return longest * done // portions if portions else 0


class InternalisationRows(TrainingRows):
    """
    The rows of a whole training with stepwise internalisation, in the order in which they are trained.

    What row n is depends on n alone: its step is n // rows a step, so a resumed run, or one of several processes, sees
    the rows of an uninterrupted one.

    Args:
        rows ([`TrainingRows`]): the rows with their whole CoT.
        encoder ([`~abscot_trl.examples.Encoder`]): of the trainer.
        args ([`BaselineConfig`]): `max_steps` and the batch sizes are read too.
    """

    def __init__(self, rows: TrainingRows, encoder, args: BaselineConfig):
        super().__init__(rows.examples, rows.encode, rows.documents)
        self.encoder, self.args = encoder, args
        self.rows_per_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        total = args.max_steps * self.rows_per_step
        epochs = range(math.ceil(total / len(rows.documents)))
        orders = [np.random.default_rng([args.seed, epoch]).permutation(len(rows.documents)) for epoch in epochs]
        self.order = np.concatenate(orders)[:total]
        fitting = sorted({i for documents in rows.documents for i, _ in documents})
        self.longest = max(map(len, rows.examples.select(fitting)["cot_ids"]))

    def __len__(self) -> int:
        return len(self.order)

    def removed(self, step: int) -> int:
        """s(t) of every row at optimiser step `step`, without its random extra."""
        args = self.args
        return removed_tokens(step, args.max_steps, self.longest, args.removed_after, args.removal_stages)

    def __getitem__(self, index: int) -> dict[str, list]:
        row, step = int(self.order[index]), index // self.rows_per_step
        example = self.examples[self.documents[row][0][0]]
        rng = np.random.default_rng([self.args.seed, step, row])
        extra = rng.geometric(1 - math.exp(-self.args.removal_smoothing)) - 1  # P(o) ~ exp(-lambda o), o >= 0
        left = example["cot_ids"][self.removed(step) + extra :]
        return join([self.encoder(example["prompt_ids"], left, None, example["answer_ids"])])


class ForgetMoments(TrainerCallback):
    """Zeroes AdamW's moments and step count whenever more of the CoT is removed (arXiv:2405.14838, section 3)."""

    def __init__(self, rows: InternalisationRows):
        self.rows = rows

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        step = state.global_step
        if step and self.rows.removed(step) > self.rows.removed(step - 1):
            for moments in optimizer.state.values():
                moments["exp_avg"].zero_()
                moments["exp_avg_sq"].zero_()
                moments["step"] = moments["step"] * 0


class BaselineTrainer(BottleneckSFTTrainer):
    """
    Supervised fine-tuning on the rows of a baseline, `args.baseline`:

    - `sft`: [x; y], SFT without CoT.
    - `cot`: [x; c; y], SFT with the verbal CoT.
    - `cut-cot`: [x; c_1..c_m_max; y], the CoT cut at the trace's budget.
    - `concise`: as `cot`, on rows of `abscot concise` (compare arXiv:2502.20122).
    - `pause`: [x; begin; P .. P; end; y], loss on y only, P the first codebook token (pause-finetuning,
      arXiv:2310.02226; there without delimiters, and of most use after pause-pretraining, which this is not).
    - `icot`: [x; c less its first s(t) + o tokens; y], stepwise internalisation (ICoT-SI, arXiv:2405.14838), loss on
      what is left of c and on y. There delta tokens more are removed an epoch, over as many epochs as that takes (80
      for MATH), at a constant learning rate; here all are gone after `removed_after` of the steps that there are.

    Arguments as in [`BottleneckSFTTrainer`], with a [`BaselineConfig`]; the rows need no `trace`.
    """

    _name = "Baseline"
    gauged = ()

    def __init__(self, model, args: BaselineConfig, train_dataset: Dataset, *arguments, **kwargs):
        super().__init__(model, args, train_dataset, *arguments, **kwargs)
        if args.baseline == "icot":
            self.add_callback(ForgetMoments(self.train_dataset))

    def encode(self, row: dict) -> list[dict[str, list]]:
        """The row of the baseline; of `icot` the first, with its whole CoT."""
        kind, cot = self.args.baseline, row["cot_ids"]
        if kind == "pause":
            trace = [0] * (self.args.pause_tokens or self.vocabulary.m_max)
            encoded = self.encoder(row["prompt_ids"], None, trace, row["answer_ids"])
            answer = [segment == Segment.ANSWER for segment in encoded["segment_ids"]]
            encoded["labels"] = [
                label if where else IGNORE for label, where in zip(encoded["labels"], answer, strict=True)
            ]
            return [encoded]
        if kind == "cut-cot":
            cot = cot[: self.vocabulary.m_max]
        return [self.encoder(row["prompt_ids"], None if kind == "sft" else cot, None, row["answer_ids"])]

    def _rows(self, examples: Dataset) -> TrainingRows:
        rows = super()._rows(examples)
        if self.args.baseline != "icot":
            return rows
        self.args.train_sampling_strategy = "sequential"  # the rows come in their order
        self.args.max_steps = steps_of(len(rows), vars(self.args), self.args.world_size)
        return InternalisationRows(rows, self.encoder, self.args)
