"""
Traces and answers by a running `vllm serve` or `abscot serve`, once it is known to serve the checkpoint that is meant.

A server is known by what it serves, not by its names: `abscot serve` tells the digest of its weights; of a plain
`vllm serve` the folder that it loaded is read, where this machine sees it.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tqdm import tqdm

from abscot_trl.errors import Refused
from abscot_trl.storage import files_digest
from abscot_trl.traces.vllm import Completions, EngineTraceSampler, own_vocabulary
from abscot_trl.vocabulary import AbstractVocabulary

CONCURRENT_REQUESTS = 64  # of one client; as trl's
PATIENCE = 600  # seconds for a question that takes milliseconds, behind other clients' requests
DIGEST = "weights_digest"  # beside `id` and `root` in what `abscot serve` answers to /v1/models


def complete_there(client, prompts: list[list[int]], parameters: list[dict], bar: tqdm | None = None) -> Completions:
    """Completions by a `vllm serve` endpoint: a request each, so that each has its seed. `client`: trl's."""

    def request(prompt: list[int], fields: dict) -> tuple[list[int], list[float]]:
        output = client.generate([prompt], generation_kwargs=fields)
        if bar is not None:
            bar.update()
        return output["completion_ids"][0], [step[0] for step in output["logprobs"][0]]

    with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
        return list(pool.map(request, prompts, parameters))


class ServerTraceSampler(EngineTraceSampler):
    """
    Samples from a running `vllm serve` (or `abscot serve`) over its completions endpoint, ids in and out.

    Args:
        url (`str`): `http://host:port`. The server needs `--logprobs-mode processed_logprobs`.
        model_path, vocabulary: the checkpoint that it serves, as in [`VLLMTraceSampler`].

    Raises:
        Refused: nothing that speaks vLLM's API answers at `url`; it serves a model with other abstract tokens or other
            weights, or it cannot be known which; it gives log-probabilities that are not renormalised.
    """

    def __init__(self, url: str, model_path: str, vocabulary: AbstractVocabulary | None = None):
        url, vocabulary = url.rstrip("/"), vocabulary or own_vocabulary(model_path)
        served = served_model(url)  # before trl's client, which tries for half a minute
        from trl.generation.vllm_client import VLLMClient

        client = VLLMClient(base_url=url)
        super().__init__(partial(complete_there, client), model_path, vocabulary, served["max_model_len"])
        if vocabulary is not None:
            check_server(client, self.end, vocabulary.end)
        check_weights(url, served, model_path)


def served_model(url: str) -> dict:
    """
    What a server says of the model that it serves: `id`, `max_model_len`, `root`, and our `weights_digest`.

    Raises:
        Refused: nothing answers, or not in the form of vLLM.
    """
    import httpx

    try:
        response = httpx.get(f"{url}/v1/models", timeout=PATIENCE, trust_env=False)
        served = response.raise_for_status().json()["data"][0]
        if isinstance(served["id"], str) and isinstance(served["max_model_len"], int):
            return served
        words = f"it serves {served!s:.300}"
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        words = f"{type(error).__name__}: {error}"
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        words = f"/v1/models is answered otherwise: {error!r}"
    raise Refused(f"no vLLM server answers at {url} ({words}); start it, or mend the address")


def weights_digest(folder: str | Path) -> str | None:
    """Of a checkpoint's config and weights, on whichever machine it lies; `None` where there are none (a hub id)."""
    files = sorted(Path(folder).glob("*.safetensors")) if os.path.isdir(folder) else []
    return files_digest([Path(folder) / "config.json", *files]) if files else None


def check_weights(url: str, served: dict, model_path: str) -> None:
    """
    Raises:
        Refused: the server's weights are others than the checkpoint's, or cannot be known.
    """
    root, mine = str(served.get("root")), weights_digest(model_path)
    theirs = served.get(DIGEST) or weights_digest(root)
    if mine is None:  # a hub id is its own identity
        mine, theirs = model_path, theirs or root
    if theirs is None:
        raise Refused(
            f"{url} serves {served['id']} from {root}, which is not to be seen from here: whether its weights are "
            f"those of {model_path} cannot be known; serve that by `abscot serve`, which tells"
        )
    if theirs != mine:
        raise Refused(
            f"{url} serves {served['id']} from {root}, whose weights are not those of {model_path}: "
            "serve the checkpoint that `model` names"
        )


def check_server(client, end: int, end_text: str) -> None:
    """
    One forced token tells both: its text, that the server's abstract tokens are ours; its log-probability, 0, that
    they are taken after the constraint.

    Raises:
        Refused: as in [`ServerTraceSampler`].
    """
    import requests

    forced = {"allowed_token_ids": [end], "max_tokens": 1, "logprobs": 0, "skip_special_tokens": False}
    body = {"model": client.model, "prompt": [end], **forced}
    try:
        response = client.session.post(f"{client.base_url}/v1/completions", json=body, timeout=PATIENCE)
    except requests.RequestException as error:  # it is tried again first
        raise Refused(f"{client.base_url} does not answer ({error!s:.300}); mend it, or name another") from error
    if not response.ok:
        raise Refused(
            f"{client.base_url} serves {client.model}, which does not take token {end} ({response.text:.300}): "
            "serve the checkpoint that `model` names"
        )
    try:
        choice = response.json()["choices"][0]
        text, (logp,) = choice["text"], choice["logprobs"]["token_logprobs"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise Refused(f"{client.base_url} answers otherwise than vLLM ({error!r}); give a `vllm serve`") from error
    if text != end_text:
        raise Refused(
            f"{client.base_url} serves {client.model}, whose token {end} is {text!r} and not {end_text!r}: "
            "serve the checkpoint that `model` names"
        )
    if logp != 0.0:
        raise Refused(
            f"{client.base_url} gives raw log-probabilities; start it with `--logprobs-mode processed_logprobs` "
            "(`abscot serve` does)"
        )
