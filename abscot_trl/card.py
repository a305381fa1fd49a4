"""
The model card: README.md of a checkpoint, beside `origin.json`, which says what the model was made from and by whom.

A card ends in a mark with a digest of what stands above it. One that was edited no longer agrees with its mark, and is
never written over.
"""

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from string import Template

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from abscot_trl.errors import Refused
from abscot_trl.markdown import escaped
from abscot_trl.storage import CARD, read_json, write_whole
from abscot_trl.vocabulary import AbstractVocabulary

ORIGIN = "origin.json"

_MARK = "<!-- abscot_trl wrote what stands above, and leaves it alone once it is edited: {} -->\n"


def new_origin(base_model: str) -> dict:
    """What `abscot init` knows: `base_model` (a folder by its name alone), the `license` its card names, or `None`."""
    license, folder = None, Path(base_model)
    with suppress(OSError, ValueError, RecursionError, YAMLError):  # no card there, or none that can be read
        license = ModelCard((folder / CARD).read_text(), ignore_metadata_errors=True).data.get("license")
    name = folder.resolve().name if folder.is_dir() else base_model
    return {"base_model": name, "license": license if isinstance(license, str) else None, "trained": []}


def read_origin(folder: str | Path) -> dict:
    """
    Of a model or an adapter: `base_model`, `license`, and `trained`, the trainers that it has been through, in order;
    what is not known is absent.

    Raises:
        Refused: a damaged `origin.json`.
    """
    path = Path(folder) / ORIGIN
    if not path.is_file():
        return {}
    origin = read_json(path, "copy the model again, or remove the file", trained=list)
    texts = [*origin["trained"], origin.get("base_model") or "", origin.get("license") or ""]
    if not all(isinstance(text, str) for text in texts):
        raise Refused(f"{path} is damaged (a name is no text); copy the model again, or remove the file")
    return origin


def save_origin(folder: str | Path, origin: dict) -> None:
    if origin:
        (Path(folder) / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")


def _signed(text: str) -> str:
    return text + _MARK.format(hashlib.sha256(text.encode()).hexdigest())


def is_ours(path: Path) -> bool:
    """Whether a card is as this package wrote it."""
    text = path.read_bytes().decode(errors="replace")
    head, line, _ = text.rpartition(_MARK.partition("{")[0])
    return bool(line) and text == _signed(head)


def _origin_words(origin: dict, told: bool) -> str:
    base, trained = escaped(origin.get("base_model") or "a base model that is not named here"), origin.get("trained")
    terms = f"Its licence: {escaped(origin['license'])}." if origin.get("license") else "Its licence: not known"
    terms += "" if origin.get("license") else "; see the base model."
    if trained == []:
        return (
            f"**It is not trained**: this is {base} with the rows of the new tokens (`abscot init`), and what it "
            f"writes there means nothing yet. {terms}"
        )
    by = f" by {', '.join(map(escaped, trained))}" if trained else ""
    return f"It was made from {base}{by}. {terms}" + ("" if told else " No results have been written here.")


def write_card(folder: str | Path, vocabulary: AbstractVocabulary, results: str = "", **metadata) -> bool:
    """
    Write the card of the model in `folder`: what it is, its results, how to run it without this package.

    Args:
        results (`str`): Markdown, whose foreign text is escaped.
        metadata: further fields of `ModelCardData`.

    Returns:
        `bool`: `False` where another's card, or one that was edited, stands there: it stays.
    """
    path, origin = Path(folder) / CARD, read_origin(folder)
    if path.exists() and not is_ours(path):
        return False
    if re.fullmatch(r"[\w.-]+/[\w.-]+", origin.get("base_model") or ""):  # a name of the hub
        metadata["base_model"] = origin["base_model"]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["abstract-chain-of-thought", "trl"],
        license=origin.get("license"),
        **metadata,
    )
    card = Template((Path(__file__).parent / "model_card.md").read_text())
    words = {"metadata": data.to_yaml(), "origin": _origin_words(origin, bool(results)), "results": results}
    write_whole(path, _signed(card.substitute(asdict(vocabulary), **words)))
    return True
