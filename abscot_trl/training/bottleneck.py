"""
Phase A, the bottlenecked SFT (eq. 3), as a trl SFTTrainer.

    L = - sum_{i in Z_abs} log pi(z_i | x, c, z_<i)  -  sum_{j in Y} log pi(y_j | x, z, y_<j)

on ONE sequence [x; c; z~; y]: the block mask keeps Y from attending to C, so y hears of c only through Z.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer

from abscot_trl.attention import use_bottleneck_mask
from abscot_trl.examples import Collator, Encoder, Segment, pack
from abscot_trl.training.adapters import keep_inputs_narrow, mend_output_head
from abscot_trl.training.configs import BottleneckConfig
from abscot_trl.vocabulary import AbstractVocabulary

COLUMNS = ["input_ids", "labels", "segment_ids", "document_ids", "position_ids", "loss_weights"]
PACKING_WINDOW = 1024  # documents packed together


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


class BottleneckSFTTrainer(SFTTrainer):
    """
    Supervised fine-tuning on [x; c; z~; y] under the bottleneck mask.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            An extended checkpoint (`abscot init`), or the model loaded from one.
        args ([`BottleneckConfig`]):
            trl's SFT fields and this package's.
        train_dataset ([`~datasets.Dataset`]):
            Columns `prompt_ids`, `cot_ids`, `answer_ids` (token ids, the answer with EOS) and `trace` (codebook
            indices 0..M-1, or null for a row without one).
        vocabulary ([`AbstractVocabulary`], *optional*):
            Read from the checkpoint when left out.
        processing_class, peft_config, callbacks:
            As in `SFTTrainer`; make `peft_config` with [`lora_config`].

    Beside trl's metrics it logs `loss_trace` (codebook tokens), `loss_end` (the end delimiter) and `loss_answer`, in
    nats a token, with `loss_trace_uniform` = ln M, the value at which nothing was learnt about the trace; rows trained
    as rehearsal appear with the suffix `_given_cot`.

    Raises:
        ValueError: rows that do not fit `max_length`; a model or attention implementation that cannot carry the mask.
    """

    _tag_names = ["trl", "sft", "abstract-cot"]
    _name = "Bottleneck SFT"

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: BottleneckConfig,
        train_dataset: Dataset,
        vocabulary: AbstractVocabulary | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ):
        self.args = args  # encoding reads it before Trainer sets it
        path = model if isinstance(model, str) else model.config._name_or_path
        vocabulary = vocabulary or AbstractVocabulary.load(path)
        tokenizer = processing_class or AutoTokenizer.from_pretrained(path)
        self.vocabulary = vocabulary
        self.encoder = Encoder.from_tokenizer(
            vocabulary, tokenizer, channel=args.channel, supervise_end=args.supervise_end
        )
        with temporary_caches():
            rows = self._encode_dataset(train_dataset)
        args.packing = False  # packed above; trl's packing would drop the segments
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
            data_collator=Collator(pad, args.pad_to_multiple_of),
            **kwargs,
        )
        mend_output_head(self.model)
        if args.bf16 or args.fp16:
            keep_inputs_narrow(self.model)
        use_bottleneck_mask(self.model)
        self._sums: dict[str, Tensor] = {}

    def encode(self, row: dict) -> list[dict[str, list]]:
        """The training rows of one example; here the one of eq. 3."""
        return [self.encoder(row["prompt_ids"], row["cot_ids"], row["trace"], row["answer_ids"])]

    def _encode_dataset(self, dataset: Dataset) -> Dataset:
        args = self.args

        def encode_batch(batch: dict[str, list]) -> dict[str, list]:
            examples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            rows = [row for example in examples for row in self.encode(example)]
            columns = {key: [row[key] for row in rows] for key in rows[0]}
            return columns | {"length": [len(row["input_ids"]) for row in rows]}

        def pack_batch(batch: dict[str, list]) -> dict[str, list]:
            rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            packed = pack(rows, args.max_length)
            return {key: [row[key] for row in packed] for key in packed[0]}

        encoded = dataset.map(
            encode_batch,
            batched=True,
            batch_size=64,
            remove_columns=dataset.column_names,
            num_proc=args.dataset_num_proc,
            desc="encoding rows",
        )
        lengths = encoded["length"]
        fitting = [i for i, length in enumerate(lengths) if length <= args.max_length]
        overlong = len(lengths) - len(fitting)
        if overlong and (args.overlong == "error" or not fitting):
            raise ValueError(
                f"max_length {args.max_length} is shorter than {overlong} of {len(lengths)} rows (longest "
                f"{max(lengths)} tokens); raise it, prepare the data with max_total_tokens, or set overlong: drop"
            )
        if overlong:
            encoded = encoded.select(fitting)
        self.row_counts = {"rows": len(lengths), "overlong_dropped": overlong}
        encoded = encoded.remove_columns("length")
        if not args.packing:
            return encoded
        encoded = encoded.shuffle(seed=args.seed)  # a window should hold a fair sample of lengths
        return encoded.map(pack_batch, batched=True, batch_size=PACKING_WINDOW, desc="packing rows")

    def _set_signature_columns_if_needed(self):
        self._signature_columns = COLUMNS

    def _save(self, output_dir: str | None = None, state_dict=None):
        super()._save(output_dir, state_dict)
        self.vocabulary.save(output_dir or self.args.output_dir)

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
        """Add this micro-batch to the sums behind the logged metrics; no device synchronisation."""
        labelled, segments = outputs.label_mask, inputs["segment_ids"]
        documents = inputs["document_ids"]
        verbal = torch.zeros(len(documents), documents.shape[1] + 1, device=nll.device)
        verbal = verbal.scatter_reduce(1, documents, (segments == Segment.COT).float(), "amax")
        given_cot = verbal.gather(1, documents)[:, 1:].bool()
        segments = segments[:, 1:]
        trace = labelled & ((segments == Segment.TRACE) | (segments == Segment.DRAFT))
        end = inputs["labels"][:, 1:] == self.encoder.end
        groups = {
            "trace": trace & ~end,
            "end": trace & end,
            "answer": labelled & (segments == Segment.ANSWER),
        }
        parts = {f"loss_{name}": (nll, where & self._own_rows(given_cot)) for name, where in groups.items()}
        parts |= {
            f"loss_{name}_given_cot": (nll, where & ~self._own_rows(given_cot)) for name, where in groups.items()
        }
        parts["mean_token_accuracy"] = (outputs.is_top1.float(), labelled)
        parts["entropy"] = (outputs.entropy.detach(), labelled)
        parts["num_tokens"] = (inputs["attention_mask"].float(), torch.ones_like(inputs["attention_mask"]))
        precision = torch.float32 if nll.device.type == "mps" else torch.float64
        for name, (values, where) in parts.items():
            pair = torch.stack([(values * where).sum(), where.sum()]).to(precision)
            self._sums[name] = self._sums.get(name, 0) + pair

    def _own_rows(self, given_cot: Tensor) -> Tensor:
        """Which positions belong to this phase's own rows (the others are rehearsal); here all."""
        return torch.ones_like(given_cot)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "" if self.model.training else "eval_"
        for name, pair in self._sums.items():
            total, count = self.accelerator.reduce(pair, reduction="sum").tolist()
            if name == "num_tokens":
                self._total_train_tokens += int(total) if not mode else 0
                logs["num_tokens"] = self._total_train_tokens
            elif count:
                logs[mode + name] = total / count
        if mode + "loss_trace" in logs:
            logs[mode + "loss_trace_uniform"] = math.log(self.vocabulary.size)
        self._sums = {}
        super().log(logs, start_time)
