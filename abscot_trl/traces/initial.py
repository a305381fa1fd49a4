"""
The first round's traces (section 3.2): drawn by length only, or clusters of what the base model thinks at each step.

Traces are codebook indices 0..M-1 here, delimiters left out.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from abscot_trl.errors import Refused
from abscot_trl.traces.batching import batches

CLUSTER_FILE = "clusters.safetensors"
RANDOM_METHODS = ("uniform", "cycle", "power_law")


def cot_steps(cot: str) -> list[str]:
    """The steps of a verbal CoT: its non-blank lines."""
    return [line for line in cot.split("\n") if line.strip()]


def random_trace(method: str, step_lengths: list[int], vocabulary_size: int, m_max: int, rng: Any) -> list[int]:
    """
    As many abstract tokens as the sum of rand(1, l/2) over steps of l tokens, cut at `m_max`.

    Args:
        method (`str`): `uniform`; `cycle`, through the codebook from its first token; or `power_law`, token k with
            probability proportional to 1 / (k + 1).
        rng: anything with `random() -> float` in [0, 1): `random.Random` or `numpy.random.Generator`.

    Returns:
        `list[int]`: codebook indices 0..`vocabulary_size` - 1.
    """
    length = min(sum(1 + int(rng.random() * max(1, tokens // 2)) for tokens in step_lengths), m_max)
    if method == "uniform":
        return [int(rng.random() * vocabulary_size) for _ in range(length)]
    if method == "cycle":
        return [i % vocabulary_size for i in range(length)]
    cumulative = np.cumsum(1.0 / np.arange(1, vocabulary_size + 1))
    return [int(np.searchsorted(cumulative, rng.random() * cumulative[-1])) for _ in range(length)]


def uniform_trace(
    cot: str, vocabulary_size: int, m_max: int, rng: Any, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """`random_trace` of a text, each of its steps tokenised alone; a prepared row has the lengths of its steps."""
    lengths = [len(tokenizer(step, add_special_tokens=False)["input_ids"]) for step in cot_steps(cot)]
    return random_trace("uniform", lengths, vocabulary_size, m_max, rng)


def group_ends(n_steps: int, m_max: int) -> list[int]:
    """Last step of each of at most `m_max` groups of consecutive steps, sizes equal to within one."""
    groups = min(n_steps, m_max)
    return [math.ceil((g + 1) * n_steps / groups) - 1 for g in range(groups)]


def _states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    among: Sequence[int],
    m_max: int,
    batch_tokens: int,
    progress: bool,
) -> Iterator[tuple[int, np.ndarray]]:
    """Of the rows `among` the last hidden states at the ends of their groups of steps: (row, (groups, d))."""
    backbone, pad = model.base_model, tokenizer.pad_token_id or 0
    lengths = [len(row["prompt_ids"]) + len(row["cot_ids"]) for row in (rows[i] for i in among)]
    with torch.inference_mode(), tqdm(total=len(among), unit="row", desc="step states", disable=not progress) as bar:
        for indices in batches(lengths, batch_tokens):
            longest = max(lengths[i] for i in indices)
            ids = torch.full((len(indices), longest), pad)
            batch = [rows[among[i]] for i in indices]
            for k, row in enumerate(batch):
                ids[k, : lengths[indices[k]]] = torch.tensor(row["prompt_ids"] + row["cot_ids"])
            mask = torch.arange(longest)[None] < torch.tensor([lengths[i] for i in indices])[:, None]
            output = backbone(input_ids=ids.to(model.device), attention_mask=mask.long().to(model.device))
            for hidden, i, row in zip(output.last_hidden_state, indices, batch, strict=True):
                ends = row["step_ends"]
                at = [len(row["prompt_ids"]) + ends[step] for step in group_ends(len(ends), m_max)]
                yield among[i], hidden[at].float().cpu().numpy()
            bar.update(len(indices))


def cluster_traces(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    vocabulary_size: int,
    m_max: int,
    seed: int = 0,
    folder: str | Path | None = None,
    fit_rows: int = 4096,
    batch_tokens: int = 32768,
    progress: bool = False,
) -> list[list[int]]:
    """
    A step's token is the k-means cluster of the base model's last hidden state at the step's end.

    Consecutive steps are grouped so that a trace fits `m_max`; the last state of a group stands for it.

    Args:
        rows (`list[dict]` or [`~datasets.Dataset`]): prepared rows with `prompt_ids`, `cot_ids` and `step_ends`.
        folder (`str` or `Path`, *optional*): where the centroids (M, d) are kept, as `clusters.safetensors`.
        fit_rows (`int`): rows the clusters are fitted on; all rows are then assigned.

    Raises:
        Refused: fewer step states than clusters.
    """
    training = model.training
    model.eval()
    chosen = np.random.default_rng(seed).permutation(len(rows))[:fit_rows].tolist()
    options = {"m_max": m_max, "batch_tokens": batch_tokens, "progress": progress}
    sample = np.concatenate([s for _, s in _states(model, tokenizer, rows, chosen, **options)])
    if len(sample) < vocabulary_size:
        raise Refused(
            f"{len(sample)} CoT steps in {len(chosen)} rows cannot form {vocabulary_size} clusters; give more rows "
            "or a smaller codebook"
        )
    from sklearn.cluster import MiniBatchKMeans  # seconds to import

    kmeans = MiniBatchKMeans(vocabulary_size, random_state=seed, n_init=10, batch_size=4096, max_iter=300).fit(sample)
    traces: list[list[int]] = [[]] * len(rows)
    for i, states in _states(model, tokenizer, rows, range(len(rows)), **options):
        traces[i] = kmeans.predict(states).tolist()
    model.train(training)
    if folder is not None:
        save_file({"centroids": torch.tensor(kmeans.cluster_centers_)}, Path(folder) / CLUSTER_FILE)
    return traces
