"""What phases read, told apart by content."""

import hashlib
import json
import os
from pathlib import Path

MANIFEST = "manifest.json"
PRUNED = "pruned.json"  # in a model's folder: the digest it had before its weights were removed
INPUTS = ("model", "model_name_or_path", "adapter", "data", "traces", "splits", "problems")


def write_whole(path: str | Path, text: str) -> None:
    """Write a file so that a kill or a power cut leaves the old one or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def path_digest(path: str | Path) -> str | None:
    """Of a file its bytes, of a folder its files' names, sizes and heads; `None` where neither is (a hub id)."""
    path, digest = Path(path), hashlib.sha256()
    if (path / PRUNED).is_file():
        return json.loads((path / PRUNED).read_text())["digest"]
    if path.is_file():
        digest.update(path.read_bytes())
    elif path.is_dir():
        for file in sorted(p for p in path.iterdir() if p.is_file() and p.name != MANIFEST):
            with open(file, "rb") as content:
                digest.update(f"{file.name} {file.stat().st_size} ".encode() + content.read(2**20))
    else:
        return None
    return digest.hexdigest()


def input_digests(settings: dict) -> dict[str, str]:
    """The digest of each path among `settings`."""
    digests = {key: path_digest(str(settings.get(key))) for key in INPUTS}
    return {key: digest for key, digest in digests.items() if digest is not None}
