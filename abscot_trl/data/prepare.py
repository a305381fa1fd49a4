"""Phase `data`: rows -> parsed, tokenised, filtered by length -> one folder that every later phase reads."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict
from functools import cache
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from abscot_trl.checkpoint import load_tokenizer
from abscot_trl.data.arguments import DataArguments
from abscot_trl.data.dolci import RowRejected, data_files, iter_packed, iter_rows
from abscot_trl.data.overlap import load_index
from abscot_trl.data.reasoning_gym import check_cot, is_generated
from abscot_trl.data.rows import FEATURES, KEPT, OVERLAP, to_example
from abscot_trl.data.shards import CHUNK, SHARD, Made, Shards, made
from abscot_trl.errors import Refused
from abscot_trl.storage import check_folder, files_digest, read_json
from abscot_trl.vocabulary import AbstractVocabulary

COUNTS_FILE = "counts.json"


def prepare(args: DataArguments) -> dict[str, Any]:
    """
    Write `args.output_dir`, whole or not at all: a saved `Dataset` in shards, and `counts.json`, which is returned.

    Finished shards are kept in `<output_dir>.parts`; the same command goes on from them after a kill, and ends in the
    same files, whatever `num_proc`. Memory: the shuffle buffer (packed) and a few chunks a process.

    Columns: `id, source, prompt` (messages as JSON), `cot, answer, gold` (null where unknown), the token ids
    `prompt_ids, cot_ids, answer_ids`, and the CoT's `step_ends` and `step_lengths` (see `cot_columns`). Where a CoT
    was cut, all of its columns are those of what is left. A row without an id gets its source (or `row`) and its
    number among the rows read.

    Returns:
        `dict` with `rows_read` (= `rows_kept` + all `rejected` + all `filtered`; up to the last kept row under a
        limit), `rows_kept`, `rejected` by reason, `filtered` by filter (`overlap_same` and `overlap_ngram` are rows
        that hold a problem of `not_in`, see `ProblemIndex.find`), `cut`, `duplicate_ids` (kept rows whose id an
        earlier one has), `sources` of the kept rows, `lengths` in tokens (`total` includes the trace's m_max + 2),
        `tokenizer` (see `tokenizer_digest`), and `settings`.

    Raises:
        Refused: the output is there already;
            a row holds a problem of `not_in` (`overlap: error`);
            no row is kept (with the counts), a file cannot be read, or shards are there of other settings;
            a process died, or another preparation works on the same output.
    """
    output = Path(args.output_dir)
    check_folder(output)
    if output.exists():
        raise Refused(f"{output} exists already; remove it or choose another output_dir")
    vocabulary = AbstractVocabulary.load(args.tokenizer)
    tokenizer = load_tokenizer(args.tokenizer)
    vocabulary.ids(tokenizer)  # says what to do when the tokenizer was not extended
    elsewhere = {"output_dir", "num_proc"}  # where and by whom the work is done, not what it is
    settings = {key: value for key, value in asdict(args).items() if key not in elsewhere}
    for name in filter(is_generated, args.data):
        check_cot(name, args.data_split)
    files, trace_tokens, digest = data_files(args.data), vocabulary.m_max + 2, tokenizer_digest(tokenizer)
    inputs = {"tokenizer": digest, "trace_tokens": trace_tokens, "data": files and files_digest(files)}
    index = load_index(args.not_in)
    if index:
        inputs["not_in"] = hashlib.sha256(json.dumps(index.problems).encode()).hexdigest()
    rows = enumerate(iter_packed(args.data, args.data_split, args.data_config, args.seed, args.shuffle_buffer), 1)
    # What is kept does not depend on `overlap`: after a refusal `drop` goes on from the finished shards.
    with Shards(output, {k: v for k, v in settings.items() if k != "overlap"} | {"inputs": inputs}) as shards:
        _check_dropped(shards.outcomes(), args)
        rows = islice(rows, SHARD * len(shards.done), None)
        chunks = iter(lambda: list(islice(rows, CHUNK)), [])
        kept = sum(shards.outcomes()[name] for name in KEPT)
        if kept != args.limit:
            with closing(made(chunks, args, index)) as results:
                numbered = enumerate(_until(args.limit, kept, results))
                for _, results_of_shard in groupby(numbered, key=lambda item: item[0] // (SHARD // CHUNK)):
                    shards.write(result for _, result in results_of_shard)
        counts = _fates(shards.outcomes())
        if counts["rows_kept"] == 0:
            shards.remove()
            raise Refused(f"no row of {', '.join(args.data)} is kept: {json.dumps(counts)}{_first_word(args)}")
        counts |= _description(shards.join(), trace_tokens) | {"tokenizer": digest, "settings": settings}
        (shards.rows / COUNTS_FILE).write_text(json.dumps(counts, indent=2) + "\n")
        shards.finish()
    return counts


def _first_word(args: DataArguments) -> str:
    """What is wrong with the first row by itself, if anything is."""
    rows = iter_rows(args.data, args.data_split, args.data_config, args.seed, args.shuffle_buffer)
    try:
        to_example(next(rows, None), args.data_format)
    except RowRejected as error:
        return f"; of the first: {error}"
    return ""


def _check_dropped(outcomes: Counter[str], args: DataArguments) -> None:
    dropped = {name: n for name, n in outcomes.items() if name.startswith(f"filtered.{OVERLAP}")}
    if dropped and args.overlap == "error":
        raise Refused(
            f"{args.output_dir}: finished shards left out rows that hold problems of {', '.join(args.not_in)} "
            f"({json.dumps(dropped)}); go on with overlap: drop"
        )


def _until(limit: int | None, kept: int, results: Iterable[Made]) -> Iterator[Made]:
    """The results up to the row that is the `limit`-th kept; `kept` rows are there already."""
    with tqdm(desc="rows kept", total=limit, initial=kept, unit=" rows") as bar:
        for outcomes, table in results:
            if limit is not None and kept + len(table) >= limit:
                table = table[: limit - kept]
                last = [i for i, outcome in enumerate(outcomes) if outcome in KEPT][len(table) - 1]
                outcomes = outcomes[: last + 1]
            kept += len(table)
            bar.update(len(table))
            yield outcomes, table
            if kept == limit:
                return


def _fates(outcomes: Counter[str]) -> dict[str, Any]:
    def of(kind: str) -> dict[str, int]:
        return {name.removeprefix(kind): n for name, n in outcomes.most_common() if name.startswith(kind)}

    return {
        "rows_read": outcomes.total(),
        "rows_kept": sum(outcomes[name] for name in KEPT),
        "rejected": of("rejected."),
        "filtered": of("filtered."),
        "cut": outcomes["cut"],
    }


def row_lengths(data: Dataset) -> dict[str, np.ndarray]:
    """Tokens of each row's `prompt`, `cot` and `answer`; only the lengths are read."""
    names = ("prompt", "cot", "answer")
    return {name: pc.list_value_length(data.data.column(f"{name}_ids")).to_numpy() for name in names}


def _description(data: Dataset, trace_tokens: int) -> dict[str, Any]:
    """What was kept, column by column: only lengths, sources and ids are read."""
    table, lengths = data.data, row_lengths(data)
    lengths["total"] = sum(lengths.values()) + trace_tokens
    sources = {found["values"]: found["counts"] for found in pc.value_counts(table.column("source")).to_pylist()}
    return {
        "duplicate_ids": len(data) - pc.count_distinct(table.column("id")).as_py(),
        "sources": dict(Counter(sources).most_common()),
        "lengths": {name: _summary(values) for name, values in lengths.items()},
    }


def _summary(values: np.ndarray) -> dict[str, float]:
    median, p90, longest = np.percentile(values, [50, 90, 100])
    summary = {"mean": values.mean(), "median": median, "p90": p90, "max": longest}
    return {name: round(float(value), 1) for name, value in summary.items()}


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """
    SHA-256 of what decides which ids a row gets: vocabulary, normalizer, pre-tokenizer, .., chat template and EOS.

    Raises:
        Refused: a slow tokenizer.
    """
    if not tokenizer.is_fast:
        raise Refused(
            f"{tokenizer.name_or_path!r} has a slow tokenizer ({type(tokenizer).__name__}), which does not say where "
            "a step of the CoT ends; give it a tokenizer.json"
        )
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    del settings["padding"], settings["truncation"]  # left behind by who used it last
    content = json.dumps([settings, tokenizer.chat_template, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


@cache
def _validate(path: str, state: tuple) -> None:
    """Read all rows; data whose files have not changed (`state`) are read once by a process."""
    datasets.load_from_disk(path).data.validate(full=True)


def load_prepared(
    path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[Dataset, dict[str, Any]]:
    """
    The dataset and the counts that `prepare` wrote.

    Raises:
        Refused: no such folder, or not one of `prepare`'s;
            damaged files, or rows that hold the ids of another tokenizer than `tokenizer`.
    """
    path = Path(path)
    missing = [name for name in (COUNTS_FILE, "state.json") if not os.path.isfile(path / name)]
    if missing:
        raise Refused(f"{path} is not prepared data ({missing[0]} is missing); run `abscot data` first")
    remedy = "prepare the data again (`abscot data`)"
    counts = read_json(path / COUNTS_FILE, remedy, rows_kept=int, lengths=dict)
    try:
        data, files = datasets.load_from_disk(path), [os.stat(file) for file in sorted(path.glob("*.arrow"))]
        state = tuple((file.st_ino, file.st_size, file.st_mtime_ns) for file in files)
        _validate(os.path.abspath(path), state)  # a row that began beyond the file's end would end this process
    except Exception as error:  # whatever damaged bytes lead to
        raise Refused(f"{path} is damaged ({error}); {remedy}") from error
    if missing := [name for name in FEATURES if name not in data.column_names]:
        raise Refused(f"{path} lacks {', '.join(missing)}: an earlier version made it; {remedy}")
    if tokenizer is not None and counts.get("tokenizer") != tokenizer_digest(tokenizer):
        raise Refused(
            f"{path} was not prepared with the tokenizer of {tokenizer.name_or_path!r} (another vocabulary, "
            "normalizer, .. or chat template): prepare the data again with this checkpoint's tokenizer"
        )
    return data, counts
