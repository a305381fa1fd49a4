"""`abscot traces`: the traces of one phase, initial or on policy, for the rows of one part of the data."""

import json
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from abscot_trl.checkpoint import written_whole
from abscot_trl.data.prepare import load_prepared
from abscot_trl.data.splits import load_splits
from abscot_trl.traces import initial
from abscot_trl.traces.files import summarise_traces, write_traces
from abscot_trl.traces.hf import HFTraceSampler
from abscot_trl.vocabulary import AbstractVocabulary

RANDOM_METHODS = {
    "uniform": initial.uniform_trace,
    "cycle": initial.cycle_trace,
    "power_law": initial.power_law_trace,
}


@dataclass
class TracesArguments:
    """
    Make the traces of one phase.

    Args:
        model (`str`): extended checkpoint: the policy, the base model of the clusters, or the vocabulary's home.
        data (`str`): prepared data (`abscot data`).
        output_dir (`str`): where `traces.jsonl` and `summary.json` go.
        method (`str`): `uniform`, `cycle`, `power_law`, `clusters`, or `policy` (constrained decoding).
        given (`str`): what the policy sees: `prompt` or `cot` (prompt and CoT).
        splits, part (`str`, *optional*): staged splits and the part to use (`1.bottleneck`); all rows otherwise.
    """

    model: str = field(metadata={"help": "Extended checkpoint."})
    data: str = field(metadata={"help": "Prepared data (abscot data)."})
    output_dir: str = field(metadata={"help": "Where traces.jsonl and summary.json go."})
    method: str = field(
        default="policy",
        metadata={"help": "How traces are made.", "choices": [*RANDOM_METHODS, "clusters", "policy"]},
    )
    given: str = field(
        default="prompt",
        metadata={"help": "What the policy sees: prompt, or prompt and cot.", "choices": ["prompt", "cot"]},
    )
    splits: str | None = field(default=None, metadata={"help": "Staged splits (splits.json)."})
    part: str | None = field(default=None, metadata={"help": "Part of the splits, e.g. 1.bottleneck."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the policy; 0 is greedy."})
    seed: int = field(default=0, metadata={"help": "Seed of draws and clusters."})
    batch_tokens: int = field(default=65536, metadata={"help": "Most tokens of one batch."})
    dtype: str = field(default="auto", metadata={"help": "dtype of the weights."})

    def __post_init__(self):
        if (self.splits is None) != (self.part is None):
            raise ValueError(f"splits and part go together, got splits={self.splits!r} and part={self.part!r}")


def part_rows(splits: str | None, part: str | None, n_rows: int) -> list[int]:
    """
    Row numbers of one part of the staged splits, or of all the data.

    Raises:
        ValueError: the splits have no such part.
    """
    if splits is None:
        return list(range(n_rows))
    parts = load_splits(splits, n_rows=n_rows)
    if part not in parts:
        raise ValueError(f"{splits} has no part {part!r}; it has {', '.join(parts)}")
    return parts[part]


def make_traces(args: TracesArguments) -> dict:
    """
    Make and write the traces of `args.part`.

    Returns:
        `dict`: the summary written beside them. Rows whose prefix leaves no room in the model are dropped and counted
        there (`dropped_too_long`).

    Raises:
        FileNotFoundError, ValueError: inputs that are missing or do not belong together.
    """
    vocabulary = AbstractVocabulary.load(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data, _ = load_prepared(args.data, tokenizer)
    rows = part_rows(args.splits, args.part, len(data))
    part = data.select(rows)
    with written_whole(args.output_dir) as folder:
        if args.method in RANDOM_METHODS:
            draw, rng = RANDOM_METHODS[args.method], np.random.default_rng(args.seed)
            found = [{"trace": draw(c, vocabulary.size, vocabulary.m_max, rng, tokenizer)} for c in part["cot"]]
        else:
            model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype, device_map="auto")
            if args.method == "clusters":
                traces = initial.cluster_traces(
                    model,
                    tokenizer,
                    part.select_columns(["id", "cot", "prompt_ids", "cot_ids"]).to_list(),
                    vocabulary.size,
                    vocabulary.m_max,
                    args.seed,
                    folder,
                    batch_tokens=args.batch_tokens,
                    progress=True,
                )
                found = [{"trace": trace} for trace in traces]
            else:
                found = _policy_traces(args, vocabulary, model, tokenizer, part)
        records = [
            {"row": row, "id": id, **record} for row, id, record in zip(rows, part["id"], found, strict=True) if record
        ]
        if not records:
            raise ValueError(
                f"{args.data}: none of {len(rows)} rows left the model room for a trace; use shorter rows"
            )
        summary = summarise_traces([record["trace"] for record in records], vocabulary.size)
        summary |= {"dropped_too_long": len(rows) - len(records), "method": args.method, "given": args.given}
        summary |= {"temperature": args.temperature, "seed": args.seed}
        write_traces(folder, records)
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _policy_traces(args: TracesArguments, vocabulary, model, tokenizer, part: Dataset) -> list[dict | None]:
    """z ~ pi_abs(. | x) or pi_abs(. | x, c); `None` for a row that leaves the model no room."""
    prefixes = part["prompt_ids"]
    if args.given == "cot":
        prefixes = [x + c for x, c in zip(prefixes, part["cot_ids"], strict=True)]
    room = model.config.max_position_embeddings - vocabulary.m_max - 2
    fitting = [i for i, prefix in enumerate(prefixes) if len(prefix) <= room]
    sampler = HFTraceSampler(model, tokenizer, vocabulary, args.batch_tokens)
    traces = sampler.sample(
        [prefixes[i] for i in fitting],
        vocabulary.m_max,
        vocabulary.m_min,
        args.temperature,
        args.seed,
        progress=True,
    )
    index = {token: i for i, token in enumerate(vocabulary.ids(tokenizer))}
    found: list[dict | None] = [None] * len(prefixes)
    for i, trace in zip(fitting, traces, strict=True):
        found[i] = {
            "trace": [index[token] for token in trace.token_ids],
            "logp": round(sum(trace.logps) + trace.end_logp, 4),
            "forced_end": trace.forced_end,
        }
    return found
