"""`abscot traces`: the traces of one phase, initial or on policy, for the rows of one part of the data."""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from abscot_trl.checkpoint import load_tokenizer
from abscot_trl.data.prepare import load_prepared
from abscot_trl.data.splits import part_rows
from abscot_trl.errors import Refused
from abscot_trl.storage import Parts, at_work, check_folder, look_again, phase_settings, written_whole
from abscot_trl.traces import initial
from abscot_trl.traces.backends import SamplerArguments, engine_arguments, load_sampler
from abscot_trl.traces.batching import cut
from abscot_trl.traces.content import CONTENT_FILE, content_parts
from abscot_trl.traces.files import summarise_traces, write_traces
from abscot_trl.traces.parallel import parse_shard, run_jobs, visible_gpus
from abscot_trl.vocabulary import AbstractVocabulary


@dataclass
class TracesArguments(SamplerArguments):
    """
    Make the traces of one phase.

    Args:
        model (`str`): extended checkpoint: the policy, the base model of `content`, or the vocabulary's home.
        data (`str`): prepared data (`abscot data`).
        output_dir (`str`): where `traces.jsonl` and `summary.json` go. While a model is at work its finished parts
            are kept in `<output_dir>.parts`; the same command goes on from them.
        method (`str`): `uniform`, `cycle`, `power_law`, `content`, or `policy` (constrained decoding).
            Content takes backend `hf` and a process for each visible GPU; `engine: {data_parallel_size:
            n}` shares the GPUs among n processes instead.
        given (`str`): what the policy sees: `prompt` or `cot` (prompt and CoT).
        splits, part (`str`, *optional*): staged splits and the part to use (`1.bottleneck`); all rows otherwise.
        ratio (`float`): of `content`: tokens of the CoT for each of its trace.
        codes (`str`, *optional*): of `content`: a folder of such traces, by whose codes, influence and ratio these
            are made.
        part_tokens (`int`): tokens (prefixes and m_max) of one file of finished work: what a kill can cost.
        shard (`str`, *optional*): `2/8`: every eighth of these files; who finishes last joins them.
    """

    model: str = field(metadata={"help": "Extended checkpoint."})
    data: str = field(metadata={"help": "Prepared data (abscot data)."})
    output_dir: str = field(metadata={"help": "Where traces.jsonl and summary.json go."})
    method: str = field(
        default="policy",
        metadata={"help": "How traces are made.", "choices": [*initial.RANDOM_METHODS, "content", "policy"]},
    )
    given: str = field(
        default="prompt",
        metadata={"help": "What the policy sees: prompt, or prompt and cot.", "choices": ["prompt", "cot"]},
    )
    splits: str | None = field(default=None, metadata={"help": "Staged splits (splits.json)."})
    part: str | None = field(default=None, metadata={"help": "Part of the splits, e.g. 1.bottleneck."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the policy; 0 is greedy."})
    seed: int = field(default=0, metadata={"help": "Seed of draws and fits."})
    ratio: float = field(default=8.0, metadata={"help": "content: tokens of the CoT for each token of its trace."})
    codes: str | None = field(default=None, metadata={"help": "content: traces whose codes these take."})
    part_tokens: int = field(default=4_000_000, metadata={"help": "Tokens between two savings of the work done."})
    shard: str | None = field(default=None, metadata={"help": "Make only this share of the rows, e.g. 2/8."})

    def __post_init__(self):
        engine = engine_arguments(self.engine)
        if self.method == "content" and self.backend == "hf" and set(engine) <= {"data_parallel_size"}:
            self.engine = None
        super().__post_init__()
        self.engine = engine or None
        if (self.splits is None) != (self.part is None):
            raise Refused(f"splits and part go together, got splits={self.splits!r} and part={self.part!r}")
        if self.ratio < 1:
            raise Refused(f"ratio must be at least 1, got {self.ratio}")
        if self.codes and self.method != "content":
            raise Refused(f"codes {self.codes} are for method: content, not {self.method}")
        if self.part_tokens < 1:
            raise Refused(f"part_tokens must be at least 1, got {self.part_tokens}")
        parse_shard(self.shard)
        if self.method != "policy" and self.backend != "hf":
            raise Refused(f"method {self.method} samples no policy: backend {self.backend!r} is for method: policy")
        if self.method in initial.RANDOM_METHODS and self.shard:
            raise Refused(f"method {self.method} reads no model and takes seconds; leave shard {self.shard} out")


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
    if _processes(args) > 1:
        if os.path.lexists(args.output_dir):
            raise Refused(f"{args.output_dir} is there already; choose another output_dir or remove it")
        with at_work(f"{args.output_dir}.shards", beside=args.shard is not None):  # each is at work on `output_dir`
            return _by_processes(args)
    vocabulary = AbstractVocabulary.load(args.model)
    tokenizer = load_tokenizer(args.model)
    data, _ = load_prepared(args.data, tokenizer)
    rows = part_rows(args.splits, args.part, len(data))
    if args.method not in initial.RANDOM_METHODS:
        with at_work(args.output_dir, beside=args.shard is not None):
            make_parts = content_parts if args.method == "content" else _policy_parts
            parts, count, made = make_parts(
                args, vocabulary, tokenizer, data.select(rows), rows, *parse_shard(args.shard)
            )
            return _join(args, vocabulary, parts, count, rows, made)
    with written_whole(args.output_dir) as folder:
        part = data.select(rows)
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


def _policy_parts(
    args: TracesArguments,
    vocabulary: AbstractVocabulary,
    tokenizer: PreTrainedTokenizerBase,
    part: Dataset,
    rows: list[int],
    share: int,
    shares: int,
) -> tuple[Parts, int, int]:
    """z ~ pi_abs(. | x) or pi_abs(. | x, c), this share of the parts; returns them, how many in all and made here."""
    parts = Parts(args.output_dir, phase_settings(args, rows=len(rows)))
    columns = ["prompt_ids"] if args.given == "prompt" else ["prompt_ids", "cot_ids"]
    part = part.select_columns(["id", *columns])
    lengths = [
        len(prefix) + vocabulary.m_max + 2
        for batch in part.iter(1000)  # not the whole of it in memory
        for prefix in _prefixes(batch, args.given)
    ]
    spans = cut(lengths, args.part_tokens)
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
    return parts, len(spans), len(todo)


def _join(
    args: TracesArguments, vocabulary: AbstractVocabulary, parts: Parts, count: int, rows: list[int], made: int
) -> dict:
    """
    The `count` parts as one file, in the order of `rows`, if all are there.

    Where a network disk has no locks two shards may join at once: who comes second finds the first one's file.
    """
    at, kinds = {row: i for i, row in enumerate(rows)}, {"row": int, "trace": list}
    try:
        with parts.joining():
            if Path(args.output_dir).exists():  # another shard has joined them in the meantime
                return _summary(args)
            look_again(parts.path(0))
            left = sum(not parts.done(number) for number in range(count))
            if left:
                return {"shard": args.shard, "parts_made": made, "parts_left_to_others": left}
            with written_whole(args.output_dir) as folder:
                if args.method == "content":
                    shutil.copyfile(parts.folder / CONTENT_FILE, folder / CONTENT_FILE)
                records = sorted(parts.records(range(count), kinds=kinds), key=lambda record: at[record["row"]])
                summary = _write(args, folder, vocabulary, records, len(rows))
    except (OSError, Refused):
        if not Path(args.output_dir).exists():
            raise
        return _summary(args)
    parts.remove()
    return summary


def _processes(args: TracesArguments) -> int:
    """How many share the work of this call: as many as asked for; content has one a GPU."""
    default = len(visible_gpus()) if args.method == "content" else 1
    return (args.engine or {}).get("data_parallel_size", default) or 1


def _by_processes(args: TracesArguments) -> dict:
    """
    Data parallel: this call's share in several, each made by a process with GPUs of its own.

    Raises:
        Refused: more GPUs asked for than there are;
            a process failed; the parts that are finished are kept.
    """
    engine, processes, gpus = dict(args.engine or {}), _processes(args), visible_gpus()
    engine.pop("data_parallel_size", None)
    width = engine.get("tensor_parallel_size", 1)
    if args.backend == "hf":  # which spreads a model over all the GPUs that its process sees
        engine, width = {"data_parallel_size": 1}, max(len(gpus) // processes, 1)
    if gpus and len(gpus) < processes * width:
        raise Refused(
            f"data_parallel_size {processes} with tensor_parallel_size {width} needs {processes * width} GPUs, "
            f"{len(gpus)} are visible"
        )
    share, shares = parse_shard(args.shard)
    first, of = (share - 1) * processes + 1, shares * processes
    jobs = [asdict(replace(args, engine=engine, shard=f"{first + k}/{of}")) for k in range(processes)]
    try:
        run_jobs(jobs, [gpus[k * width : (k + 1) * width] for k in range(processes)])
    except Refused:  # of a process too, that had nothing left to do and came when the others had joined
        if not Path(args.output_dir).exists():
            raise
    if Path(args.output_dir).exists():
        return _summary(args)
    return {"shard": args.shard, "parts_left_to_others": True}
