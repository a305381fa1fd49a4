"""`abscot traces`: the traces of one phase, initial or on policy, for the rows of one part of the data."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from abscot_trl.checkpoint import load_model, load_tokenizer
from abscot_trl.data.prepare import load_prepared
from abscot_trl.data.splits import part_rows
from abscot_trl.errors import Refused
from abscot_trl.processes import start
from abscot_trl.storage import Parts, at_work, check_folder, phase_settings, written_whole
from abscot_trl.traces import initial
from abscot_trl.traces.backends import SamplerArguments, load_sampler
from abscot_trl.traces.batching import cut
from abscot_trl.traces.files import summarise_traces, write_traces
from abscot_trl.vocabulary import AbstractVocabulary


@dataclass
class TracesArguments(SamplerArguments):
    """
    Make the traces of one phase.

    Args:
        model (`str`): extended checkpoint: the policy, the base model of the clusters, or the vocabulary's home.
        data (`str`): prepared data (`abscot data`).
        output_dir (`str`): where `traces.jsonl` and `summary.json` go. While `policy` is at work its finished parts
            are kept in `<output_dir>.parts`; the same command goes on from them.
        method (`str`): `uniform`, `cycle`, `power_law`, `clusters`, or `policy` (constrained decoding).
        given (`str`): what the policy sees: `prompt` or `cot` (prompt and CoT).
        splits, part (`str`, *optional*): staged splits and the part to use (`1.bottleneck`); all rows otherwise.
        part_tokens (`int`): tokens (prefixes and m_max) of one file of finished work: what a kill can cost.
        shard (`str`, *optional*): `2/8`: every eighth of these files; who finishes last joins them.
    """

    model: str = field(metadata={"help": "Extended checkpoint."})
    data: str = field(metadata={"help": "Prepared data (abscot data)."})
    output_dir: str = field(metadata={"help": "Where traces.jsonl and summary.json go."})
    method: str = field(
        default="policy",
        metadata={"help": "How traces are made.", "choices": [*initial.RANDOM_METHODS, "clusters", "policy"]},
    )
    given: str = field(
        default="prompt",
        metadata={"help": "What the policy sees: prompt, or prompt and cot.", "choices": ["prompt", "cot"]},
    )
    splits: str | None = field(default=None, metadata={"help": "Staged splits (splits.json)."})
    part: str | None = field(default=None, metadata={"help": "Part of the splits, e.g. 1.bottleneck."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the policy; 0 is greedy."})
    seed: int = field(default=0, metadata={"help": "Seed of draws and clusters."})
    part_tokens: int = field(default=4_000_000, metadata={"help": "Tokens between two savings of the work done."})
    shard: str | None = field(default=None, metadata={"help": "Make only this share of the rows, e.g. 2/8."})

    def __post_init__(self):
        super().__post_init__()
        if (self.splits is None) != (self.part is None):
            raise Refused(f"splits and part go together, got splits={self.splits!r} and part={self.part!r}")
        if self.part_tokens < 1:
            raise Refused(f"part_tokens must be at least 1, got {self.part_tokens}")
        parse_shard(self.shard)
        if self.method != "policy" and (self.shard or self.backend != "hf"):
            raise Refused(
                f"method {self.method} samples no policy: shard {self.shard!r} and backend {self.backend!r} are for "
                "method: policy"
            )


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


def make_traces(args: TracesArguments) -> dict:
    """
    Make and write the traces of `args.part`.

    Returns:
        `dict`: the summary written beside them, or, of a shard that was not the last, how many parts are left. Rows
        whose prefix leaves no room in the model are dropped and counted (`dropped_too_long`).

    Raises:
        Refused: inputs that are missing or do not belong together, or the output is there already.
    """
    check_folder(args.output_dir)
    if (args.engine or {}).get("data_parallel_size", 1) > 1:
        with at_work(f"{args.output_dir}.shards"):  # each of them is at work on `output_dir`
            return _by_processes(args)
    vocabulary = AbstractVocabulary.load(args.model)
    tokenizer = load_tokenizer(args.model)
    data, _ = load_prepared(args.data, tokenizer)
    rows = part_rows(args.splits, args.part, len(data))
    if args.method == "policy":
        with at_work(args.output_dir, beside=args.shard is not None):
            return _from_policy(args, vocabulary, tokenizer, data.select(rows), rows)
    with written_whole(args.output_dir) as folder:
        part = data.select(rows)
        if args.method == "clusters":
            traces = initial.cluster_traces(
                load_model(args.model, args.dtype, device_map="auto"),
                tokenizer,
                part.select_columns(["prompt_ids", "cot_ids", "step_ends"]),
                vocabulary.size,
                vocabulary.m_max,
                args.seed,
                folder,
                batch_tokens=args.batch_tokens,
                progress=True,
            )
        else:
            rng, size, m_max = np.random.default_rng(args.seed), vocabulary.size, vocabulary.m_max
            traces = [initial.random_trace(args.method, lengths, size, m_max, rng) for lengths in part["step_lengths"]]
        made = zip(rows, part["id"], traces, strict=True)
        records = ({"row": row, "id": id, "trace": trace} for row, id, trace in made)
        return _write(args, folder, vocabulary, records, len(rows))


def _write(
    args: TracesArguments, folder: Path, vocabulary: AbstractVocabulary, records: Iterable[dict], n_rows: int
) -> dict:
    traces = write_traces(folder, records)
    if not traces:
        raise Refused(f"{args.data}: none of {n_rows} rows left the model room for a trace; use shorter rows")
    summary = summarise_traces(traces, vocabulary)
    summary |= {"dropped_too_long": n_rows - len(traces), "method": args.method, "given": args.given}
    summary |= {"temperature": args.temperature, "seed": args.seed, "backend": args.backend}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _summary(args: TracesArguments) -> dict:
    return json.loads((Path(args.output_dir) / "summary.json").read_text())


def _prefixes(rows: dict[str, list], given: str) -> list[list[int]]:
    """Token ids of x, or of x and c."""
    if given == "prompt":
        return rows["prompt_ids"]
    return [x + c for x, c in zip(rows["prompt_ids"], rows["cot_ids"], strict=True)]


def _from_policy(
    args: TracesArguments,
    vocabulary: AbstractVocabulary,
    tokenizer: PreTrainedTokenizerBase,
    part: Dataset,
    rows: list[int],
) -> dict:
    """z ~ pi_abs(. | x) or pi_abs(. | x, c), part by part."""
    parts = Parts(args.output_dir, phase_settings(args, rows=len(rows)))
    columns = ["prompt_ids"] if args.given == "prompt" else ["prompt_ids", "cot_ids"]
    part = part.select_columns(["id", *columns])
    lengths = [
        len(prefix) + vocabulary.m_max + 2
        for batch in part.iter(1000)  # not the whole of it in memory
        for prefix in _prefixes(batch, args.given)
    ]
    spans = cut(lengths, args.part_tokens)
    share, shares = parse_shard(args.shard)
    mine = range(share - 1, len(spans), shares)
    todo = [number for number in mine if not parts.done(number)]
    ready = sum(len(spans[number]) for number in mine) - sum(len(spans[number]) for number in todo)
    if todo:
        sampler = load_sampler(args, args.model, tokenizer, vocabulary)
        index = {token: i for i, token in enumerate(vocabulary.ids(tokenizer))}
        total = sum(len(spans[number]) for number in mine)
        title = f"traces {args.shard or ''}".strip()
        with tqdm(total=total, initial=ready, unit="row", desc=title, position=share - 1) as bar:
            for number in todo:
                span = spans[number]
                batch = part[span.start : span.stop]
                fitting = [i for i in span if lengths[i] <= sampler.positions]
                prefixes = _prefixes(batch, args.given)
                if args.backend == "vllm":  # what parts before have left there would change the last bits of sums
                    sampler.llm.reset_prefix_cache()
                traces = sampler.sample(
                    [prefixes[i - span.start] for i in fitting],
                    vocabulary.m_max,
                    vocabulary.m_min,
                    args.temperature,
                    args.seed,
                    rows=fitting,
                    bar=bar,
                )
                bar.update(len(span) - len(fitting))
                parts.write(
                    number,
                    [
                        {
                            "row": rows[i],
                            "id": batch["id"][i - span.start],
                            "trace": [index[token] for token in trace.token_ids],
                            "logp": round(sum(trace.logps) + trace.end_logp, 4),
                            "forced_end": trace.forced_end,
                        }
                        for i, trace in zip(fitting, traces, strict=True)
                    ],
                )
    with parts.joining():
        if Path(args.output_dir).exists():  # another shard has joined them in the meantime
            return _summary(args)
        left = sum(not parts.done(number) for number in range(len(spans)))
        if left:
            return {"shard": args.shard, "parts_made": len(todo), "parts_left_to_others": left}
        with written_whole(args.output_dir) as folder:
            summary = _write(args, folder, vocabulary, parts.records(range(len(spans))), len(rows))
    parts.remove()
    return summary


def _by_processes(args: TracesArguments) -> dict:
    """
    Data parallel: `data_parallel_size` shards, each in a process with the GPUs that its engine needs.

    Raises:
        Refused: more GPUs asked for than there are;
            a process failed; the parts that are finished are kept.
    """
    engine = dict(args.engine)
    shares, width = engine.pop("data_parallel_size"), engine.get("tensor_parallel_size", 1)
    if args.shard:
        raise Refused(f"shard {args.shard} and data_parallel_size {shares} are two ways to one end; use one")
    devices = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    devices = [device for device in devices.split(",") if device]
    if devices and len(devices) < shares * width:
        raise Refused(
            f"data_parallel_size {shares} with tensor_parallel_size {width} needs {shares * width} GPUs, "
            f"{len(devices)} are visible"
        )
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for share in range(shares):
                config = Path(folder) / f"shard{share + 1}.yaml"
                config.write_text(yaml.safe_dump(asdict(replace(args, engine=engine, shard=f"{share + 1}/{shares}"))))
                mine = ",".join(devices[share * width : (share + 1) * width])
                visible = {"CUDA_VISIBLE_DEVICES": mine} if devices else {}
                command = [sys.executable, "-m", "abscot_trl.scripts.traces", "--config", str(config)]
                processes.append(start(command, env=os.environ | visible, stdout=subprocess.DEVNULL))
            failed = sum(process.wait() != 0 for process in processes)
        finally:
            for process in processes:
                process.terminate()
    if failed:
        raise Refused(f"{failed} of {shares} processes failed, see above; the same command goes on from here")
    return _summary(args)
