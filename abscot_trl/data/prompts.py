"""Prompts for reinforcement learning, each with what its answers are held against: rows to messages and gold."""

import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

import jinja2
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from abscot_trl.data.dolci import RowRejected
from abscot_trl.data.overlap import (
    NOT_IN_HELP,
    OVERLAP_HELP,
    OnOverlap,
    ProblemIndex,
    asked,
    load_index,
    overlapping,
)
from abscot_trl.data.problems import HOTPOTQA, kind_of, problem_rows, problem_to_example, with_instruction
from abscot_trl.data.rows import special_tokens
from abscot_trl.errors import Refused
from abscot_trl.examples import Example, prompt_ids

FEATURES = Features(
    {"prompt": List({"role": Value("string"), "content": Value("string")})}
    | {name: Value("string") for name in ("gold", "source", "id", "entry")}
)
# Verifiers of open-instruct's rows whose ground truth is a result in a box.
MATHS = ("math", "gsm8k", "strict_math")

_TURN = re.compile(r"(?:\A|\n+)(system|user|assistant): ")


@dataclass
class PromptArguments:
    """
    What to sample answers to.

    Args:
        prompts (`list[str]`): each one or a folder of .jsonl, .parquet files, a .json or .csv file, a hub id, or
            `reasoning_gym:<task>?size=1000&seed=0` (`data/reasoning_gym.py`).
    """

    prompts: list[str] = field(
        metadata={"help": "Files, folders or hub ids of prompts, or reasoning_gym:<task>?size=1000."}
    )
    prompts_split: str = field(default="train", metadata={"help": "Split of a hub dataset or a task."})
    prompts_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset, e.g. main."})
    max_prompt_tokens: int = field(default=2048, metadata={"help": "Longer prompts are left out and counted."})
    instruction: bool = field(
        default=True,
        metadata={"help": "Append abstract mode's instruction to prompts with a gold, as evaluation does."},
    )
    prompt_rows: int | None = field(default=None, metadata={"help": "Keep this many prompts at most."})
    not_in: list[str] = field(default_factory=list, metadata={"help": NOT_IN_HELP})
    overlap: OnOverlap = field(default="error", metadata={"help": OVERLAP_HELP})
    prompt_seed: int = field(default=0, metadata={"help": "Seed of the prompts' order."})

    def __post_init__(self):
        for name in ("prompts", "not_in"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        if not self.prompts:
            raise Refused("prompts is empty; name files, a hub dataset or reasoning_gym:<task>")
        if self.overlap not in get_args(OnOverlap):
            raise Refused(f"overlap must be one of {', '.join(get_args(OnOverlap))}, got {self.overlap!r}")
        for name, least in (("max_prompt_tokens", 1), ("prompt_rows", 1), ("prompt_seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise Refused(f"{name} must be at least {least}, got {value}")


class _Candidate(NamedTuple):
    """`text`: what is compared with the evaluation, without an instruction; `where`: the row, in words."""

    prompt: list[dict[str, str]]
    gold: str | None
    source: str
    id: str
    entry: str
    text: str
    where: str


def load_prompts(args: PromptArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, dict[str, Any]]:
    r"""
    The prompts, shuffled by `prompt_seed`, and what became of the rows.

    Rows may be those of `problem_to_example`; open-instruct's (`prompt` or `messages`, `ground_truth`, `dataset`:
    allenai/Dolci-Think-RL-7B), of which maths has a gold; others with `prompt` (text or messages) or `messages`, and
    `gold`, which may be null. A prompt with gold is asked as an evaluation in abstract mode asks it
    (`with_instruction`), unless it names the form already (`\boxed`, for HotpotQA `Answer:`) or `instruction` is off;
    others stay as they are.

    Returns:
        The dataset: `prompt` (messages with `role` and `content`), `gold` (null where nothing is held against
        answers), `source`, `id`, `entry` (JSON of reasoning-gym's entry, for its `score_answer`; else `""`).
        The counts: `rows_read` (= `kept` + `duplicates` + `too_long` + all `overlapping` + all `malformed`; up to
        the last kept one under a limit), `overlapping` and `malformed` by reason, `sources` of those kept.

    Raises:
        Refused: rows that hold problems of `not_in` (`overlap: error`), with their counts and the first of them;
            no prompt is left, with the counts; files, hub datasets or tasks that cannot be read.
    """
    index = load_index(args.not_in)
    malformed: Counter[str] = Counter()
    found = list(_candidates(args, malformed))
    random.Random(args.prompt_seed).shuffle(found)
    kept, fates, first = _kept(found, args, tokenizer, index)
    counts = {
        "rows_read": fates.total() + malformed.total(),
        "kept": len(kept),
        "duplicates": fates["duplicates"],
        "too_long": fates["too_long"],
        "overlapping": _of("overlapping.", fates),
        "malformed": dict((malformed + Counter(_of("malformed.", fates))).most_common()),
        "sources": dict(Counter(candidate.source for candidate in kept).most_common()),
    }
    if first:
        raise Refused(f"{first}. {json.dumps(counts['overlapping'])} of {counts['rows_read']} rows overlap")
    if not kept:
        raise Refused(f"no prompt of {', '.join(args.prompts)} is left: {json.dumps(counts)}")
    columns = {name: [getattr(candidate, name) for candidate in kept] for name in FEATURES}
    return Dataset.from_dict(columns, features=FEATURES), counts


def _of(kind: str, fates: Counter[str]) -> dict[str, int]:
    return {name.removeprefix(kind): n for name, n in fates.most_common() if name.startswith(kind)}


def _kept(
    found: list[_Candidate], args: PromptArguments, tokenizer: PreTrainedTokenizerBase, index: ProblemIndex | None
) -> tuple[list[_Candidate], Counter[str], Refused | None]:
    """The prompts kept, what became of all that were looked at, and the first overlap where that is an error."""
    special, seen, kept, fates, first = special_tokens(tokenizer), set(), [], Counter(), None
    for candidate in found:
        fate = _fate(candidate, args, tokenizer, special, seen)
        overlap = index.find(candidate.text) if index and fate == "kept" else None
        if overlap:
            fate = f"overlapping.{overlap.reason}"
            if args.overlap == "error":
                first = first or overlapping(candidate.where, overlap)
        fates[fate] += 1
        if fate == "kept":
            kept.append(candidate)
        if len(kept) == args.prompt_rows:
            break
    return kept, fates, first


def _fate(candidate: _Candidate, args: PromptArguments, tokenizer, special: re.Pattern[str], seen: set[str]) -> str:
    messages = json.dumps(candidate.prompt)
    if messages in seen:
        return "duplicates"
    seen.add(messages)
    # As in `abscot data`: a quoted special token comes out as the token's own id.
    if any(special.search(text) for message in candidate.prompt for text in message.values()):
        return "malformed.special token in the prompt"
    try:
        length = len(prompt_ids(candidate.prompt, tokenizer))
    except jinja2.TemplateError:
        return "malformed.refused by the chat template"
    return "kept" if length <= args.max_prompt_tokens else "too_long"


def _candidates(args: PromptArguments, malformed: Counter[str]) -> Iterator[_Candidate]:
    for name in args.prompts:
        for number, row in enumerate(problem_rows(name, args.prompts_split, args.prompts_config), 1):
            try:
                example = row_to_prompt(row)
                yield _candidate(args, example, f"{example.source or 'row'}-{number}", f"{name}: row {number}")
            except RowRejected as rejection:
                malformed[str(rejection).removeprefix(f"{rejection.reason}: ")] += 1


def _candidate(args: PromptArguments, example: Example, identifier: str, where: str) -> _Candidate:
    messages, text = example.prompt, asked(example.prompt)
    named = "Answer:" in text if kind_of(example.source) == HOTPOTQA else "\\boxed" in text
    if args.instruction and example.gold is not None and not named:
        messages = with_instruction(example, "abstract")
    name = example.id or identifier
    try:
        json.dumps([messages, example.gold, example.source, name], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RowRejected("malformed", "half of a surrogate pair") from error
    return _Candidate(messages, example.gold, example.source, name, example.entry, text, f"{where} ({name})")


def row_to_prompt(row: dict[str, Any]) -> Example:
    """
    One row, of any kind that `load_prompts` reads, as an `Example` without an instruction of ours.

    Raises:
        RowRejected: `malformed`, with what is wrong in words.
    """
    columns = set(row) if isinstance(row, dict) else set()
    asks = columns & {"prompt", "messages"}
    if asks and {"ground_truth", "dataset"} <= columns:
        return _verifiable(row)
    if asks and "gold" in columns and not {"prompt", "cot", "answer"} <= columns:
        gold = row["gold"]
        if gold is not None and (isinstance(gold, bool) or not isinstance(gold, str | int) or not str(gold).strip()):
            raise RowRejected("malformed", "gold is empty or not text")
        gold = None if gold is None else str(gold).strip()
        return Example(_messages(row), "", "", gold, _first(row, "id"), _first(row, "source", "dataset_source"))
    return problem_to_example(row)


def _verifiable(row: dict[str, Any]) -> Example:
    """
    A row of open-instruct's: its verifiers' names and, for each of them, a ground truth.

    Only maths has a gold here: code, constraints and references are not answers to be equal to.
    """
    verifiers, truths = (
        value if isinstance(value, list) else [value] for value in (row["dataset"], row["ground_truth"])
    )
    gold = None
    if len(verifiers) == 1 and verifiers[0] in MATHS:
        if len(truths) != 1 or not isinstance(truths[0], str) or not truths[0].strip():
            raise RowRejected("malformed", "ground_truth of a maths row is not one text")
        gold = truths[0].strip()
    source = _first(row, "original_dataset", "dataset_source") or "+".join(map(str, verifiers))
    return Example(_messages(row), "", "", gold, _first(row, "id", "custom_id", "key"), source)


def _first(row: dict[str, Any], *columns: str) -> str:
    return next((str(row[name]) for name in columns if row.get(name)), "")


def _messages(row: dict[str, Any]) -> list[dict[str, str]]:
    """The messages up to the answer, from `messages` or `prompt`; a text may be turns, `user: ..` before each."""
    given = row["messages"] if row.get("messages") is not None else row.get("prompt")
    if isinstance(given, str):
        messages = _turns(given.strip())
    elif isinstance(given, list) and all(isinstance(message, dict) for message in given):
        messages = [{"role": message.get("role"), "content": message.get("content")} for message in given]
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
    else:
        raise RowRejected("malformed", "the prompt is neither text nor messages")
    if not messages or not all(isinstance(text, str) and text.strip() for each in messages for text in each.values()):
        raise RowRejected("malformed", "the prompt is empty, or a message is without role or content")
    if messages[-1]["role"] != "user":
        raise RowRejected("malformed", "the prompt does not end with a user message")
    return messages


def _turns(text: str) -> list[dict[str, str]]:
    """`user: ..` and the turns after it; a text that only quotes such lines, not turn by turn, is one message."""
    marks = list(_TURN.finditer(text))
    roles = [mark.group(1) for mark in marks]
    if not marks or marks[0].start() != 0:
        return [{"role": "user", "content": text}]
    talk = roles[1:] if roles[0] == "system" else roles
    if talk != ["user", "assistant"] * (len(talk) // 2) + ["user"]:
        return [{"role": "user", "content": text.removeprefix("user: ")}]
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    return [
        {"role": role, "content": text[mark.end() : end].strip()}
        for role, mark, end in zip(roles, marks, ends, strict=True)
    ]
