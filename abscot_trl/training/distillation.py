"""
Phase B, self-distillation (eq. 4): plain causal SFT on [x; z~'; y].

    L = - sum_{i in Z_abs} log pi(z_i | x, z_<i)  -  sum_{j in Y} log pi(y_j | x, z, y_<j)

Without C in the row the block mask is the causal one, so this is the bottleneck trainer on other rows. Rehearsal adds
the masked row of the same example with its own loss weight (METHOD: phase B alone forgets the policy given (x, c)).
"""

from torch import Tensor

from abscot_trl.training.bottleneck import BottleneckSFTTrainer, trace_of


class SelfDistillationTrainer(BottleneckSFTTrainer):
    """
    Supervised fine-tuning on [x; z~; y], and on [x; c; z~; y] with weight `args.rehearsal`.

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

    def _own_rows(self, given_cot: Tensor) -> Tensor:
        return ~given_cot
