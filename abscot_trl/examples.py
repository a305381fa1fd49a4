"""
From (prompt, cot, answer) and a trace to the rows a trainer sees.

One row is [x; c; z~; y] for the bottleneck (eq. 3), [x; z~; y] for self-distillation (eq. 4), [x; y] without a trace.
The segments say which is which; `abscot_trl.attention` turns them into the mask.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from abscot_trl.errors import Refused
from abscot_trl.vocabulary import AbstractVocabulary

IGNORE = -100
QUIET = {"verbose": False}  # a tokenizer warns of long rows; here they are counted, and refused where they do not fit
PLAIN = QUIET | {"add_special_tokens": False, "split_special_tokens": True}  # special tokens that a text quotes: text


class Segment(IntEnum):
    """What a position belongs to. TRACE includes both delimiters. DRAFT and COPY: discrete channel only."""

    PAD = 0
    PROMPT = 1
    COT = 2
    TRACE = 3
    ANSWER = 4
    DRAFT = 5  # the trace as it is written, with c in sight; never read by y
    COPY = 6  # the same tokens again, blind to c; what y reads


@dataclass
class Example:
    """
    One training example or problem: chat messages up to the answer, verbal CoT, answer, and gold for grading; of a
    problem that its own task scores, what that needs (`entry`, JSON).
    """

    prompt: list[dict[str, str]]
    cot: str
    answer: str
    gold: str | None = None
    id: str = ""
    source: str = ""
    entry: str = ""


def prompt_ids(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    The chat template with a generation prompt; thinking mode off, as in the paper.

    Ends before `<beginabstract>`, which rows and samplers add: a base model and its extended checkpoint give the same.

    Raises:
        Refused: there is no template. jinja2's `TemplateError` is the template's own word on the messages.
    """
    if tokenizer.chat_template is None:
        raise Refused(f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; take an instruct model's")
    settings = {"add_generation_prompt": True, "enable_thinking": False, "abstract": False}
    return tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=False, tokenizer_kwargs=QUIET, **settings
    )


def cot_columns(cot: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """
    What a prepared row keeps of its CoT, which is tokenised this once.

    Returns:
        `cot_ids`, the verbal CoT and one trailing newline (a special token that it quotes stays text), and, of each of
        the n steps, the CoT's lines that are not blank, `step_ends` (n,): the index among `cot_ids` of its last token,
        its newline's; `step_lengths` (n,): how many tokens hold some of its text, its newline left out.
    """
    text = cot.rstrip() + "\n"
    encoded = tokenizer(text, return_offsets_mapping=True, **PLAIN)
    starts, ends = np.array(encoded["offset_mapping"], int).reshape(-1, 2).T
    lines = text.split("\n")[:-1]
    steps = [i for i, line in enumerate(lines) if line.strip()]
    after = np.cumsum([len(line) + 1 for line in lines])[steps]  # where the next line begins
    before = after - [len(lines[i]) + 1 for i in steps]
    lengths = np.searchsorted(starts, after - 1) - np.searchsorted(ends, before, side="right")
    step_ends = np.searchsorted(starts, after) - 1
    return {"cot_ids": encoded["input_ids"], "step_ends": step_ends.tolist(), "step_lengths": lengths.tolist()}


def answer_ids(answer: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The answer and EOS; a special token that the answer quotes stays text."""
    if tokenizer.eos_token_id is None:
        raise Refused(f"the tokenizer of {tokenizer.name_or_path!r} has no EOS token; an answer could never end")
    ids = tokenizer(answer, **PLAIN)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


@dataclass(frozen=True)
class Encoder:
    """
    Turns token ids of x, c, z, y into one training row.

    Args:
        codebook (`list[int]`): ids of V_abs, in order.
        begin, end (`int`): ids of the delimiters.
        channel (`str`): `hidden`, the paper's one masked pass, or `discrete`, where y reads only the tokens.
        supervise_end (`bool`): whether `<endabstract>` carries loss. Eq. 3 to the letter says no, and stopping would
            then never be learnt.
    """

    codebook: list[int]
    begin: int
    end: int
    channel: str = "hidden"
    supervise_end: bool = True

    def __post_init__(self):
        if self.channel not in ("hidden", "discrete"):
            raise Refused(f"channel must be 'hidden' or 'discrete', got {self.channel!r}")

    @classmethod
    def from_tokenizer(cls, vocabulary: AbstractVocabulary, tokenizer: PreTrainedTokenizerBase, **kwargs) -> "Encoder":
        return cls(vocabulary.ids(tokenizer), vocabulary.begin_id(tokenizer), vocabulary.end_id(tokenizer), **kwargs)

    def __call__(
        self, prompt: list[int], cot: list[int] | None, trace: list[int] | None, answer: list[int], weight: float = 1.0
    ) -> dict[str, list]:
        """
        Encode one row.

        Args:
            prompt, answer (`list[int]`): ids of x and of y with EOS.
            cot (`list[int]` or `None`): ids of c; `None` leaves it out (eq. 4). Without a trace, c and y are one
                supervised response (SFT with CoT).
            trace (`list[int]` or `None`): codebook indices 0..M-1; `None` leaves trace and delimiters out.
            weight (`float`): loss weight of the row's tokens.

        Returns:
            `dict` of equally long lists: `input_ids`, `labels` (-100 where no loss), `segment_ids`, `position_ids`
            and `loss_weights`.
        """
        if trace is not None and not all(0 <= index < len(self.codebook) for index in trace):
            raise Refused(f"trace {trace} holds an index outside the codebook of {len(self.codebook)} tokens")
        pieces: list[tuple[Segment, list[int], list[int]]] = [(Segment.PROMPT, prompt, [IGNORE] * len(prompt))]
        if trace is None:
            answer = [*(cot or []), *answer]
        else:
            if cot is not None:
                pieces.append((Segment.COT, cot, [IGNORE] * len(cot)))
            tokens = [self.codebook[index] for index in trace]
            ids = [self.begin, *tokens, self.end]
            labels = [IGNORE, *tokens, self.end if self.supervise_end else IGNORE]
            if self.channel == "discrete" and cot is not None:
                pieces += [(Segment.DRAFT, ids, labels), (Segment.COPY, ids, [IGNORE] * len(ids))]
            else:
                pieces.append((Segment.TRACE, ids, labels))
        pieces.append((Segment.ANSWER, answer, answer))

        row: dict[str, list] = {"input_ids": [], "labels": [], "segment_ids": [], "position_ids": []}
        position = 0
        for segment, ids, labels in pieces:
            if segment == Segment.COPY:  # the copy stands where the draft stands
                position -= len(ids)
            row["input_ids"] += ids
            row["labels"] += labels
            row["segment_ids"] += [int(segment)] * len(ids)
            row["position_ids"] += range(position, position + len(ids))
            position += len(ids)
        row["loss_weights"] = [weight] * len(row["input_ids"])
        return row


def best_fit(lengths: list[int], length: int) -> list[list[int]]:
    """
    Best-fit-decreasing packing: indices of `lengths` in bins of at most `length` tokens.

    Raises:
        Refused: a document is longer than `length`.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] > length:
            raise Refused(f"a row of {lengths[i]} tokens exceeds max_length={length}; drop it first")
        at = bisect_left(rooms, (lengths[i], 0))
        room, number = rooms.pop(at) if at < len(rooms) else (length, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(i)
        insort(rooms, (room - lengths[i], number))
    return bins


def join(rows: list[dict[str, list]]) -> dict[str, list]:
    """One packed row of whole documents: the columns of `Encoder` and `document_ids` (1, 2, ..)."""
    packed = {key: [value for row in rows for value in row[key]] for key in rows[0]}
    packed["document_ids"] = [n for n, row in enumerate(rows, 1) for _ in row["input_ids"]]
    return packed


def pack(rows: list[dict[str, list]], length: int) -> list[dict[str, list]]:
    """`rows` joined to packed rows of at most `length` tokens."""
    bins = best_fit([len(row["input_ids"]) for row in rows], length)
    return [join([rows[i] for i in members]) for members in bins]


@dataclass
class Collator:
    """
    Right-pads rows of `Encoder` or `join` to one length, a multiple of `pad_to_multiple_of`.

    Returns `input_ids`, `labels`, `segment_ids`, `document_ids`, `position_ids`, `loss_weights` and the 2-D
    `attention_mask` (1 on real tokens), each of shape (B, L).
    """

    pad_token_id: int
    pad_to_multiple_of: int = 128  # flex attention gives NaN gradients on other lengths (pytorch#153799)

    def __call__(self, rows: list[dict[str, list]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        fill = {
            "input_ids": self.pad_token_id,
            "labels": IGNORE,
            "segment_ids": int(Segment.PAD),
            "position_ids": 0,
            "loss_weights": 0.0,
            "document_ids": 0,
        }
        for row in rows:
            row.setdefault("document_ids", [1] * len(row["input_ids"]))
        batch = {
            key: torch.tensor([list(row[key]) + [value] * (length - len(row[key])) for row in rows])
            for key, value in fill.items()
        }
        batch["attention_mask"] = (batch["segment_ids"] != Segment.PAD).long()
        return batch
