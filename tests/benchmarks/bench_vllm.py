"""
Trace sampling by vLLM on GPUs: what the constraint and the seeds cost, rows a second, and whether a run resumes alike.

    python tests/benchmarks/bench_vllm.py cost speed              # one card, 4 minutes; `make bench-vllm`
    python tests/benchmarks/bench_vllm.py cost --runner v1        # vLLM's older model runner
    python tests/benchmarks/bench_vllm.py resume                  # which settings give the same draws again
    python tests/benchmarks/bench_vllm.py speed --tensor_parallel_size 2
    python tests/benchmarks/bench_vllm.py parallel                # two cards, an engine each

The models have Qwen3-4B's shape (`resume`: Qwen3-0.6B's) and random weights; they are made once, in --models.

cost      one engine, the same prompts and number of tokens, one sampling parameter more at each step
speed     `VLLMTraceSampler.sample` after prompts of 200 tokens, and after prompts and CoTs of 5,700
resume    512 rows sampled whole, again, from the 200th on in other batches, and as a part: traces that differ
parallel  `speed` by two engines at once, and by one of them alone

Figures go to `results/sampling.json` (or --output), each as soon as it is known.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from figures import RESULTS, record
from sampled import SHAPES, make_model, random_prompts, say

from abscot_trl.traces.vllm import VLLMTraceSampler, row_seed, trace_parameters

TEMPERATURE = 0.7
# Of section `cost`: what is asked for beside temperature and number of tokens; one thing more at each step.
STEPS = {
    "plain": (),
    "constraint": ("constraint",),
    "seeds": ("constraint", "seeds"),
    "log-probabilities": ("constraint", "seeds", "logprobs"),
    "log-probabilities in dictionaries": ("constraint", "seeds", "logprobs", "dictionaries"),
}
COSTS = {  # name: before, after
    "vllm-constraint-cost-percent": ("plain", "constraint"),
    "vllm-seed-cost-percent": ("constraint", "seeds"),
    "vllm-logprobs-cost-percent": ("seeds", "log-probabilities"),
    "vllm-dictionaries-cost-percent": ("log-probabilities", "log-probabilities in dictionaries"),
    "vllm-all-cost-percent": ("plain", "log-probabilities"),
}
OLDER = {"v2": "", "v1": " (older model runner)"}  # ends a figure's name
# Of section `resume`: name, environment, engine arguments. The second two show whether processes differ.
HERE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # as `VLLMTraceSampler` has it
RESUMED = [
    ("scheduled in another process", {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, {}),
    ("scheduled in this process", HERE, {}),
    ("scheduled in this process, once more", HERE, {}),
    ("batch-invariant kernels", HERE | {"VLLM_BATCH_INVARIANT": "1"}, {"attention_backend": "FLASH_ATTN"}),
]


def last_json(text: str) -> dict:
    """What a process of ours printed last, among vLLM's own lines."""
    return json.loads([line for line in text.splitlines() if line.startswith("{")][-1])


def requests(sampler: VLLMTraceSampler, n: int, tokens: int, asked: tuple[str, ...]) -> list[dict]:
    """Sampling parameters of `n` requests; each generates `tokens` tokens, whatever it draws."""
    made = []
    for row in range(n):
        if "constraint" in asked:  # m_min = m_max leaves no end delimiter
            made.append(trace_parameters(sampler.codebook, sampler.end, tokens, tokens, TEMPERATURE))
        else:
            made.append({"temperature": TEMPERATURE, "max_tokens": tokens, "ignore_eos": True})
        made[-1] |= {"logprobs": 0 if "logprobs" in asked else None, "flat_logprobs": "dictionaries" not in asked}
        made[-1]["seed"] = row_seed(0, row) if "seeds" in asked else None
    return made


def generate(sampler: VLLMTraceSampler, prompts: list[list[int]], fields: list[dict], tokens: int) -> float:
    """Seconds of one call of `LLM.generate`, which generates as many tokens as were asked for."""
    from vllm import SamplingParams

    sampler.llm.reset_prefix_cache()
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    wanted = [SamplingParams(**each, detokenize=False) for each in fields]
    start = time.perf_counter()
    outputs = sampler.llm.generate(given, wanted, use_tqdm=False)
    seconds = time.perf_counter() - start
    assert {len(output.outputs[0].token_ids) for output in outputs} == {tokens}
    return seconds


def cost(sampler: VLLMTraceSampler, args: argparse.Namespace) -> list[dict]:
    """The steps in turn, in another order each time; costs are paired within a repeat, in percent more time."""
    tokens, n = args.cost_tokens, args.requests
    prompts = random_prompts(sampler.model_path, [16] * n)
    work = {name: requests(sampler, n, tokens, asked) for name, asked in STEPS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    for repeat in range(-1, args.repeats):  # the first warms up
        turn = repeat % len(STEPS)
        for name in [*STEPS][turn:] + [*STEPS][:turn]:
            seconds[name].append(generate(sampler, prompts, work[name], tokens))
        say(f"cost, repeat {repeat}:", *(f"{name} {found[-1]:.3f} s," for name, found in seconds.items()))
    rows = []
    for name, (before, after) in COSTS.items():
        pairs = [100 * (b / a - 1) for a, b in zip(seconds[before][1:], seconds[after][1:], strict=True)]
        rows.append({"name": name + OLDER[args.runner], "value": round(median(pairs), 2), "unit": "% more time"})
        rows[-1] |= {"runs": len(pairs), "low": round(min(pairs), 2), "high": round(max(pairs), 2)}
        rows[-1] |= {"baseline": f"{n} requests of 16 + {tokens} tokens, '{before}', in the same engine, in turn"}
        rows[-1] |= {"tokens_per_second": round(n * tokens / median(seconds[after][1:])), "shape": args.shape}
        say(rows[-1])
    return rows


def rate(sampler: VLLMTraceSampler, prompts: list[list[int]], **limits) -> dict:
    sampler.llm.reset_prefix_cache()
    start = time.perf_counter()
    traces = sampler.sample(prompts, temperature=TEMPERATURE, seed=0, **limits)
    seconds = time.perf_counter() - start
    lengths = [len(trace.token_ids) for trace in traces]
    return {"rows_per_second": len(traces) / seconds, "trace_tokens": sum(lengths) / len(lengths)}


def speed(sampler: VLLMTraceSampler, args: argparse.Namespace) -> list[dict]:
    """Rows a second: traces of 13 tokens as the earlier run's, then as the method draws them."""
    rows, limits = [], {"m_max": args.trace_tokens, "m_min": args.trace_tokens}
    cards = args.tensor_parallel_size
    for title, n, length, earlier in (("prompt", args.rows, 200, 294), ("cot", args.cot_rows, 5700, 5.6)):
        length = min(length, args.max_model_len - 200)
        rate(sampler, random_prompts(sampler.model_path, [length] * 4, seed=9), **limits)
        for name, wanted, repeats in (("", limits, args.speed_repeats), (", drawn", {"m_max": 128, "m_min": 16}, 1)):
            found = []
            for repeat in range(repeats):
                prompts = random_prompts(sampler.model_path, [length] * n, seed=repeat)
                found.append(rate(sampler, prompts, **wanted))
            row = {"name": f"vllm-traces-per-second-{title}{name}" + (f" (tp {cards})" if cards > 1 else "")}
            row["name"] += OLDER[args.runner]
            row |= {"value": round(median(each["rows_per_second"] for each in found), 2), "unit": "rows/s"}
            row |= {"baseline": f"the earlier run: {earlier} rows/s on two A100s", "runs": repeats, "rows": n}
            row |= {"trace_tokens": round(found[0]["trace_tokens"], 1), "prefix_tokens": length, "shape": args.shape}
            rows.append(row | {"runner": args.runner})
            say(rows[-1])
    return rows


def again(sampler: VLLMTraceSampler, n: int, first: int) -> dict:
    """
    How many traces of `n` rows differ from those of one call with all rows: when all are sampled again, or in other
    batches from row `first` on. And of the rows from `first` on in a call of their own, which is what a resumed run
    does with a part: how many differ, after the rows before them without and with an emptied prefix cache, from an
    engine that begins there.
    """
    rng = random.Random(1)
    start = random_prompts(sampler.model_path, [40])[0]  # a chat template's
    prompts = random_prompts(sampler.model_path, [rng.randint(20, 300) for _ in range(n)], seed=1)

    def sample(rows: range, empty: bool = True) -> list[list[int]]:
        if empty:
            sampler.llm.reset_prefix_cache()
        traces = sampler.sample([start + prompts[i] for i in rows], 32, 4, TEMPERATURE, seed=0, rows=rows)
        return [trace.token_ids for trace in traces]

    def differ(some: list, others: list) -> int:
        return sum(a != b for a, b in zip(some, others, strict=True))

    whole = sample(range(n))
    found = {"whole again": differ(sample(range(n)), whole)}
    part = sample(range(first, n))
    found["in a part of their own"] = differ(part, whole[first:])
    for size in (64, 7):
        traces = [trace for i in range(first, n, size) for trace in sample(range(i, min(i + size, n)))]
        found[f"in {size}s"] = differ(traces, whole[first:])
    for name, empty in (("part resumed, cache kept", False), ("part resumed", True)):
        sample(range(first))
        found[name] = differ(sample(range(first, n), empty), part)
    digest = hashlib.sha256(json.dumps([whole, part]).encode()).hexdigest()[:12]
    return found | {"rows": n - first, "distinct": len({tuple(trace) for trace in whole}), "digest": digest}


def resume(args: argparse.Namespace) -> list[dict]:
    """Each setting in a process of its own, side by side on the card; nothing is timed."""
    model = args.model or make_model(args.models / args.small, args.small)
    base = {"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 10 * 2**30}  # none measures what the others leave
    base |= {"enforce_eager": True, "max_model_len": 1024}
    base |= args.engine
    running, rows, end = [], [], time.monotonic() + args.patience
    try:
        for name, environment, engine in RESUMED:
            command = [sys.executable, __file__, "again", "--model", model, "--resume_rows", str(args.resume_rows)]
            command += ["--engine", json.dumps(base | engine)]
            process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
            running.append((name, environment | base | engine, process))
        for name, settings, process in running:
            try:
                said = process.communicate(timeout=max(1, end - time.monotonic()))[0]
                found = last_json(said) if process.returncode == 0 else {"failed": process.returncode}
            except subprocess.TimeoutExpired:
                found = {"failed": "timeout"}
            row = {"name": f"vllm resumed, {name}", "value": found.get("part resumed"), "unit": "traces that differ"}
            rows.append(
                row
                | {"baseline": "the same part in an engine that has not been stopped", "settings": settings}
                | found
            )
            say(rows[-1])
    finally:
        for _, _, process in running:
            process.terminate()  # vLLM's own processes go with it
    return rows


def shared(args: argparse.Namespace) -> None:
    """One of the two engines of `parallel`: the first samples alone, then both at once."""
    folder, number = Path(args.folder), int(os.environ["NUMBER"])
    sampler = build(args)

    def wait_for(name: str) -> None:
        while not (folder / name).exists():
            time.sleep(0.005)

    limits = {"m_max": args.trace_tokens, "m_min": args.trace_tokens}
    sizes, found = {"prompt": (args.rows, 200), "cot": (args.cot_rows, min(5700, args.max_model_len - 200))}, {}
    for title, (n, length) in sizes.items():
        rate(sampler, random_prompts(sampler.model_path, [length] * 4, seed=9), **limits)
        prompts = random_prompts(sampler.model_path, [length] * n, seed=number)
        (folder / f"{title}{number}").touch()
        wait_for(f"{title}{1 - number}")
        if number == 0:
            found[title] = [rate(sampler, prompts, **limits)["rows_per_second"]]
            (folder / f"{title}-go").touch()
        wait_for(f"{title}-go")
        found.setdefault(title, []).append(rate(sampler, prompts, **limits)["rows_per_second"])
    print(json.dumps({"runner": args.runner} | found), flush=True)


def parallel(args: argparse.Namespace) -> list[dict]:
    """Two engines, a card each. Both sample as many rows, so the slower one's rate counts twice."""
    make_model(args.models / args.shape, args.shape)
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1").split(",")
    with tempfile.TemporaryDirectory() as folder:
        options = [word for word in sys.argv[1:] if word not in args.sections]
        command = [sys.executable, __file__, "shared", *options, "--folder", folder]
        children = [
            subprocess.Popen(
                command,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": visible[i % len(visible)], "NUMBER": str(i)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for i in range(2)
        ]
        try:
            said = [child.communicate(timeout=args.patience)[0] for child in children]
        finally:
            for child in children:
                child.kill()
    first, second = map(last_json, said)
    rows, runner = [], first.pop("runner")
    for title, (alone, beside) in first.items():
        both = 2 * min(beside, second[title][0])
        row = {"name": f"vllm-traces-per-second-{title} (dp 2)", "value": round(both, 2), "unit": "rows/s"}
        row |= {"baseline": f"{alone:.2f} rows/s by one of the engines alone", "scaling": round(both / alone, 3)}
        rows.append(row | {"trace_tokens": args.trace_tokens, "shape": args.shape, "runner": runner})
        say(rows[-1])
    return rows


def build(args: argparse.Namespace) -> VLLMTraceSampler:
    model = args.model or make_model(args.models / args.shape, args.shape)
    engine = {"dtype": "bfloat16", "max_model_len": args.max_model_len, "gpu_memory_utilization": 0.85}
    start = time.monotonic()
    sampler = VLLMTraceSampler(model, **engine | {"tensor_parallel_size": args.tensor_parallel_size} | args.engine)
    runner = "v2" if getattr(sampler.llm.llm_engine.vllm_config, "use_v2_model_runner", False) else "v1"
    say(
        f"engine up in {time.monotonic() - start:.0f} s, model runner {runner}, cache of {sampler.cache_tokens} tokens"
    )
    args.runner = runner
    return sampler


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="+", choices=["cost", "speed", "resume", "parallel", "again", "shared"])
    parser.add_argument("--runner", choices=["v1", "v2"], help="vLLM's model runner; its own choice when left out")
    parser.add_argument("--shape", default="4b", choices=[*SHAPES])
    parser.add_argument("--small", default="0.6b", choices=[*SHAPES], help="shape of section resume")
    parser.add_argument("--model", help="an extended checkpoint instead")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "bench-models")
    parser.add_argument("--engine", type=json.loads, default={}, help="further arguments of vllm.LLM, as JSON")
    parser.add_argument("--tensor_parallel_size", type=int, default=1)
    parser.add_argument("--max_model_len", type=int, default=8192)
    parser.add_argument("--requests", type=int, default=256, help="of section cost, all at once")
    parser.add_argument("--cost_tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9, help="of section cost")
    parser.add_argument("--speed_repeats", type=int, default=3)
    parser.add_argument("--trace_tokens", type=int, default=13, help="of each trace in section speed")
    parser.add_argument("--rows", type=int, default=2048, help="prompts of 200 tokens")
    parser.add_argument("--cot_rows", type=int, default=64, help="prompts with CoTs, 5,700 tokens")
    parser.add_argument("--resume_rows", type=int, default=512)
    parser.add_argument("--patience", type=int, default=240, help="seconds for each process of resume and parallel")
    parser.add_argument("--output", type=Path, default=RESULTS / "sampling.json")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args, sampler = parse(), None
    if args.runner:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(args.runner == "v2"))  # before vllm is imported
    for section in args.sections:
        say(f"== {section}")
        if section == "shared":
            shared(args)
        elif section == "again":
            sampler = sampler or build(args)
            print(json.dumps(again(sampler, args.resume_rows, args.resume_rows * 200 // 512)), flush=True)
        else:
            if section in ("cost", "speed"):
                sampler = sampler or build(args)
            apart = {"resume": resume, "parallel": parallel}
            rows = apart[section](args) if section in apart else {"cost": cost, "speed": speed}[section](sampler, args)
            asked = [word for word in sys.argv if word not in ("--output", str(args.output))]
            record(args.output, rows, " ".join(["python", *asked]))


if __name__ == "__main__":
    main()
