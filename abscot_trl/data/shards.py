"""
Preparation in shards: bounded memory, several processes, and a killed one goes on where it was.

A shard is what is kept of `SHARD` rows read. Its bytes depend on these rows alone, so the prepared data does not
depend on how many processes made it, or on how often they were killed.
"""

import fcntl
import json
import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import count, islice, takewhile
from pathlib import Path

import datasets
import pyarrow as pa
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter
from datasets.config import DATASET_INFO_FILENAME, DATASET_STATE_JSON_FILENAME
from datasets.fingerprint import Hasher
from transformers import AutoTokenizer

from abscot_trl.data.arguments import DataArguments
from abscot_trl.data.overlap import ProblemIndex
from abscot_trl.data.rows import FEATURES, KEPT, RowMaker
from abscot_trl.errors import Refused
from abscot_trl.storage import Parts, write_whole
from abscot_trl.vocabulary import AbstractVocabulary

SHARD = 8192  # rows read for one file: what a kill can cost
CHUNK = 64  # rows given to a process at a time: with num_proc, what bounds the memory; divides SHARD
BATCH = 256  # rows of a record batch on disk, at least
Made = tuple[list[str], pa.Table]


def made(chunks: Iterator[list], args: DataArguments, index: ProblemIndex | None = None) -> Iterator[Made]:
    """
    What `RowMaker` makes of each chunk, in their order; `args.num_proc` processes, two chunks each under way.

    Raises:
        Refused: a process died; a row holds a problem of the evaluation (`overlap: error`).
    """
    global _maker
    tokenizer, vocabulary = AutoTokenizer.from_pretrained(args.tokenizer), AbstractVocabulary.load(args.tokenizer)
    _maker = RowMaker(args, tokenizer, vocabulary, index)
    if args.num_proc == 1:
        yield from map(_work, chunks)
        return
    # Forked: imports, tokenizer and index are shared, not loaded again by each.
    with ProcessPoolExecutor(args.num_proc, multiprocessing.get_context("fork"), _end_with_parent) as pool:
        try:
            pool.submit(os.getpid).result()  # forks all of them, before the shuffle buffer fills
            under_way = deque(pool.submit(_work, chunk) for chunk in islice(chunks, 2 * args.num_proc))
            while under_way:
                result = under_way.popleft().result()
                under_way.extend(pool.submit(_work, chunk) for chunk in islice(chunks, 1))
                yield result
        except BrokenProcessPool as error:
            raise Refused(
                f"one of {args.num_proc} processes died, of too little memory perhaps: the same command goes on after "
                "the last finished shard; a lower num_proc takes less memory"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _work(chunk: list) -> Made:
    return _maker(chunk)


def _end_with_parent() -> None:
    """A parent that is killed tells nobody: watch it."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Shards:
    """
    The shards of one preparation; a context manager that holds a lock.

    A shard is one of the [`Parts`] of `<output_dir>`: its file holds the counts, its rows are in `rows/` beside, which
    becomes `output_dir` once it is whole: no row is written twice.

    Args:
        output (`Path`): where the prepared data will go.
        settings (`dict`): everything that it depends on.

    Raises:
        Refused: shards are there that were made with other settings or from other rows;
            another process is at work on them.
    """

    def __init__(self, output: Path, settings: dict):
        self.output, self.settings, self.parts = output, settings, Parts(output, settings, "{:05}.json")
        self.folder = self.parts.folder
        self.rows = self.folder / "rows"
        self.done: list[dict[str, int]] = []  # outcomes of each finished shard

    def __enter__(self) -> "Shards":
        self.lock = open(self.folder / ".lock", "w")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by forks
        except OSError:
            self.lock.close()
            raise Refused(f"{self.folder}: another preparation is at work here") from None
        if not self.rows.is_dir():  # not begun, or moved to an output that is gone
            for counts in self.folder.glob("[0-9]*.json"):
                counts.unlink()
            self.rows.mkdir()
        numbers = list(takewhile(self.parts.done, count()))
        self.done = list(self.parts.records(numbers, [1] * len(numbers)))
        return self

    def __exit__(self, error_type, *_) -> None:
        if error_type and not self.done:
            self.remove()
        self.lock.close()

    def outcomes(self) -> Counter[str]:
        """What became of the rows read so far."""
        return sum(map(Counter, self.done), Counter())

    def write(self, results: Iterable[Made]) -> None:
        """Write the next shard, whole or not at all."""
        unfinished, outcomes, held = self.folder / "unfinished.arrow", Counter(), []
        with ArrowWriter(features=FEATURES, path=str(unfinished)) as writer:
            for found, table in results:
                outcomes.update(found)
                held += [table] if len(table) else []
                if sum(map(len, held)) >= BATCH:
                    writer.write_table(pa.concat_tables(held))
                    held = []
            if held:
                writer.write_table(pa.concat_tables(held))
            writer.finalize()
        if any(outcomes[name] for name in KEPT):
            with open(unfinished, "rb") as file:
                os.fsync(file.fileno())
            unfinished.replace(self.rows / f"data-{len(self.done):05}.arrow")
        self.parts.write(len(self.done), [outcomes])
        self.done.append(dict(outcomes))

    def join(self) -> Dataset:
        """The shards as one dataset on disk, in `rows`."""
        files = sorted(file.name for file in self.rows.glob("data-*.arrow"))
        sizes = [(self.rows / name).stat().st_size for name in files]
        # As `Dataset.save_to_disk` writes them; it would write the rows again.
        state = dict.fromkeys(("_format_columns", "_format_type", "_split"))
        state |= {"_format_kwargs": {}, "_output_all_columns": False}
        state["_data_files"] = [{"filename": name} for name in files]
        state["_fingerprint"] = Hasher.hash([self.settings, self.done, sizes])
        write_whole(self.rows / DATASET_STATE_JSON_FILENAME, json.dumps(state, indent=2, sort_keys=True) + "\n")
        info = json.dumps({"features": FEATURES.to_dict()}, indent=2)
        write_whole(self.rows / DATASET_INFO_FILENAME, info + "\n")
        return datasets.load_from_disk(self.rows)

    def finish(self) -> None:
        """Move the dataset to where it belongs."""
        self.rows.rename(self.output)
        self.remove()

    def remove(self) -> None:
        self.parts.remove()
