"""
Files and folders that are whole or not there; what phases read, told apart by content; finished parts of work; who is
at work on a folder.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from abscot_trl.errors import Refused

MANIFEST = "manifest.json"
MANIFEST_KINDS = {"stage": str, "phase": str, "settings": dict, "inputs": dict, "wall_s": float, "attempts": int}
SETTINGS = "settings.json"  # in a folder of parts: what they were begun with
PRUNED = "pruned.json"  # in a model's folder: the digest it had before its weights were removed
CARD = "README.md"  # in a model's folder: words about it, which are written again, and no part of what it is
TEMPORARY = ".abscot-tmp"  # how a file ends that a kill left unfinished
INPUTS = ("model", "model_name_or_path", "base_model", "adapter", "data", "traces", "codes", "splits")
INPUTS += ("problems", "not_in", "prompts")
# Read with all folders below; a model's hold its checkpoints, which come and go.
WITH_FOLDERS = ("data", "problems", "not_in", "prompts")
WHERE = ("server", "batch_tokens")  # on what a phase's work is done: not what it makes
# The same of vLLM's arguments. All others are part of what is made: lengths, dtypes, quantisation, seeds, kernels.
ENGINE_WHERE = (
    "tensor_parallel_size",  # over how many devices
    "pipeline_parallel_size",
    "data_parallel_size",
    "enable_expert_parallel",
    "distributed_executor_backend",  # by what processes, and how they talk
    "disable_custom_all_reduce",
    "max_parallel_loading_workers",
    "gpu_memory_utilization",  # in how much memory
    "kv_cache_memory_bytes",
    "swap_space",
    "cpu_offload_gb",
    "block_size",  # pages of the cache of keys and values; its `kv_cache_dtype` is not exempt
    "enable_prefix_caching",  # the same keys and values, kept or made again
    "max_num_seqs",  # how many rows and tokens at a time
    "max_num_batched_tokens",
    "enable_chunked_prefill",
    "enforce_eager",  # with or without recorded graphs, which take memory
)

GRACE_S = 5.0  # what a killed process may take to go


def write_whole(path: str | Path, text: str | bytes) -> None:
    """
    Write a file so that a kill or a power cut leaves the old one or the new one.

    Raises:
        Refused: a folder stands there.
    """
    path = Path(path)
    if path.is_dir():
        raise Refused(f"{path} is a folder, where a file is to be written; move it away")
    temporary = path.with_name(f".{path.name}.{uuid4().hex}{TEMPORARY}")  # process ids repeat on other machines
    with open(temporary, "wb") as file:
        file.write(text.encode() if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def check_folder(path: str | Path) -> None:
    """
    What can be said of a folder that a phase will write, before it looks there.

    Raises:
        Refused: there can be no folder at `path`, or nothing may be written in it.
    """
    at = Path(path).absolute()
    try:
        for name in (at, at.with_name(f".{at.name}-12345678{TEMPORARY}")):  # and the longest that will stand beside it
            with suppress(FileNotFoundError, NotADirectoryError):
                os.stat(name)
        there = next(found for found in (at, *at.parents) if os.path.lexists(found))
    except (OSError, ValueError) as error:  # too long a name, a null byte, half a surrogate pair, links in a circle
        raise Refused(f"{str(path)!r:.80} is no name of a folder ({error!s:.200})") from error
    if not there.is_dir():
        raise Refused(f"{path}: {there} is a file, not a folder; choose another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise Refused(f"{path}: nothing may be written in {there}; choose another")


def look_again(path: str | Path) -> bool:
    """Whether `path` is there: a network disk may say for a minute that it was not, until its folder is listed."""
    path = Path(path).absolute()
    with suppress(FileNotFoundError, NotADirectoryError):
        return path.name in os.listdir(path.parent)
    return False


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """
    A temporary folder beside `path` that becomes `path` when the block ends well, and vanishes when it does not.

    Raises:
        Refused: `path` is there already; nothing is overwritten.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise Refused(f"{path} is there already; choose another output_dir or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=TEMPORARY, dir=path.parent))
    folder.chmod(0o755)
    try:
        yield folder
        folder.rename(path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def at_work(folder: str | Path, beside: bool = False, lock: Path | None = None) -> Iterator[None]:
    """
    Hold the lock of a folder, `.<name>.lock` next to it if not said otherwise, against other jobs.

    The processes of one job share it, so that it is free when the last of them has ended: the first asks for it alone,
    the others (`beside`: further ranks, shards) join. Forked processes hold it too. Where a network disk keeps locks
    to each machine (Lustre's `localflock`), jobs of other machines are not seen.

    Raises:
        Refused: another job is at work on the folder, and still is after `GRACE_S`; or there can be no folder, or no
            lock.
    """
    check_folder(folder)
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(lock or folder.with_name(f".{folder.name}.lock"), "a+") as file:
        if not beside:
            _flock(file, fcntl.LOCK_EX, folder, GRACE_S)
        _flock(file, fcntl.LOCK_SH, folder, 0.0)  # no second try: by then another job might share what was ours
        yield


def _flock(file: IO, kind: int, folder: Path, wait_s: float) -> None:
    end = time.monotonic() + wait_s
    while True:
        try:
            return fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise Refused(
                    f"{folder}: another process is still at work here; let it end, or stop it (`fuser {file.name}` "
                    "says which it is)"
                ) from None
        except OSError as error:
            raise Refused(
                f"{file.name}: the disk has no locks ({error.strerror}); mount it with them (Lustre: `-o flock`), or "
                "choose a folder on another"
            ) from error
        time.sleep(0.05)


def read_json(path: str | Path, remedy: str, *keys: str, **kinds: type) -> dict:
    """
    A JSON object that holds `keys`, and others whose values are of the `kinds` given: `settings=dict`.

    Raises:
        Refused: it is damaged or lacks one; the message names the file and ends in `remedy`.
    """
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise Refused("it is no file")
        content = json.loads(Path(path).read_text())
        if not isinstance(content, dict):
            raise Refused(f"it holds a {type(content).__name__}, not an object")
        if missing := [key for key in (*keys, *kinds) if key not in content]:
            raise Refused(f"it lacks {', '.join(missing)}")
        for key, kind in kinds.items():
            if not isinstance(content[key], kind):
                raise Refused(f"{key}: {content[key]!r:.80} is no {kind.__name__}")
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path} is damaged ({error}); {remedy}") from error
    return content


def read_manifest(folder: str | Path, *keys: str) -> dict:
    """What the stage that made `folder` says of itself; raises as `read_json`."""
    kinds = {key: MANIFEST_KINDS[key] for key in keys}
    return read_json(Path(folder) / MANIFEST, f"remove {folder} and run the stage again", **kinds)


@cache
def _content(path: str, inode: int, size: int, mtime_ns: int) -> str:
    """SHA-256 of a whole file; a process reads it again only when its size or time has changed."""
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def file_digest(path: str | Path) -> str:
    """Of a file's bytes."""
    state = os.stat(path)
    return _content(os.path.abspath(path), state.st_ino, state.st_size, state.st_mtime_ns)


def files_digest(files: Iterable[str | Path]) -> str:
    """Of the files' names and bytes."""
    return hashlib.sha256(json.dumps([[Path(file).name, file_digest(file)] for file in files]).encode()).hexdigest()


def path_digest(path: str | Path, with_folders: bool = False, with_card: bool = False) -> str | None:
    """
    Of a file its bytes; of a folder `files_digest`, `with_folders` of all files below; `None` where neither is.

    A folder's README.md counts only `with_card`, as it did in earlier versions.
    """
    path = Path(path)
    if (path / PRUNED).is_file():
        return read_json(path / PRUNED, "use another run_dir", "digest")["digest"]
    if path.is_file():
        return file_digest(path)
    if path.is_dir():
        found, left_out = path.rglob("*") if with_folders else path.iterdir(), {MANIFEST, CARD}
        left_out -= {CARD} if with_card else set()
        return files_digest(sorted(p for p in found if p.is_file() and p.name not in left_out))
    return None


def input_digests(settings: dict, with_card: bool = False) -> dict[str, str]:
    """The digest of each path among `settings`, of a list of paths one after another; a hub id has none."""
    digests = {}
    for key in INPUTS:
        value = settings.get(key)
        found = [
            path_digest(str(path), key in WITH_FOLDERS, with_card)
            for path in (value if isinstance(value, list) else [value])
        ]
        if found and None not in found:
            digests[key] = " ".join(found)
    return digests


def differences(then: dict, now: dict) -> dict[str, str]:
    """The settings, by name, that make one work another, in words: all but those that only say where it is done."""
    then, now = map(_what, (then, now))
    keys = [key for key in sorted(then | now) if then.get(key) != now.get(key)]
    return {key: f"{key!s:.80}: {then.get(key)!r:.200} -> {now.get(key)!r:.200}" for key in keys}


def _what(settings: dict) -> dict:
    engine = settings.get("engine")
    if isinstance(engine, dict):
        engine = {key: value for key, value in engine.items() if key not in ENGINE_WHERE}
    return {key: value for key, value in settings.items() if key not in WHERE} | {"engine": engine or None}


def phase_settings(args, **more) -> dict:
    """All that a phase's work depends on: its fields, the digests of its inputs, and `more`."""
    settings = {key: value for key, value in asdict(args).items() if key not in ("output_dir", "shard")}
    return settings | {"inputs": input_digests(settings), **more}


class Parts:
    """
    A long work in parts, each a JSON Lines file that is whole or not there: a killed one goes on where it was, and
    shards work side by side.

    They are kept in `<output_dir>.parts/` until they are joined, beside `SETTINGS`, which marks the folder as
    ours and says what they were made with. Which records a part holds depends on that alone, so that what is joined
    does not depend on who made which part, or on how often it was killed.

    Args:
        settings (`dict`): all that the records depend on.
        name (`str`): of a part's file, by its number.

    Raises:
        Refused: `output_dir` is there already;
            the folder is there but not ours, or holds parts that were made with other settings.
    """

    def __init__(self, output_dir: str | Path, settings: dict, name: str = "{:06}.jsonl"):
        if os.path.lexists(output_dir):
            raise Refused(f"{output_dir} is there already; choose another output_dir or remove it")
        self.folder, self.name = Path(f"{output_dir}.parts"), name
        self.folder.mkdir(parents=True, exist_ok=True)
        marker = self.folder / SETTINGS
        if not marker.is_file():
            # Ours is only what a kill left of writing it, or what another shard writes at this moment.
            if any(path.name != SETTINGS and path.suffix != TEMPORARY for path in self.folder.iterdir()):
                raise Refused(
                    f"{self.folder} holds finished work, but not the settings of it ({SETTINGS}), or is not of our "
                    "making; move it away"
                )
            if not marker.is_file():
                write_whole(marker, json.dumps(settings, indent=2) + "\n")
        begun = read_json(marker, f"remove {self.folder} to begin anew, or move it away")
        if words := ", ".join(differences(begun, json.loads(json.dumps(settings))).values()):
            raise Refused(f"{self.folder} was begun with other settings ({words}); go back to them or move it away")

    def path(self, number: int) -> Path:
        return self.folder / self.name.format(number)

    def done(self, number: int) -> bool:
        return self.path(number).is_file()

    def write(self, number: int, records: list[dict]) -> None:
        """Write one part, whole or not at all."""
        write_whole(self.path(number), "".join(json.dumps(record) + "\n" for record in records))

    def records(
        self, numbers: Iterable[int], sizes: Sequence[int] | None = None, kinds: dict[str, Any] | None = None
    ) -> Iterator[dict]:
        """
        The records of the parts `numbers`, in order.

        Raises:
            Refused: a damaged part, or one that does not hold `sizes[number]` records, or whose records have other
                fields than `kinds`, each of which is a type.
        """
        for number in numbers:
            path = self.path(number)
            try:
                records = [json.loads(line) for line in path.read_text().splitlines()]
                if not all(isinstance(record, dict) for record in records):
                    raise Refused("a line is no object")
                for key, kind in (kinds or {}).items():
                    if not all(isinstance(record.get(key, ...), kind) for record in records):
                        raise Refused(f"{key} is missing, or no {getattr(kind, '__name__', kind)}")
                if sizes is not None and len(records) != sizes[number]:
                    raise Refused(f"{len(records)} records, {sizes[number]} were written")
            except (ValueError, RecursionError) as error:
                raise Refused(f"{path} is damaged ({error}); remove it and run the same command again") from error
            yield from records

    @contextmanager
    def joining(self) -> Iterator[None]:
        """One process at a time: two shards may end at the same moment. The folder is gone when another has joined."""
        try:
            lock = open(self.folder / ".lock", "w")
        except FileNotFoundError:
            yield
            return
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def remove(self) -> None:
        """After joining. The settings go last: without them the rest would be nobody's, and stay."""
        for path in self.folder.glob("*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != SETTINGS:
                path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
