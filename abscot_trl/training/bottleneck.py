"""
Phase A, the bottlenecked SFT (eq. 3), as a trl SFTTrainer.

    L = - sum_{i in Z_abs} log pi(z_i | x, c, z_<i)  -  sum_{j in Y} log pi(y_j | x, z, y_<j)

on ONE sequence [x; c; z~; y]: the block mask keeps Y from attending to C, so y hears of c only through Z.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import datasets
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import SFTTrainer

from abscot_trl.attention import use_bottleneck_mask
from abscot_trl.errors import Refused
from abscot_trl.examples import Collator, Encoder, Segment, best_fit, join
from abscot_trl.training.adapters import keep_inputs_narrow, mend_output_head
from abscot_trl.training.configs import BottleneckConfig
from abscot_trl.training.gauges import Gauges
from abscot_trl.training.resume import SealCheckpoints, SealedTrainer
from abscot_trl.training.steps import probes
from abscot_trl.vocabulary import AbstractVocabulary

COLUMNS = ["input_ids", "labels", "segment_ids", "document_ids", "position_ids", "loss_weights"]

# Positions over which the logged metrics are taken; rows trained as rehearsal count as `.._given_cot`.
GROUPS = ("trace", "end", "answer", "trace_given_cot", "end_given_cot", "answer_given_cot", "labelled")


@contextmanager
def temporary_caches() -> Iterator[None]:
    """Let `Dataset.map` write to a temporary folder, not beside the prepared data: another run never reuses it."""
    enabled = datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_caching()


def trace_of(row: dict) -> list[int]:
    """
    A row's trace.

    Raises:
        Refused: it has none.
    """
    if row.get("trace") is None:
        raise Refused("a row has no trace: make traces with `abscot traces`, or train without by `abscot baseline`")
    return row["trace"]


def compile_layers(model: nn.Module, dynamic: bool) -> None:
    """
    Compile the forward pass of each decoder layer in place: names of weights stay, and all layers share one graph.

    Args:
        dynamic (`bool`): one graph for rows of any length, instead of one for each.
    """
    torch._dynamo.reset()  # graphs of an earlier phase in this process count towards the limit of recompilations
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = torch.compile(layer.forward, dynamic=dynamic)  # hooks (ZeRO's, FSDP's) stay outside


class TrainingRows(torch.utils.data.Dataset):
    """
    Training rows, encoded when asked for: the prepared ids stay on disk, mapped once for all processes of a machine.

    Args:
        examples ([`~datasets.Dataset`]): prepared ids and traces.
        encode (`Callable`): an example to its rows.
        documents (`list[list[tuple[int, int]]]`): per training row its documents: (example, which of its rows).
    """

    def __init__(self, examples: Dataset, encode: Callable, documents: list[list[tuple[int, int]]]):
        self.examples, self.encode, self.documents = examples, encode, documents

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> dict[str, list]:
        return join([self.encode(self.examples[i])[k] for i, k in self.documents[index]])


class BottleneckSFTTrainer(SealedTrainer, SFTTrainer):
    """
    Supervised fine-tuning on [x; c; z~; y] under the bottleneck mask.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            An extended checkpoint (`abscot init`), or the model loaded from one.
        args ([`BottleneckConfig`]):
            trl's SFT fields and this package's.
        train_dataset ([`~datasets.Dataset`]):
            Columns `prompt_ids`, `cot_ids`, `answer_ids` (token ids, the answer with EOS) and `trace` (codebook
            indices 0..M-1).
        vocabulary ([`AbstractVocabulary`], *optional*):
            Read from the checkpoint when left out.
        processing_class, peft_config, callbacks:
            As in `SFTTrainer`; make `peft_config` with [`lora_config`].

    Beside trl's metrics it logs `loss_trace` (codebook tokens), `loss_end` (the end delimiter) and `loss_answer`, in
    nats a token, with `loss_trace_uniform` = ln M, the value at which nothing was learnt about the trace; rows trained
    as rehearsal appear with the suffix `_given_cot`. `padding` is the share of positions that are padding;
    `sequences_per_step` and `supervised_tokens_per_step` count documents and labelled tokens over all processes.
    Every now and then it reads the gauges on the rows `probes`, which are not trained: `useful_own`, `useful_random`,
    `useful_other` and `useful_none`, `predictable` and `predictable_uniform` = ln(M + 1) (`training/gauges.py`).

    Raises:
        Refused: rows that do not fit `max_length` or lack a trace; a model or attention implementation that cannot
            carry the mask; while it trains, a loss or weights that are not finite.
    """

    _tag_names = ["trl", "sft", "abstract-cot"]
    _name = "Bottleneck SFT"
    gauged: tuple[str, ...] = ("", "_given_cot")  # rows on which the gauges are read: blind, and masked

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: BottleneckConfig,
        train_dataset: Dataset,
        vocabulary: AbstractVocabulary | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ):
        self.args = args = copy.copy(args)  # the caller's stays as it is; encoding reads ours before Trainer sets it
        path = model if isinstance(model, str) else model.config._name_or_path
        vocabulary = vocabulary or AbstractVocabulary.load(path)
        tokenizer = processing_class or AutoTokenizer.from_pretrained(path)
        self.vocabulary = vocabulary
        self.encoder = Encoder.from_tokenizer(
            vocabulary, tokenizer, channel=args.channel, supervise_end=args.supervise_end
        )
        rows, packed = self._rows(train_dataset), args.packing
        args.packing = False  # packed above; trl's packing would drop the segments
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        if isinstance(model, str):  # trl's own device_map would spread the model over all cards
            args.model_init_kwargs = {"device_map": None} | (args.model_init_kwargs or {})
        keep, args.save_total_limit = args.save_total_limit, None  # transformers' own would run before the seal
        args.logging_nan_inf_filter = False  # would hide a loss that is not finite, and synchronise at every step
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        super().__init__(
            model=model,
            args=args,
            train_dataset=Dataset.from_list([rows[0]]),  # trl wants a Dataset that holds its columns
            processing_class=tokenizer,
            data_collator=Collator(pad, args.pad_to_multiple_of),
            **kwargs,
        )
        self.train_dataset = rows
        if packed and self.model.config._attn_implementation == "flex_attention":
            # One length for all batches: a kernel is compiled for each.
            self.data_collator.pad_to_multiple_of *= -(-args.max_length // args.pad_to_multiple_of)
        mend_output_head(self.model)
        if args.bf16 or args.fp16:
            keep_inputs_narrow(self.model)
        use_bottleneck_mask(self.model, args.flex_kernels)
        if args.compile_layers:
            compile_layers(self.model, dynamic=not packed)
        self._sums: Tensor | None = None
        self._logged_step = 0
        self.add_callback(SealCheckpoints(self, keep))
        self.gauges = Gauges(self, [train_dataset[i] for i in self.probes], packed) if self.probes else None
        if self.gauges:
            self.add_callback(self.gauges)

    def encode(self, row: dict) -> list[dict[str, list]]:
        """The training rows of one example; here the one of eq. 3."""
        return [self.encoder(row["prompt_ids"], row["cot_ids"], trace_of(row), row["answer_ids"])]

    def _rows(self, examples: Dataset) -> "TrainingRows":
        """What each training row is made of: the lengths of all rows, those that fit, and their packing."""
        args = self.args

        def measure(batch: dict[str, list]) -> dict[str, list]:
            batch = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            return {"lengths": [[len(row["input_ids"]) for row in self.encode(example)] for example in batch]}

        with temporary_caches():
            lengths = examples.map(
                measure,
                batched=True,
                batch_size=64,
                remove_columns=examples.column_names,
                num_proc=args.dataset_num_proc,
                desc="measuring rows",
            )["lengths"][:]
        documents = [(i, k) for i, row in enumerate(lengths) for k in range(len(row))]
        sizes = [lengths[i][k] for i, k in documents]
        fitting = [n for n, size in enumerate(sizes) if size <= args.max_length]
        overlong = len(sizes) - len(fitting)
        if overlong and (args.overlong == "error" or not fitting):
            raise Refused(
                f"max_length {args.max_length} is shorter than {overlong} of {len(sizes)} rows (longest "
                f"{max(sizes)} tokens); raise it, prepare the data with max_total_tokens, or set overlong: drop"
            )
        self.row_counts = {"rows": len(sizes), "overlong_dropped": overlong}
        whole = [i for i, row in enumerate(lengths) if max(row) <= args.max_length] if self.gauged else []
        self.probes = [whole[i] for i in probes(len(whole), vars(args))]
        if self.probes:
            held_out = {*self.probes}
            fitting = [n for n in fitting if documents[n][0] not in held_out]
            self.row_counts |= {"rows": len(fitting) + overlong, "held_out": len(sizes) - overlong - len(fitting)}
        bins = [[n] for n in range(len(fitting))]
        if args.packing:
            bins = best_fit([sizes[n] for n in fitting], args.max_length)
            self.row_counts["packed_rows"] = len(bins)
        members = [[documents[fitting[n]] for n in some] for some in bins]
        return TrainingRows(examples, self.encode, members)

    def _set_signature_columns_if_needed(self):
        self._signature_columns = COLUMNS

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Weighted negative log-likelihood over the supervised positions, a mean over those of the whole step."""
        weights = inputs.pop("loss_weights")[:, 1:]
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        nll = -outputs.log_probs  # (B, L - 1), zero where no label
        count = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = (nll * weights).sum() / torch.as_tensor(count).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients; the count spans all processes
        self._record(inputs, nll.detach(), outputs)
        return (loss, outputs) if return_outputs else loss

    def _record(self, inputs: dict[str, Tensor], nll: Tensor, outputs) -> None:
        """Add this micro-batch to the sums behind the logged metrics: few kernels, no device synchronisation."""
        labelled, segments, documents = outputs.label_mask, inputs["segment_ids"], inputs["document_ids"]
        verbal = torch.zeros(len(documents), documents.shape[1] + 1, device=nll.device)
        verbal = verbal.scatter_reduce(1, documents, (segments == Segment.COT).float(), "amax")
        own = self._own_rows(verbal.gather(1, documents)[:, 1:].bool())
        segments, end = segments[:, 1:], inputs["labels"][:, 1:] == self.encoder.end
        trace = labelled & ((segments == Segment.TRACE) | (segments == Segment.DRAFT))
        kinds = torch.stack([trace & ~end, trace & end, labelled & (segments == Segment.ANSWER)])
        groups = torch.cat([kinds & own, kinds & ~own, labelled[None]])  # as GROUPS, each (B, L - 1)
        values = torch.stack([nll, outputs.is_top1.float(), outputs.entropy.detach(), torch.ones_like(nll)])
        real = inputs["attention_mask"]
        rest = torch.stack([real.sum(), (1 - real).sum(), documents.amax(dim=1).sum()])
        precision = torch.float32 if nll.device.type == "mps" else torch.float64
        sums = torch.cat([(groups[:, None] * values).sum((2, 3)).flatten().to(precision), rest.to(precision)])
        self._sums = sums if self._sums is None else self._sums + sums

    def _figures(self) -> dict[str, float]:
        """The metrics since the last log, over all processes."""
        *sums, real, padding, sequences = self.accelerator.reduce(self._sums, reduction="sum").tolist()
        groups = {name: sums[4 * i : 4 * i + 4] for i, name in enumerate(GROUPS)}
        _, right, entropy, labelled = groups.pop("labelled")
        self._total_train_tokens += int(real)
        steps = max(self.state.global_step - self._logged_step, 1)
        metrics = {f"loss_{name}": nll / count for name, (nll, *_, count) in groups.items() if count}
        if labelled:
            metrics |= {"mean_token_accuracy": right / labelled, "entropy": entropy / labelled}
        if "loss_trace" in metrics:
            metrics["loss_trace_uniform"] = math.log(self.vocabulary.size)
        metrics |= {"num_tokens": self._total_train_tokens, "padding": padding / (real + padding)}
        return metrics | {"sequences_per_step": sequences / steps, "supervised_tokens_per_step": labelled / steps}

    def _own_rows(self, given_cot: Tensor) -> Tensor:
        """Which positions belong to this phase's own rows (the others are rehearsal); here all."""
        return torch.ones_like(given_cot)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._check_loss(logs)
        if self._sums is not None:
            logs |= self._figures()
        if self.gauges and self.gauges.due and "loss" in logs:
            logs |= self.gauges.read()
        self._sums, self._logged_step = None, self.state.global_step
        super().log(logs, start_time)
