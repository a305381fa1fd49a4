"""`abscot push`: upload a trained checkpoint to the hub, and nothing that stands beside it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from abscot_trl.card import ORIGIN, read_origin
from abscot_trl.checkpoint import verify_checkpoint, weight_files
from abscot_trl.errors import Refused
from abscot_trl.storage import CARD, PRUNED
from abscot_trl.units import size_words
from abscot_trl.vocabulary import FILE_NAME

FILES = (CARD, ORIGIN, FILE_NAME, "config.json", "generation_config.json", "model.safetensors.index.json")
FILES += ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
FILES += ("merges.txt", "tokenizer.model", "chat_template.jinja")
LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"


@dataclass
class PushArguments:
    """
    Upload a checkpoint to the hub.

    Args:
        model (`str`): folder of the checkpoint.
        repo (`str`): the repository, `someone/name`, or `name` of your own; made if it is not there.
        private (`bool`): whether only you may see it; with `false` everybody may.
        yes (`bool`): upload without asking.
        untrained (`bool`): upload what `abscot init` made, too.
    """

    model: str = field(metadata={"help": "Folder of the checkpoint."})
    repo: str = field(metadata={"help": "Repository on the hub: someone/name, or name of your own."})
    private: bool = field(default=True, metadata={"help": "Only you may see it; false: everybody may."})
    yes: bool = field(default=False, metadata={"help": "Upload without asking."})
    untrained: bool = field(default=False, metadata={"help": "Upload a checkpoint that is not trained, too."})


def files_of(model: Path) -> list[Path]:
    """What makes up a checkpoint: weights, tokenizer, configuration, card; no logs and no optimiser states."""
    weights = [file for file in weight_files(model) if file.parent == model]
    return [file for file in [*(model / name for name in FILES), *weights] if file.is_file()]


@contextmanager
def _hub(endpoint: str) -> Iterator[None]:
    """
    Raises:
        Refused: what the hub, or the way to it, refuses.
    """
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise Refused(f"{endpoint} asks for a token, and there is none: {LOGIN}") from error
    except HfHubHTTPError as error:
        status, words = error.response.status_code, error.server_message or error.response.reason_phrase
        if status in (401, 403):
            raise Refused(f"{endpoint} refuses the token (HTTP {status}: {words:.200}): {LOGIN}") from error
        remedy = "run the same command again in a while" if status >= 500 or status == 429 else "mend that, and again"
        raise Refused(f"{endpoint} answers HTTP {status} ({words:.300}): {remedy}") from error
    except (httpx.HTTPError, OfflineModeIsEnabled) as error:
        raise Refused(f"{endpoint} cannot be reached ({error!s:.200}): see HF_ENDPOINT and HF_HUB_OFFLINE") from error


def _agreed(model: Path, files: list[Path], where: str, args: PushArguments) -> bool:
    """Whether the user, who is shown what would go where, wants it so."""
    others = sorted(path.name + "/" * path.is_dir() for path in model.iterdir() if path not in files)
    rows = [(file.name, file.stat().st_size) for file in files]
    rows.append((f"{len(files)} files", sum(size for _, size in rows)))
    print(f"{model} to {where}:")  # noqa: T201
    print("\n".join(f"  {name:<32} {size_words(size):>8}" for name, size in rows))  # noqa: T201
    print(f"not uploaded: {', '.join(others) or 'nothing else is there'}", flush=True)  # noqa: T201
    if args.yes:
        return True
    if not sys.stdin.isatty():
        raise Refused("nothing is uploaded: there is no terminal to ask at; --yes true uploads without asking")
    return input("Upload? [y/N] ").strip().lower() in ("y", "yes")


def push(args: PushArguments) -> str:
    """
    `abscot push`: show what would be uploaded, ask, upload it in one commit.

    Returns:
        `str`: the commit's address.

    Raises:
        Refused: no checkpoint of ours, or one that is not trained; a repository that is public, unless `private` is
            off; nobody to ask, or a no; a hub that refuses, or is not to be reached.
    """
    model = Path(args.model)
    if (model / PRUNED).is_file():
        raise Refused(f"{model}: its weights were removed (`keep`); push a later model of the run")
    verify_checkpoint(model)
    if not read_origin(model).get("trained") and not args.untrained:
        says = "says that it is not trained" if (model / ORIGIN).is_file() else f"has no {ORIGIN}, which says whether"
        raise Refused(f"{model} {says}; push a trained model, or say --untrained true")
    api, files = HfApi(library_name="abscot_trl"), files_of(model)
    with _hub(api.endpoint):
        user = api.whoami()["name"]  # first of all: a token that is refused is no repository that is not there
        repo = args.repo if "/" in args.repo else f"{user}/{args.repo}"
        try:
            private = bool(api.model_info(repo).private)
            if args.private and not private:
                raise Refused(f"{repo} is there and public, and private is on; say --private false to upload to it")
            state = "which is there, "
        except HFValidationError as error:
            raise Refused(f"repo: {error!s:.300}") from error
        except RepositoryNotFoundError:
            private, state = args.private, "new, "
    if not _agreed(model, files, f"{api.endpoint}/{repo}, {state}{'private' if private else 'PUBLIC'}", args):
        raise Refused("nothing is uploaded, as you wished")
    with _hub(api.endpoint):
        if state == "new, ":
            api.create_repo(repo, private=private)
        additions = [CommitOperationAdd(file.name, str(file)) for file in files]
        try:
            done = api.create_commit(repo, additions, commit_message="abscot push")
        except HfHubHTTPError:
            raise
        except ValueError as error:
            if "metadata" not in str(error):
                raise
            raise Refused(f"{model / CARD}: the hub refuses its metadata ({error!s:.300}); mend them") from error
        except RuntimeError as error:  # of one file, whichever way it goes
            raise Refused(f"{error!s:.200} ({error.__cause__!s:.200}): run the same command again") from error
    print(done.commit_url)  # noqa: T201
    return str(done.commit_url)
