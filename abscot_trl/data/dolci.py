"""
Rows with a verbal chain-of-thought in think tags (allenai/Dolci-Think-SFT-7B), and reading rows from hub or disk.

A row is `{"messages": [{"content", "role"}, ..], "dataset_source", "id"}`, its last turn `<think>cot</think>answer`.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import IterableDataset, load_dataset
from pyarrow import ArrowException

from abscot_trl.data import reasoning_gym
from abscot_trl.errors import Refused
from abscot_trl.examples import Example

SUFFIXES = (".parquet", ".jsonl")
# The first shards of Dolci are WildChat rows with an empty thought: a buffer of 2,000 rows sees nothing else.
SHUFFLE_BUFFER = 20_000
READ_BATCH = 256  # rows of a parquet file in memory at a time

_TAG = re.compile(r"</?think>")
_BLOCK = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)


class RowRejected(ValueError):
    """A row that gives no example. `reason` is one of `REASONS`."""

    REASONS = (
        "no_think",
        "unclosed_think",
        "empty_think",
        "empty_answer",
        "no_user_turn",
        "no_assistant_turn",
        "malformed",
    )

    def __init__(self, reason: str, detail: str = ""):
        if reason not in self.REASONS:
            raise Refused(f"unknown reason {reason!r}; one of {', '.join(self.REASONS)}")
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def parse_row(row: dict[str, Any]) -> Example:
    """
    One row of Dolci-Think-SFT as an `Example`, its texts stripped of outer whitespace.

    The prompt is every turn before the last one, whatever its role; earlier assistant turns lose their thoughts.

    Raises:
        RowRejected: with, in the order checked,

            - `malformed`: `messages` is not a non-empty list of dicts with a string `role` and `content`;
            - `no_assistant_turn`: the last turn is not the assistant's;
            - `no_user_turn`: no user turn before it;
            - `no_think`: the last turn does not open with `<think>` (only whitespace may come before);
            - `unclosed_think`, `empty_think`, `empty_answer`: no `</think>`, nothing in the thought, nothing after it;
            - `malformed`: a second thought inside the answer.

        The thought ends where its tags balance; where they never do (a tag quoted in the thought), at the last
        `</think>`. Tags inside the thought, and closing tags left in the answer, are removed.
    """
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise RowRejected("malformed", "messages is not a non-empty list")
    for message in messages:
        if not (
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise RowRejected("malformed", "a message without a string role and a string content")
    *earlier, last = messages
    if last["role"] != "assistant":
        raise RowRejected("no_assistant_turn", f"the last turn is {last['role']!r}")
    if all(message["role"] != "user" for message in earlier):
        raise RowRejected("no_user_turn")
    cot, answer = _split_thought(last["content"].strip())
    return Example(
        prompt=[{"role": message["role"], "content": _without_thoughts(message)} for message in earlier],
        cot=cot,
        answer=answer,
        id=_text(row.get("id")),
        source=_text(row.get("dataset_source")),
    )


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _split_thought(text: str) -> tuple[str, str]:
    if not text.startswith("<think>"):
        raise RowRejected("no_think")
    depth, end = 0, None
    for tag in _TAG.finditer(text):
        depth += 1 if tag.group() == "<think>" else -1
        if tag.group() == "</think>":
            end = tag
            if depth == 0:
                break
    if end is None:
        raise RowRejected("unclosed_think")
    cot, rest = text[: end.start()], text[end.end() :]
    if "<think>" in rest:
        raise RowRejected("malformed", "a second thought inside the answer")
    cot, answer = _TAG.sub("", cot).strip(), _TAG.sub("", rest).strip()
    if not cot:
        raise RowRejected("empty_think")
    if not answer:
        raise RowRejected("empty_answer")
    return cot, answer


def _without_thoughts(message: dict[str, str]) -> str:
    if message["role"] != "assistant":
        return message["content"]
    return _TAG.sub("", _BLOCK.sub("", message["content"])).strip()


def iter_rows(
    data: str | list[str],
    split: str = "train",
    config: str | None = None,
    seed: int = 0,
    shuffle_buffer: int = SHUFFLE_BUFFER,
) -> Iterator[dict[str, Any]]:
    """
    Stream rows from local files or from the hub, shuffled through a buffer (shard order too).

    On their way they are JSON: a value that JSON lacks (a date) comes as its text.

    Args:
        data (`str` or `list[str]`): .parquet or .jsonl files, folders of them, one hub dataset id, or names of
            `data/reasoning_gym.py`.
        split, config (`str`): of a hub dataset; local files have none, reasoning-gym has `train` and `test`.
        seed (`int`): of the shuffle.
        shuffle_buffer (`int`): rows held in memory to draw from; 0 keeps the order of the files.

    Raises:
        Refused: nothing there, or a file that cannot be read; the message names it. A damaged
            parquet footer is found before the first row, a damaged page or a bad JSON line when it is reached.
    """
    return map(unpack, iter_packed(data, split, config, seed, shuffle_buffer))


def iter_packed(
    data: str | list[str],
    split: str = "train",
    config: str | None = None,
    seed: int = 0,
    shuffle_buffer: int = SHUFFLE_BUFFER,
) -> Iterator[dict[str, Any]]:
    """`iter_rows`, each row compressed (see `unpack`): 20,000 rows of Dolci are gigabytes, packed a quarter of it."""
    names, files = [data] if isinstance(data, str) else list(data), data_files(data)
    if any(map(reasoning_gym.is_generated, names)):
        rows = IterableDataset.from_generator(_generated_rows, gen_kwargs={"names": names, "split": split})
    elif files is None:
        rows = _hub_rows(names[0], split, config)
        rows = rows.map(pack, remove_columns=rows.column_names)
    else:
        # Whether a parquet file is whole stands in its footer: read them all before hours of work.
        for file in files:
            if file.endswith(".parquet"):
                _open_parquet(file).close()
        rows = IterableDataset.from_generator(_packed_rows, gen_kwargs={"files": files})
    return iter(rows.shuffle(seed=seed, buffer_size=shuffle_buffer) if shuffle_buffer > 0 else rows)


def data_files(data: str | list[str]) -> list[str] | None:
    """The local files that `data` names, `None` where it is a hub id or generated; raises as `local_files`."""
    names = [data] if isinstance(data, str) else list(data)
    generated = [name for name in names if reasoning_gym.is_generated(name)]
    if generated and len(generated) < len(names):
        raise Refused(f"{generated[0]} cannot be read with files or a hub dataset; prepare them one by one")
    if generated:
        return None
    if len(names) == 1 and is_hub_id(names[0]):
        return None
    return [file for name in names for file in local_files(name)]


def pack(row: dict[str, Any]) -> dict[str, Any]:
    """A row compressed, see `unpack`."""
    text = json.dumps(row, default=str).encode()
    return {"packed": pyarrow.Codec("zstd", 1).compress(text, asbytes=True), "size": len(text)}


def unpack(row: dict[str, Any]) -> dict[str, Any]:
    """A row as it was read."""
    return json.loads(pyarrow.Codec("zstd").decompress(row["packed"], row["size"], asbytes=True))


def is_hub_id(name: str) -> bool:
    return (
        re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None
        and not name.endswith((*SUFFIXES, ".json"))
        and not Path(name).exists()
    )


def _hub_rows(name: str, split: str, config: str | None) -> IterableDataset:
    try:
        return load_dataset(name, config, split=split, streaming=True)
    except (OSError, ValueError) as error:
        raise Refused(
            f"{name!r} is no file or folder here, and reading split {split!r} (config {config!r}) of the hub dataset "
            f"of that name failed: {error}"
        ) from error


def local_files(name: str) -> list[str]:
    """
    The .parquet or .jsonl files at `name`: itself, or all below a folder, sorted.

    Raises:
        Refused: nothing there, or a folder without such files;
            another kind of file, or a folder with both kinds.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise Refused(f"{name}: cannot read {path.suffix or 'a file without suffix'}; convert it to .jsonl")
        return [str(path)]
    if not path.is_dir():
        raise Refused(
            f"{name}: no such file or folder; give a .parquet or .jsonl file, a folder of them, or one hub id"
        )
    found = {suffix: sorted(str(file) for file in path.rglob(f"*{suffix}") if file.is_file()) for suffix in SUFFIXES}
    if all(found.values()):
        raise Refused(f"{name}: holds both .parquet and .jsonl files; name the files you mean")
    if not any(found.values()):
        raise Refused(f"{name}: no .parquet or .jsonl file in this folder")
    return found[".parquet"] or found[".jsonl"]


def _generated_rows(names: list[str], split: str) -> Iterator[dict[str, Any]]:
    for name in names:
        yield from map(pack, reasoning_gym.rows(name, split))


def _packed_rows(files: list[str]) -> Iterator[dict[str, Any]]:
    for file in files:
        yield from map(pack, _parquet_rows(file) if file.endswith(".parquet") else _jsonl_rows(file))


def _open_parquet(file: str) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise Refused(f"{file}: not a readable parquet file ({error}): copy it again") from error


def _parquet_rows(file: str) -> Iterator[dict[str, Any]]:
    with _open_parquet(file) as parquet:
        batches = parquet.iter_batches(batch_size=READ_BATCH)
        while True:
            try:
                batch = next(batches, None)
                rows = None if batch is None else batch.to_pylist()
            except (ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
                raise Refused(f"{file}: damaged parquet data ({error}): copy it again") from error
            if rows is None:
                return
            yield from rows


def _jsonl_rows(file: str) -> Iterator[dict[str, Any]]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise Refused(
                    f"{file}, line {number}: not JSON ({error}): mend the line or copy the file again"
                ) from error
            if not isinstance(row, dict):
                raise Refused(f"{file}, line {number}: a {type(row).__name__}, not an object with columns")
            yield row
