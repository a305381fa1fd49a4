"""Phase `data`: rows -> parsed, tokenised, filtered by length -> one folder that every later phase reads."""

import hashlib
import json
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import jinja2
import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from abscot_trl.data.dolci import SHUFFLE_BUFFER, RowRejected, iter_rows, parse_row
from abscot_trl.data.problems import problem_to_example
from abscot_trl.examples import Example, answer_ids, cot_ids, prompt_ids
from abscot_trl.vocabulary import AbstractVocabulary

COUNTS_FILE = "counts.json"
CHUNK = 2048  # rows tokenised at a time: what bounds the memory, and what one set of workers is started for
Format = Literal["dolci", "problems"]
Overlong = Literal["drop", "cut_cot_head", "cut_cot_middle", "cut_cot_tail"]

FEATURES = Features(
    {name: Value("large_string") for name in ("id", "source", "prompt", "cot", "answer", "gold")}
    | {name: List(Value("int32")) for name in ("prompt_ids", "cot_ids", "answer_ids")}
)


@dataclass
class DataArguments:
    """What to read, what to keep, and where to put it."""

    data: list[str] = field(
        metadata={"help": "Local .parquet or .jsonl files, folders of them, or one dataset id on the hub."}
    )
    tokenizer: str = field(metadata={"help": "Folder of the extended checkpoint (`abscot init`)."})
    output_dir: str = field(metadata={"help": "Folder to write; must not exist yet."})
    data_format: Format = field(
        default="dolci",
        metadata={"help": "dolci: messages with think tags; problems: GSM8K or MATH rows with a worked solution."},
    )
    data_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset, e.g. main."})
    data_split: str = field(default="train", metadata={"help": "Split of a hub dataset."})
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
        for name, choices in (("data_format", get_args(Format)), ("overlong", get_args(Overlong))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        lengths = [name for name in vars(self) if name.endswith("_tokens")]
        for name in ("limit", "num_proc", *lengths, "shuffle_buffer", "seed"):
            value, least = getattr(self, name), 0 if name in ("shuffle_buffer", "seed") else 1
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


def prepare(args: DataArguments) -> dict[str, Any]:
    """
    Write `args.output_dir`, whole or not at all: a saved `Dataset` and `counts.json`, which is also returned.

    Columns: `id, source, prompt` (messages as JSON), `cot, answer, gold` (null where unknown) and the token ids
    `prompt_ids, cot_ids, answer_ids`. Where a CoT was cut, `cot` is the text of what is left, and `cot_ids` are its
    ids. A row without an id gets its source (or `row`) and its number among the rows read.

    Returns:
        `dict` with `rows_read` (= `rows_kept` + all `rejected` + all `filtered`; up to the last kept row under a
        limit), `rows_kept`, `rejected` by reason, `filtered` by filter, `cut`, `duplicate_ids` (kept rows whose id an
        earlier one has), `sources` of the kept rows, `lengths` in tokens (`total` includes the trace's m_max + 2),
        `tokenizer` (see `tokenizer_digest`), and `settings`.

    Raises:
        FileExistsError: the output is there already.
        ValueError: no row is kept (with the counts), or a file cannot be read.
    """
    output = Path(args.output_dir)
    if output.exists():
        raise FileExistsError(f"{output} exists already; remove it or choose another output_dir")
    vocabulary = AbstractVocabulary.load(args.tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    vocabulary.ids(tokenizer)  # says what to do when the tokenizer was not extended
    preparation = _Preparation(args, tokenizer, vocabulary)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        arrow = str(Path(temporary) / "rows.arrow")
        writer = ArrowWriter(features=FEATURES, path=arrow, writer_batch_size=256)
        with tqdm(desc="rows kept", total=args.limit, unit=" rows") as bar:
            for row in preparation.kept_rows():
                writer.write(row)
                bar.update()
        counts = preparation.counts()
        if counts["rows_kept"] == 0:
            raise ValueError(f"no row of {', '.join(args.data)} is kept: {json.dumps(counts)}")
        writer.finalize()
        finished = Path(temporary) / "dataset"
        Dataset.from_file(arrow).save_to_disk(finished)
        (finished / COUNTS_FILE).write_text(json.dumps(counts, indent=2) + "\n")
        finished.rename(output)
    return counts


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the vocabulary and the chat template: what decides which ids a row gets."""
    content = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template])
    return hashlib.sha256(content.encode()).hexdigest()


def load_prepared(
    path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[Dataset, dict[str, Any]]:
    """
    The dataset and the counts that `prepare` wrote.

    Raises:
        FileNotFoundError: no such folder, or not one of `prepare`'s.
        ValueError: the rows hold the ids of another tokenizer than `tokenizer`.
    """
    path = Path(path)
    missing = [name for name in (COUNTS_FILE, "state.json") if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{path} is not prepared data ({missing[0]} is missing); run `abscot data` first")
    counts = json.loads((path / COUNTS_FILE).read_text())
    if tokenizer is not None and counts.get("tokenizer") != tokenizer_digest(tokenizer):
        raise ValueError(
            f"{path} was not prepared with the tokenizer of {tokenizer.name_or_path!r} (another vocabulary or chat "
            "template): prepare the data again with this checkpoint's tokenizer"
        )
    return datasets.load_from_disk(path), counts


class _Preparation:
    """Reads, tokenises and filters rows, and counts what became of each."""

    def __init__(self, args: DataArguments, tokenizer: PreTrainedTokenizerBase, vocabulary: AbstractVocabulary):
        self.args, self.tokenizer, self.trace_tokens = args, tokenizer, vocabulary.m_max + 2
        # `all_special_tokens` has only those with a role, such as EOS.
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= {*tokenizer.all_special_tokens, *vocabulary.tokens, vocabulary.begin, vocabulary.end}
        self.special = re.compile("|".join(re.escape(token) for token in special if token))
        self.read = self.cut = self.duplicate_ids = 0
        self.ids: set[str] = set()
        self.rejected: Counter[str] = Counter()
        self.filtered: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        self.lengths = {name: array("q") for name in ("prompt", "cot", "answer", "total")}

    def kept_rows(self) -> Iterator[dict[str, Any]]:
        args = self.args
        rows = enumerate(iter_rows(args.data, args.data_split, args.data_config, args.seed, args.shuffle_buffer), 1)
        kept = 0
        # A row counts when its turn comes, so that the counts add up wherever a limit stops.
        while outcomes := [self._outcome(*row) for row in islice(rows, self._chunk(kept))]:
            tokenised = self._tokenise([o for o in outcomes if isinstance(o, Example)])
            for outcome in outcomes:
                self.read += 1
                if isinstance(outcome, Example):
                    row = self._fit(next(tokenised))
                    if row is not None:
                        yield row
                        kept += 1
                        if kept == args.limit:
                            return
                else:
                    tally, name = outcome
                    tally[name] += 1

    def _chunk(self, kept: int) -> int:
        return CHUNK if self.args.limit is None else min(CHUNK, max(2 * (self.args.limit - kept), 64))

    def _outcome(self, number: int, row: dict[str, Any]) -> Example | tuple[Counter[str], str]:
        try:
            example = parse_row(row) if self.args.data_format == "dolci" else problem_to_example(row)
            if not example.cot:
                raise RowRejected("empty_think", "a problem without a worked solution")
            json.dumps(asdict(example), ensure_ascii=False).encode()
        except RowRejected as rejection:
            return self.rejected, rejection.reason
        except UnicodeEncodeError:  # half a surrogate pair: neither Arrow nor a tokenizer takes it
            return self.rejected, "malformed"
        if self.args.sources is not None and example.source not in self.args.sources:
            return self.filtered, "source"
        # The chat template's own control tokens and quoted ones come out as the same ids.
        if any(self.special.search(text) for message in example.prompt for text in message.values()):
            return self.filtered, "special_token_in_prompt"
        example.id = example.id or f"{example.source or 'row'}-{number}"
        return example

    def _tokenise(self, examples: list[Example]) -> Iterator[dict[str, Any]]:
        if not examples:
            return iter(())
        texts = [asdict(example) | {"prompt": json.dumps(example.prompt)} for example in examples]
        rows = Dataset.from_list(texts, features=Features({name: FEATURES[name] for name in texts[0]}))
        bars = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()  # one bar for all chunks instead
        try:
            encoded = rows.map(
                _encode,
                batched=True,
                batch_size=64,
                fn_kwargs={"tokenizer": self.tokenizer},
                features=FEATURES,
                num_proc=self.args.num_proc if self.args.num_proc > 1 else None,
                keep_in_memory=True,
                load_from_cache_file=False,
            )
        finally:
            if bars:
                datasets.enable_progress_bars()
        return iter(encoded)

    def _fit(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """The row if it fits, its CoT cut if it may be; else `None`, counted by the filter that dropped it."""
        args = self.args
        if row["prompt_ids"] is None:
            return self._drop("chat_template")
        prompt, cot, answer = (len(row[f"{name}_ids"]) for name in ("prompt", "cot", "answer"))
        if prompt > (args.max_prompt_tokens or prompt):
            return self._drop("prompt_too_long")
        if answer > (args.max_answer_tokens or answer):
            return self._drop("answer_too_long")
        shortest = args.min_cot_tokens or 1
        if cot < shortest:
            return self._drop("cot_too_short")
        others = prompt + answer + self.trace_tokens
        room = cot if args.max_total_tokens is None else args.max_total_tokens - others
        longest = args.max_cot_tokens or cot
        if cot > min(room, longest):
            fitting = None if args.overlong == "drop" else self._cut(row["cot_ids"], shortest, min(room, longest))
            if fitting is None:
                return self._drop("cot_too_long" if cot > longest and room >= shortest else "total_too_long")
            row["cot"], row["cot_ids"] = fitting
            cot = len(row["cot_ids"])
            self.cut += 1
        for name, length in (("prompt", prompt), ("cot", cot), ("answer", answer), ("total", others + cot)):
            self.lengths[name].append(length)
        self.sources[row["source"]] += 1
        self.duplicate_ids += row["id"] in self.ids
        self.ids.add(row["id"])
        return row

    def _cut(self, ids: list[int], shortest: int, longest: int) -> tuple[str, list[int]] | None:
        """The cut CoT and the ids of just that text, `shortest` to `longest`; `None` where that cannot be."""
        left = longest
        while left > 0:
            text = self.tokenizer.decode(cut_cot(ids, left, self.args.overlong), clean_up_tokenization_spaces=False)
            text = text.strip("\ufffd").strip()  # what a cut within a character leaves of it
            new = cot_ids(text, self.tokenizer)
            if len(new) <= longest:
                return (text, new) if text and len(new) >= shortest else None
            left -= len(new) - longest
        return None

    def _drop(self, name: str) -> None:
        self.filtered[name] += 1

    def counts(self) -> dict[str, Any]:
        return {
            "rows_read": self.read,
            "rows_kept": len(self.lengths["total"]),
            "rejected": dict(self.rejected.most_common()),
            "filtered": dict(self.filtered.most_common()),
            "cut": self.cut,
            "duplicate_ids": self.duplicate_ids,
            "sources": dict(self.sources.most_common()),
            "lengths": {name: _summary(values) for name, values in self.lengths.items() if values},
            "tokenizer": tokenizer_digest(self.tokenizer),
            "settings": asdict(self.args),
        }


def cut_cot(ids: list[int], length: int, overlong: Overlong) -> list[int]:
    """`length` ids of the CoT: without its head (`cut_cot_head`), its middle or its tail."""
    head = {"cut_cot_head": 0, "cut_cot_middle": length - length // 2, "cut_cot_tail": length}[overlong]
    return ids[:head] + ids[len(ids) - length + head :]


def _encode(batch: dict[str, list], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    return {
        "prompt_ids": [_prompt_ids(json.loads(prompt), tokenizer) for prompt in batch["prompt"]],
        "cot_ids": [cot_ids(cot, tokenizer) for cot in batch["cot"]],
        "answer_ids": [answer_ids(answer, tokenizer) for answer in batch["answer"]],
    }


def _prompt_ids(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    try:
        return prompt_ids(messages, tokenizer)
    except jinja2.TemplateError:  # templates refuse roles, or their order, that other templates take
        return None


def _summary(values: array) -> dict[str, float]:
    median, p90, longest = np.percentile(values, [50, 90, 100]).round(1).tolist()
    return {"median": median, "p90": p90, "max": longest}
