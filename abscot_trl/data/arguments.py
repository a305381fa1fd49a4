"""The fields of `abscot data`."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from abscot_trl.data.dolci import SHUFFLE_BUFFER
from abscot_trl.data.overlap import NOT_IN_HELP, OVERLAP_HELP, OnOverlap
from abscot_trl.data.reasoning_gym import is_generated
from abscot_trl.errors import Refused

Format = Literal["dolci", "problems"]
Overlong = Literal["drop", "cut_cot_head", "cut_cot_middle", "cut_cot_tail"]


@dataclass
class DataArguments:
    """What to read, what to keep, and where to put it."""

    data: list[str] = field(
        metadata={"help": "Local .parquet or .jsonl files, folders of them, one hub id, or reasoning_gym:<task>."}
    )
    tokenizer: str = field(metadata={"help": "Folder of the extended checkpoint (`abscot init`)."})
    output_dir: str = field(metadata={"help": "Folder to write; must not exist yet."})
    data_format: Format = field(
        default="dolci",
        metadata={"help": "dolci: messages with think tags; problems: GSM8K or MATH rows with a worked solution."},
    )
    data_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset, e.g. main."})
    data_split: str = field(default="train", metadata={"help": "Split of a hub dataset or a task."})
    sources: list[str] | None = field(default=None, metadata={"help": "Keep only rows of these `dataset_source`s."})
    max_prompt_tokens: int | None = field(default=None, metadata={"help": "Drop rows with a longer prompt."})
    max_cot_tokens: int | None = field(default=None, metadata={"help": "Longest verbal CoT; see `overlong`."})
    min_cot_tokens: int | None = field(default=None, metadata={"help": "Drop rows with a shorter verbal CoT."})
    max_answer_tokens: int | None = field(default=None, metadata={"help": "Drop rows with a longer answer."})
    max_total_tokens: int | None = field(
        default=None,
        metadata={"help": "Longest prompt + CoT + trace (m_max and its delimiters) + answer; see `overlong`."},
    )
    overlong: Overlong = field(
        default="drop",
        metadata={
            "help": "A CoT that does not fit: drop the row, or take tokens out of its head (keeps the conclusion), "
            "middle or tail. Prompts and answers are never cut."
        },
    )
    not_in: list[str] = field(default_factory=list, metadata={"help": NOT_IN_HELP})
    overlap: OnOverlap = field(default="error", metadata={"help": OVERLAP_HELP})
    limit: int | None = field(default=None, metadata={"help": "Stop once this many rows are kept."})
    num_proc: int = field(default=1, metadata={"help": "Processes for tokenising."})
    shuffle_buffer: int = field(
        default=SHUFFLE_BUFFER,
        metadata={"help": "Rows held in memory to shuffle from; 0 keeps the order. Dolci needs 20,000."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the shuffle."})

    def __post_init__(self):
        if isinstance(self.data, str):
            self.data = [self.data]
        if isinstance(self.sources, str):
            self.sources = [self.sources]
        if isinstance(self.not_in, str):
            self.not_in = [self.not_in]
        if any(map(is_generated, self.data)):
            self.data_format = "problems"
        for name, kind in (("data_format", Format), ("overlong", Overlong), ("overlap", OnOverlap)):
            choices = get_args(kind)
            if getattr(self, name) not in choices:
                raise Refused(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        lengths = [name for name in vars(self) if name.endswith("_tokens")]
        for name in ("limit", "num_proc", *lengths, "shuffle_buffer", "seed"):
            value, least = getattr(self, name), 0 if name in ("shuffle_buffer", "seed") else 1
            if value is not None and value < least:
                raise Refused(f"{name} must be at least {least}, got {value}")
