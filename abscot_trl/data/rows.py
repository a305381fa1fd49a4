"""What becomes of a row: kept, kept with its CoT cut, or left out for a reason. Depends on the row alone."""

import json
import re
from dataclasses import asdict
from typing import Any

import jinja2
import pyarrow as pa
from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from abscot_trl.data.arguments import DataArguments, Overlong
from abscot_trl.data.dolci import RowRejected, parse_row, unpack
from abscot_trl.data.overlap import ProblemIndex, asked, overlapping
from abscot_trl.data.problems import problem_to_example
from abscot_trl.examples import Example, answer_ids, cot_columns, prompt_ids
from abscot_trl.vocabulary import AbstractVocabulary

FEATURES = Features(
    {name: Value("large_string") for name in ("id", "source", "prompt", "cot", "answer", "gold")}
    | {name: List(Value("int32")) for name in ("prompt_ids", "cot_ids", "answer_ids", "step_ends", "step_lengths")}
)
KEPT = ("kept", "cut")
OVERLAP = "overlap_"  # begins the names of the filters for rows that hold a problem of the evaluation


def to_example(row: dict[str, Any], data_format: str) -> Example:
    """
    A row of `data_format`, `dolci` or `problems`.

    Raises:
        RowRejected: it is none.
    """
    return parse_row(row) if data_format == "dolci" else problem_to_example(row)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What finds a special token, codebook and delimiters too, in a text."""
    # `all_special_tokens` has only those with a role, such as EOS.
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(re.escape(token) for token in special | {*tokenizer.all_special_tokens} if token))


class RowMaker:
    """Parses, tokenises and filters rows; `index` finds those that hold a problem of the evaluation."""

    def __init__(
        self,
        args: DataArguments,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: AbstractVocabulary,
        index: ProblemIndex | None = None,
    ):
        self.args, self.tokenizer, self.trace_tokens, self.index = args, tokenizer, vocabulary.m_max + 2, index
        self.special = special_tokens(tokenizer)

    def __call__(self, rows: list[tuple[int, dict]]) -> tuple[list[str], pa.Table]:
        """
        Of numbered rows, packed as `iter_packed` gives them: what became of each, and those kept.

        An outcome is `kept`, `cut`, `rejected.<reason>` or `filtered.<filter>`; the table has the columns `FEATURES`.
        """
        outcomes, kept = [], []
        for number, packed in rows:
            outcome = self._row(number, unpack(packed))
            if isinstance(outcome, dict):
                kept.append(outcome)
                outcome = "cut" if outcome.pop("cut") else "kept"
            outcomes.append(outcome)
        return outcomes, pa.Table.from_pylist(kept, schema=FEATURES.arrow_schema)

    def _row(self, number: int, row: dict[str, Any]) -> dict[str, Any] | str:
        """The columns of a row that is kept, and whether its CoT is `cut`; else what drops it."""
        args = self.args
        try:
            example = to_example(row, args.data_format)
            if not example.cot:
                raise RowRejected("empty_think", "a problem without a worked solution")
            json.dumps(asdict(example), ensure_ascii=False).encode()
        except RowRejected as rejection:
            return f"rejected.{rejection.reason}"
        except UnicodeEncodeError:  # half a surrogate pair: neither Arrow nor a tokenizer takes it
            return "rejected.malformed"
        if args.sources is not None and example.source not in args.sources:
            return "filtered.source"
        # The chat template's own control tokens and quoted ones come out as the same ids.
        if any(self.special.search(text) for message in example.prompt for text in message.values()):
            return "filtered.special_token_in_prompt"
        example.id = example.id or f"{example.source or 'row'}-{number}"
        overlap = self.index and self.index.find(asked(example.prompt))
        if overlap:
            if self.args.overlap == "error":
                raise overlapping(f"{', '.join(self.args.data)}: row {number} as read ({example.id})", overlap)
            return f"filtered.{OVERLAP}{overlap.reason}"
        fitting = self._fit(example)
        if isinstance(fitting, str):
            return f"filtered.{fitting}"
        return asdict(example) | {"prompt": json.dumps(example.prompt)} | fitting

    def _fit(self, example: Example) -> dict[str, Any] | str:
        """The ids of the example if it fits, its CoT cut if it may be; else the filter that drops it."""
        args = self.args
        try:
            prompt = prompt_ids(example.prompt, self.tokenizer)
        except jinja2.TemplateError:  # templates refuse roles, or their order, that other templates take
            return "chat_template"
        if len(prompt) > (args.max_prompt_tokens or len(prompt)):
            return "prompt_too_long"
        answer = answer_ids(example.answer, self.tokenizer)
        if len(answer) > (args.max_answer_tokens or len(answer)):
            return "answer_too_long"
        text, cot = example.cot, cot_columns(example.cot, self.tokenizer)
        length, shortest = len(cot["cot_ids"]), args.min_cot_tokens or 1
        if length < shortest:
            return "cot_too_short"
        room = length
        if args.max_total_tokens is not None:
            room = args.max_total_tokens - len(prompt) - len(answer) - self.trace_tokens
        longest = args.max_cot_tokens or length
        if length > min(room, longest):
            fitting = None if args.overlong == "drop" else self._cut(cot["cot_ids"], shortest, min(room, longest))
            if fitting is None:
                return "cot_too_long" if length > longest and room >= shortest else "total_too_long"
            text, cot = fitting
        ids = {"prompt_ids": prompt, **cot, "answer_ids": answer}
        return ids | {"cot": text, "cut": length > min(room, longest)}

    def _cut(self, ids: list[int], shortest: int, longest: int) -> tuple[str, dict[str, list[int]]] | None:
        """The cut CoT and the columns of just that text, `shortest` to `longest` ids; `None` where that cannot be."""
        left = longest
        while left > 0:
            text = self.tokenizer.decode(cut_cot(ids, left, self.args.overlong), clean_up_tokenization_spaces=False)
            text = text.strip("\ufffd").strip()  # what a cut within a character leaves of it
            new = cot_columns(text, self.tokenizer)
            excess = len(new["cot_ids"]) - longest
            if excess <= 0:
                return (text, new) if text and len(new["cot_ids"]) >= shortest else None
            left -= excess
        return None


def cut_cot(ids: list[int], length: int, overlong: Overlong) -> list[int]:
    """`length` ids of the CoT: without its head (`cut_cot_head`), its middle or its tail."""
    head = {"cut_cot_head": 0, "cut_cot_middle": length - length // 2, "cut_cot_tail": length}[overlong]
    return ids[:head] + ids[len(ids) - length + head :]
