"""
Phase B, self-distillation (eq. 4): plain causal SFT on [x; z~'; y].

    L = - sum_{i in Z_abs} log pi(z_i | x, z_<i)  -  sum_{j in Y} log pi(y_j | x, z, y_<j)

Without C in the row the block mask is the causal one, so this is the bottleneck trainer on other rows. Rehearsal adds
the masked row of the same example with its own loss weight (METHOD: phase B alone forgets the policy given (x, c)).

Interchange trains a share of the answers after another row's prompt and their own trace, [x'; z~; y] with loss on y
alone: what the answer is must then be read from z (interchange intervention training, arXiv:2112.00826). Without it y
may guess from x what z should say, and in training the two always agree.
"""

from random import Random

from torch import Tensor

from abscot_trl.examples import IGNORE, Segment
from abscot_trl.training.bottleneck import BottleneckSFTTrainer, trace_of


def after(document: dict[str, list], other: dict[str, list]) -> dict[str, list]:
    """z~ and y of one document after the prompt of another, with loss on y alone; columns as `Encoder`'s."""
    own, borrowed = (row["segment_ids"].count(Segment.PROMPT) for row in (document, other))
    joined = {key: other[key][:borrowed] + document[key][own:] for key in document}
    joined["position_ids"] = [*range(len(joined["input_ids"]))]
    answers = (segment == Segment.ANSWER for segment in joined["segment_ids"])
    joined["labels"] = [label if answer else IGNORE for label, answer in zip(joined["labels"], answers, strict=True)]
    return joined


def interchanged(documents: list[dict[str, list]], share: float, rng: Random) -> list[dict[str, list]]:
    """
    `documents` of one packed row, of which `share` have passed their prompts on in a circle, so that all together are
    as long as before. Rows that hold c stay as they are.
    """
    some = [i for i, row in enumerate(documents) if Segment.COT not in row["segment_ids"] and rng.random() < share]
    givers = dict(zip(some, [*some[1:], *some[:1]], strict=True)) if len(some) > 1 else {}
    return [after(row, documents[givers[i]]) if i in givers else row for i, row in enumerate(documents)]


class SelfDistillationTrainer(BottleneckSFTTrainer):
    """
    Supervised fine-tuning on [x; z~; y], on [x; c; z~; y] with weight `args.rehearsal`, and, of the share
    `args.interchange`, on y alone after another's x.

    Arguments as in [`BottleneckSFTTrainer`], with a [`DistillationConfig`].
    """

    _name = "Self-distillation"
    gauged = ("",)

    def encode(self, row: dict) -> list[dict[str, list]]:
        """The row of eq. 4 and, with rehearsal, the one of eq. 3."""
        prompt, trace, answer = row["prompt_ids"], trace_of(row), row["answer_ids"]
        rows = [self.encoder(prompt, None, trace, answer)]
        if self.args.rehearsal:
            rows.append(self.encoder(prompt, row["cot_ids"], trace, answer, weight=self.args.rehearsal))
        return rows

    def mix(self, documents: list[dict[str, list]], number: int) -> list[dict[str, list]]:
        """With interchange, some answers after others' prompts; in each epoch the same ones."""
        if not self.args.interchange:
            return documents
        return interchanged(documents, self.args.interchange, Random(f"{self.args.seed} {number}"))

    def _own_rows(self, given_cot: Tensor) -> Tensor:
        return ~given_cot
