"""What phases read, told apart by content; files that are whole or not there; who is at work on a folder."""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from abscot_trl.errors import Refused

MANIFEST = "manifest.json"
SETTINGS = "settings.json"  # in a folder of parts: what they were begun with
PRUNED = "pruned.json"  # in a model's folder: the digest it had before its weights were removed
WHERE = ("engine", "server", "batch_tokens")  # on what a phase's work is done: not what it makes
INPUTS = ("model", "model_name_or_path", "adapter", "data", "traces", "splits", "problems")

TEMPORARY = ".abscot-tmp"  # how a file ends that a kill left unfinished
GRACE_S = 5.0  # what a killed process may take to go


def write_whole(path: str | Path, text: str) -> None:
    """Write a file so that a kill or a power cut leaves the old one or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def at_work(folder: str | Path, beside: bool = False, lock: Path | None = None) -> Iterator[None]:
    """
    Hold the lock of a folder, `.<name>.lock` next to it if not said otherwise, against other jobs.

    The processes of one job share it, so that it is free when the last of them has ended: the first asks for it alone,
    the others (`beside`: further ranks, shards) join. Forked processes hold it too.

    Raises:
        Refused: another job is at work on the folder, and still is after `GRACE_S`.
    """
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
        time.sleep(0.05)


def read_json(path: str | Path, remedy: str, *keys: str) -> dict:
    """
    A JSON object that holds `keys`.

    Raises:
        Refused: it is damaged or lacks one; the message names the file and ends in `remedy`.
    """
    try:
        content = json.loads(Path(path).read_text())
        if not isinstance(content, dict):
            raise Refused(f"it holds a {type(content).__name__}, not an object")
        if missing := [key for key in keys if key not in content]:
            raise Refused(f"it lacks {', '.join(missing)}")
    except ValueError as error:
        raise Refused(f"{path} is damaged ({error}); {remedy}") from error
    return content


def read_manifest(folder: str | Path, *keys: str) -> dict:
    """What the stage that made `folder` says of itself; raises as `read_json`."""
    return read_json(Path(folder) / MANIFEST, f"remove {folder} and run the stage again", *keys)


def begin_parts(output_dir: str | Path, settings: dict) -> Path:
    """
    `<output_dir>.parts`, where the finished parts of a long work are kept, with the `settings` it was begun with.

    Raises:
        Refused: it was begun with other settings, or nobody knows with which.
    """
    folder = Path(f"{output_dir}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    if not path.is_file():
        if any(part.name[0] != "." for part in folder.iterdir()):
            raise Refused(f"{folder} holds finished work, but not the settings of it ({path.name}); remove it")
        write_whole(path, json.dumps(settings, indent=2) + "\n")
    begun, settings = read_json(path, f"remove {folder} to begin anew"), json.loads(json.dumps(settings))
    other = [key for key in sorted(begun | settings) if begun.get(key) != settings.get(key)]
    if other:
        differences = ", ".join(f"{key}: {begun.get(key)!r} -> {settings.get(key)!r}" for key in other)
        raise Refused(f"{folder} was begun with other settings ({differences}); go back to them or remove it")
    return folder


def files_digest(files: Iterable[str | Path]) -> str:
    """Of the files' names, sizes and contents; of one over 4 MiB 256 stretches, evenly spread, first and last too."""
    digest = hashlib.sha256()
    for file in map(Path, files):
        size, stretch = file.stat().st_size, 2**14
        digest.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as content:
            if size <= 256 * stretch:
                digest.update(content.read())
                continue
            for k in range(256):  # the head alone is the header and embedding rows that LoRA never trains
                content.seek(k * (size - stretch) // 255)
                digest.update(content.read(stretch))
    return digest.hexdigest()


def path_digest(path: str | Path) -> str | None:
    """Of a file its bytes, of a folder `files_digest`; `None` where neither is (a hub id)."""
    path = Path(path)
    if (path / PRUNED).is_file():
        return read_json(path / PRUNED, "use another run_dir", "digest")["digest"]
    if path.is_file():
        with open(path, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    if path.is_dir():
        return files_digest(sorted(p for p in path.iterdir() if p.is_file() and p.name != MANIFEST))
    return None


def input_digests(settings: dict) -> dict[str, str]:
    """The digest of each path among `settings`, of a list of paths one after another."""
    given = {key: settings.get(key) for key in INPUTS}
    digests = {k: [path_digest(str(path)) for path in (v if isinstance(v, list) else [v])] for k, v in given.items()}
    return {key: " ".join(found) for key, found in digests.items() if found and None not in found}
