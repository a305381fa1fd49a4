"""
Two gauges of eq. 1, log sum_z pi(z|x) pi(y|x,z), read while a phase trains and without generation:

- usefulness: the answer's loss after the row's own trace, after as many uniform codebook tokens, after another row's
  trace, and after none. Own below all of them: the tokens carry. Below none alone: only their places do.
- predictability: log pi(z|x), over the codebook and the end delimiter as in constrained decoding. Near 0 the policy
  can write the trace.

Both are read on the blind row [x; z~; y], which is what answers in the end, of rows that are held out of training.
Phase A reads usefulness on its masked row [x; c; z~; y] too. There a random trace may do as well as the own, for y
reads states at Z that saw c: a loss far below the blind row's says that this channel is open.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from abscot_trl.examples import IGNORE, Collator, Segment, best_fit, join
from abscot_trl.traces.constraint import constrained_logps

SWAPS = {"": ("own", "random", "other", "none"), "_given_cot": ("own", "random")}


def is_due(step: int, last: int, every: int) -> bool:
    """Whether gauges are read after optimiser step `step`: at `every`, whenever the steps have doubled, at the end."""
    times, rest = divmod(step, every)
    return step == last or (rest == 0 and times > 0 and times & (times - 1) == 0)


def swapped(traces: list[list[int]], swap: str, size: int) -> list[list[int]]:
    """The traces (codebook indices) that answers are read after; always the same draw."""
    if swap == "random":
        return [np.random.default_rng(i).integers(size, size=len(trace)).tolist() for i, trace in enumerate(traces)]
    return {"own": traces, "other": [*traces[1:], *traces[:1]], "none": [[] for _ in traces]}[swap]


def usefulness(losses: dict[str, Tensor], suffix: str = "") -> dict[str, float]:
    """
    Mean answer loss by swap and, of its difference to `own`, the standard error, paired by row.

    Args:
        losses: by swap, nats a token of y of each row, shape (rows,).
    """
    figures = {}
    for swap, loss in losses.items():
        figures[f"useful_{swap}{suffix}"] = loss.mean().item()
        if swap != "own":
            figures[f"useful_{swap}{suffix}_se"] = (loss - losses["own"]).std().item() / len(loss) ** 0.5
    return figures


def predictability(logits: Tensor, tokens: Tensor, allowed: Tensor) -> Tensor:
    """
    -log pi_abs of each of N trace tokens or ends, in nats, shape (N,). Traces of the first round need not keep to
    m_min and m_max, so neither is enforced.

    Args:
        logits, tokens: (N, vocabulary), what was said before each, and (N,), the id that stands there.
        allowed: (M + 1,), ids of A, the end delimiter last.
    """
    logps = constrained_logps(logits[:, allowed], written=0, m_min=0, m_max=1)
    return -logps[tokens[:, None] == allowed]


def by_document(values: Tensor, where: Tensor, documents: Tensor) -> Tensor:
    """Mean of `values` over the positions `where` of each document, all (B, L); shape (B, documents in a row)."""
    numbers = torch.arange(1, int(documents.max()) + 1, device=documents.device)
    inside = where[:, None] & (documents[:, None] == numbers[:, None])  # no scatter: the same bits each time
    return (values[:, None] * inside).sum(2) / inside.sum(2).clamp(min=1)


def answer_losses(model, batch: dict[str, Tensor]) -> Tensor:
    """Nats a token of y, of each document."""
    labels = batch["labels"].masked_fill(batch["segment_ids"] != Segment.ANSWER, IGNORE)
    outputs = model(**batch | {"labels": labels}, use_cache=False, fused_lm_head=True)
    return by_document(-outputs.log_probs, outputs.label_mask, batch["document_ids"][:, 1:])


def trace_losses(model, batch: dict[str, Tensor], head: torch.nn.Module, allowed: Tensor) -> Tensor:
    """Nats a supervised token of z~, of each document. `head` is the model's: it is shown these positions alone."""
    labels = batch["labels"][:, 1:]
    wanted = (labels != IGNORE) & (batch["segment_ids"][:, 1:] == Segment.TRACE)
    hook = head.register_forward_pre_hook(lambda _, hidden: (hidden[0][:, :-1][wanted],))
    try:
        logits = model(**{key: batch[key] for key in batch if key != "labels"}, use_cache=False).logits
    finally:
        hook.remove()
    values = torch.zeros(wanted.shape, device=logits.device)
    values[wanted] = predictability(logits, labels[wanted], allowed)
    return by_document(values, wanted, batch["document_ids"][:, 1:])


class Gauges(TrainerCallback):
    """
    What a phase's model says of `rows`, examples with a `trace` that are held out of it; no random state is touched.
    Processes share the work, each by as many batches, of one shape a kind of row, so that kernels are compiled once.
    """

    def __init__(self, trainer, rows: list[dict], packed: bool):
        self.trainer, self.rows, self.packed, self.due = trainer, rows, packed, False

    def on_step_end(self, args, state, control, **kwargs):
        self.due = is_due(state.global_step, state.max_steps, args.gauge_steps)
        control.should_log |= self.due

    def read(self) -> dict[str, float]:
        """The figures to log, the same on all processes."""
        trainer, model, figures = self.trainer, self.trainer.model_wrapped, {}
        encoder, size, traces = trainer.encoder, trainer.vocabulary.size, [row["trace"] for row in self.rows]
        head = trainer.model.get_output_embeddings()
        allowed = torch.tensor([*encoder.codebook, encoder.end], device=trainer.args.device)
        model.eval()
        with torch.no_grad(), trainer.compute_loss_context_manager():
            for suffix in trainer.gauged:
                documents = [
                    encoder(row["prompt_ids"], row["cot_ids"] if suffix else None, trace, row["answer_ids"])
                    for swap in SWAPS[suffix]
                    for row, trace in zip(self.rows, swapped(traces, swap, size), strict=True)
                ]
                losses = self._over(documents, lambda batch: answer_losses(model, batch)).view(len(SWAPS[suffix]), -1)
                figures |= usefulness(dict(zip(SWAPS[suffix], losses, strict=True)), suffix)
                if not suffix:  # the first documents are those of the own traces
                    found = self._over(documents[: len(traces)], lambda b: trace_losses(model, b, head, allowed))
                    figures |= {"predictable": found.mean().item(), "predictable_uniform": math.log(size + 1)}
        model.train()
        return figures

    def _over(self, documents: list[dict], losses: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """`losses` of each document, shape (documents,)."""
        args, accelerator, collator = self.trainer.args, self.trainer.accelerator, self.trainer.data_collator
        sizes = [len(document["input_ids"]) for document in documents]
        bins = best_fit(sizes, max(args.max_length, *sizes)) if self.packed else [[i] for i in range(len(sizes))]
        longest, multiple = max(sum(sizes[i] for i in members) for members in bins), collator.pad_to_multiple_of
        collate = Collator(collator.pad_token_id, -(-longest // multiple) * multiple)
        many, processes = 1 if self.packed else args.per_device_train_batch_size, accelerator.num_processes
        batches, found = -(-len(bins) // (many * processes)), torch.zeros(2, len(sizes), device=args.device)
        for number in range(accelerator.process_index, batches * processes, processes):
            rows = [bins[i % len(bins)] for i in range(number * many, (number + 1) * many)]  # some twice, at the end
            batch = collate([join([documents[i] for i in members]) for members in rows])
            batch = {key: value.to(args.device) for key, value in batch.items() if key != "loss_weights"}
            for members, values in zip(rows, losses(batch), strict=True):
                found[0, members] += values[: len(members)]
                found[1, members] += 1
        total, times = accelerator.reduce(found, reduction="sum").cpu()
        return total / times
