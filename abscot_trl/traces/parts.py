"""
Traces (or answers) made in parts: a killed run goes on where it was, and shards work side by side.

`<output_dir>.parts/` holds `settings.json` and a file for each finished part, written whole. Which rows a part holds
depends on the rows alone, so the joined file does not depend on who made which part, or on how often it was killed.
"""

import fcntl
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from abscot_trl.errors import Refused
from abscot_trl.storage import WHERE, begin_parts, input_digests, write_whole


def parse_shard(shard: str | None) -> tuple[int, int]:
    """
    `2/8` as (2, 8); `None` as (1, 1).

    Raises:
        Refused: anything else.
    """
    if shard is None:
        return 1, 1
    index, _, count = shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise Refused(f"shard {shard!r} is not of the form 2/8 (the second of eight)")
    return int(index), int(count)


class Parts:
    """
    The parts of one file.

    Args:
        args: a phase's fields, `output_dir` among them. The records depend on all but that, `shard` and `WHERE`.
        more: what else they depend on.

    Raises:
        Refused: `output_dir` is there already;
            parts are there that were made with other settings or inputs.
    """

    def __init__(self, args, **more):
        if Path(args.output_dir).exists():
            raise Refused(f"{args.output_dir} is there already; choose another output_dir or remove it")
        elsewhere = ("output_dir", "shard", *WHERE)
        settings = {key: value for key, value in asdict(args).items() if key not in elsewhere}
        self.folder = begin_parts(args.output_dir, settings | {"inputs": input_digests(settings), **more})

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06}.jsonl"

    def done(self, number: int) -> bool:
        return self._path(number).is_file()

    def write(self, number: int, records: list[dict]) -> None:
        """Write one part, whole or not at all."""
        write_whole(self._path(number), "".join(json.dumps(record) + "\n" for record in records))

    def records(self, numbers: Iterable[int], sizes: Sequence[int] | None = None) -> Iterator[dict]:
        """
        The records of the parts `numbers`, in order.

        Raises:
            Refused: a damaged part, or one that does not hold `sizes[number]` records.
        """
        for path in map(self._path, numbers):
            try:
                records = [json.loads(line) for line in path.read_text().splitlines()]
                if sizes is not None and len(records) != sizes[int(path.stem)]:
                    raise Refused(f"{len(records)} records, {sizes[int(path.stem)]} were written")
            except ValueError as error:
                raise Refused(f"{path} is damaged ({error}); remove it and run the same command again") from error
            yield from records

    @contextmanager
    def joining(self) -> Iterator[None]:
        """One process at a time: two shards may end at the same moment."""
        with open(self.folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def remove(self) -> None:
        """After joining."""
        shutil.rmtree(self.folder, ignore_errors=True)
