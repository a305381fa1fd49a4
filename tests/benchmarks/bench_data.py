"""
`abscot data` on many rows: rows a second and peak memory, with one and two processes, and after a kill.

    python tests/benchmarks/bench_data.py                # 200,000 rows, two CPU cores, under 20 minutes
    python tests/benchmarks/bench_data.py --rows 5000

Rows in the shape of Dolci-Think-SFT: grouped by source, chats with an empty thought first; CoTs of log-normal length,
a few very long; one row in 50 unusable. Their text is lines of `../shared/data` where that is there, else made-up
words; the tokenizer is a byte-level BPE trained on it. CoTs are shorter than Dolci's (median 20,000 tokens): set
`--median_words` for longer ones. Memory is that of the command and all of its processes together (proportional set
size, five times a second). Exit code 1 when it reaches 2 GiB, when the runs' files differ, or rows are missing.
"""

import argparse
import hashlib
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet
from datasets import load_from_disk
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from abscot_trl.data.toy import CHAT_TEMPLATE
from abscot_trl.vocabulary import AbstractVocabulary

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
BOUND = 2 * 2**30
MAX_TOTAL = 8192
REJECTS = {
    "no_think": "{answer}",
    "unclosed_think": "<think>\n{cot}",
    "empty_answer": "<think>\n{cot}\n</think>",
    "malformed": "<think>\n{cot}\n</think>\n\n{answer}<think>again</think>",
}
SOURCES = ("maths", "python", "science", "instructions")

MESSAGES = pa.list_(pa.struct({"content": pa.string(), "role": pa.string()}))
SCHEMA = pa.schema({"messages": MESSAGES, "dataset_source": pa.string(), "id": pa.string()})


def lines(rng: random.Random) -> list[str]:
    """Some thousand lines of text."""
    found = []
    for file in ("gsm8k_train.jsonl", "math_train_4500.jsonl", "think_sft_sample.jsonl"):
        if (DATA / file).is_file():
            for row in map(json.loads, (DATA / file).read_text().splitlines()):
                text = row["cot"] if "cot" in row else row["messages"][-1]["content"].split("</think>")[0]
                found += [line for line in text.replace("<think>", "").split("\n") if line.strip()]
    if not found:
        letters = "etaoinshrdlucmfwypvbgk"
        words = ["".join(rng.choices(letters, range(22, 0, -1), k=rng.randint(2, 9))) for _ in range(30_000)]
        weights = [1 / rank for rank in range(1, len(words) + 1)]
        found = [" ".join(rng.choices(words, weights, k=rng.randint(5, 25))) + "." for _ in range(20_000)]
    return found


def write_rows(folder: Path, args: argparse.Namespace, text: list[str], rng: random.Random) -> Counter[str]:
    """Parquet files of rows in the order of the sources; returns how many rows are unusable, by reason."""
    folder.mkdir()
    mean = sum(len(line.split()) for line in text) / len(text)
    rejected: Counter[str] = Counter()

    def row(number: int) -> dict:
        cot = answer = " ".join(rng.choices(text, k=2))
        source = "wildchat" if number < args.rows // 8 else SOURCES[len(SOURCES) * number // args.rows]
        if source == "wildchat":
            content, reason = f"<think>\n\n</think>\n\n{answer}", "empty_think"
        else:
            words = rng.lognormvariate(math.log(args.median_words), 0.9) * (20 if rng.random() < 0.005 else 1)
            cot = "\n".join(rng.choices(text, k=max(1, round(words / mean))))
            reason = rng.choice(list(REJECTS)) if rng.random() < 0.02 else None
            content = REJECTS.get(reason, "<think>\n{cot}\n</think>\n\n{answer}").format(cot=cot, answer=answer)
        rejected[reason] += reason is not None
        turns = {"user": rng.choice(text), "assistant": content}
        messages = [{"content": content, "role": role} for role, content in turns.items()]
        return {"messages": messages, "dataset_source": source, "id": f"{source}-{number}"}

    files = 8
    for file in range(files):
        start, stop = (k * args.rows // files for k in (file, file + 1))
        with pyarrow.parquet.ParquetWriter(folder / f"{file}.parquet", SCHEMA) as out:
            for first in range(start, stop, 1000):
                out.write_table(pa.Table.from_pylist([row(n) for n in range(first, min(first + 1000, stop))], SCHEMA))
    return rejected


def write_tokenizer(folder: Path, text: list[str]) -> None:
    """A byte-level BPE of some 16,000 tokens with the abstract ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<eos>", "<user>", "<assistant>"]
    trainer = trainers.BpeTrainer(
        vocab_size=16_000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", chat_template=CHAT_TEMPLATE)
    vocabulary = AbstractVocabulary()
    vocabulary.extend(fast)
    fast.save_pretrained(folder)
    vocabulary.save(folder)


def memory(process: psutil.Process) -> int:
    """Bytes of the process and all below it; pages that several share count once."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_full_info().pss
        except psutil.Error:  # it has ended
            pass
    return total


def cpu_seconds() -> float:
    """Of all children that have ended, and theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(folder: Path, name: str, num_proc: int, kill_after: int | None = None) -> dict:
    """`abscot data` in a process of its own; `kill_after`: killed once so many shards are finished."""
    command = [sys.executable, "-m", "abscot_trl.scripts.data", "--data", str(folder / "rows")]
    command += ["--tokenizer", str(folder / "tokenizer"), "--output_dir", str(folder / name)]
    command += ["--max_total_tokens", str(MAX_TOTAL), "--num_proc", str(num_proc)]
    began, used, peak = time.perf_counter(), cpu_seconds(), 0
    with open(folder / f"{name}.log", "a") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        process = psutil.Process(child.pid)
        while child.poll() is None:
            peak = max(peak, memory(process))
            if kill_after and len(list((folder / f"{name}.parts").glob("[0-9]*.json"))) >= kill_after:
                child.send_signal(signal.SIGKILL)
                child.wait()
            time.sleep(0.2)
    if child.returncode and not kill_after:
        raise RuntimeError((folder / f"{name}.log").read_text()[-3000:])
    return {"seconds": time.perf_counter() - began, "cpu": cpu_seconds() - used, "peak": peak}


def contents(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--median_words", type=float, default=250, help="of a CoT")
    args = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = lines(rng)
        rejected = write_rows(folder / "rows", args, text, rng)
        write_tokenizer(folder / "tokenizer", text)
        size = sum(file.stat().st_size for file in (folder / "rows").iterdir())
        print(f"{args.rows:,} rows, {size / 2**20:,.0f} MiB of parquet", flush=True)
        print(
            "| run | seconds | CPU seconds | rows a second | peak MiB, all processes |\n|---|---:|---:|---:|---:|",
            flush=True,
        )
        runs = {}

        def show(title: str, found: dict, rows: int | None) -> None:
            runs[title] = found
            rate = f"{rows / found['seconds']:,.0f}" if rows else ""
            print(
                f"| {title} | {found['seconds']:.0f} | {found['cpu']:.0f} | {rate} | {found['peak'] / 2**20:,.0f} |",
                flush=True,
            )

        for num_proc in (1, 2):
            show(f"num_proc {num_proc}", run(folder, f"out{num_proc}", num_proc), args.rows)
        shards = -(-args.rows // 8192)
        show("num_proc 2, killed half-way", run(folder, "resumed", 2, max(1, shards // 2)), None)
        show("the same command again", run(folder, "resumed", 2), None)
        counts = json.loads((folder / "out1" / "counts.json").read_text())
        print(json.dumps({key: counts[key] for key in counts if key not in ("settings", "tokenizer")}))
        del rejected[None]
        data = load_from_disk(folder / "out1")
        holds = {
            f"peak under {BOUND / 2**30:.0f} GiB": max(found["peak"] for found in runs.values()) < BOUND,
            "the same files from 1 and 2 processes": contents(folder / "out1") == contents(folder / "out2"),
            "the same files after a kill": contents(folder / "out1") == contents(folder / "resumed"),
            "every row read": counts["rows_read"] == args.rows,
            "rejected as written": counts["rejected"] == dict(rejected),
            "rows add up": args.rows
            == len(data) + sum(counts["rejected"].values()) + sum(counts["filtered"].values()),
            "kept rows are distinct": len(set(data["id"])) == len(data) == counts["rows_kept"],
        }
    for check, well in holds.items():
        print(f"{'ok    ' if well else 'FAILED'} {check}")
    return int(not all(holds.values()))


if __name__ == "__main__":
    sys.exit(main())
