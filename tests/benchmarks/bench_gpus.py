"""
Several GPUs of one machine: every launcher trains alike, a killed phase ends in the same files, and how it scales.

    python tests/benchmarks/bench_gpus.py agree kill scale --base FOLDER --rows FILE.jsonl     # 2 or 4 GPUs, 6 minutes

`--base` holds a small model (SmolLM2-135M), random weights of that shape where there are none; `--rows` problems with
`prompt`, `cot` and `answer` (GSM8K). Phases run by `accelerate launch` on pairs of GPUs, two at a time where there are
four.

agree  phase A by each accelerate configuration: losses, learning rates and first gauges beside one GPU's
kill   DDP (LoRA) and ZeRO-3 (full): killed after the first checkpoint and given again, against a run left alone
scale  tokens/s by 1, 2 and 4 GPUs: SmolLM2-135M under DDP, Qwen3-1.7B's shape under ZeRO-3; Qwen3-4B's on two
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import yaml
from bench_plan import compare
from figures import RESULTS, card, record, versions
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
RECIPE = {
    "attn_implementation": "flex_attention",
    "max_length": 2048,
    "packing": True,
    "per_device_train_batch_size": 2,
    "global_batch_size": 8,
    "max_steps": 8,
    "learning_rate": 1.0e-4,
    "warmup_steps": 2,
    "lr_scheduler_type": "cosine",
    "bf16": True,
    "logging_steps": 1,
    "gradient_checkpointing": True,
    "gauge_steps": 1,
    "disable_tqdm": True,
}
FULL = RECIPE | {"dtype": "float32", "save_strategy": "no"}
LORA = RECIPE | {"dtype": "bfloat16", "save_strategy": "no", "use_peft": True, "lora_r": 16, "lora_dropout": 0.0}
LORA |= {"lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
# Name: configuration, processes, recipe. The first two are what the others are compared with.
AGREE = {
    "single, full": ("single", 1, FULL),
    "single, LoRA": ("single", 1, LORA),
    "ddp, LoRA": ("ddp", 2, LORA),
    "zero3, full": ("zero3", 2, FULL),
    "zero2, LoRA": ("zero2", 2, LORA),
    "fsdp2, full": ("fsdp2", 2, FULL),
    "zero3_offload, full": ("zero3_offload", 2, FULL),
    "ddp, full, compiled": ("ddp", 2, FULL | {"compile_layers": True}),
    "fsdp2, full, compiled": ("fsdp2", 2, FULL | {"compile_layers": True}),
}


def abscot(*arguments) -> None:
    subprocess.run([sys.executable, "-m", "abscot_trl.cli", *map(str, arguments)], check=True, cwd=ROOT)


def prepare(base: Path, rows: Path, work: Path) -> dict[str, str]:
    """The inputs of phase A, made once in `work`: extended model, prepared rows, uniform traces."""
    made = {"model_name_or_path": str(work / "init"), "data": str(work / "data"), "traces": str(work / "t")}
    if (work / "t").is_dir():
        return made
    if not any(base.glob("*.safetensors")):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base), dtype=torch.float32)
        model.save_pretrained(work / "base")
        for file in base.glob("*token*"), base.glob("*.jinja"):
            for one in file:
                (work / "base" / one.name).write_bytes(one.read_bytes())
        base = work / "base"
    abscot("init", "--base_model", base, "--output_dir", work / "init")
    data = ["--data_format", "problems", "--tokenizer", work / "init", "--output_dir", work / "data"]
    abscot("data", "--data", rows, *data, "--max_total_tokens", 1800)
    abscot(
        "traces", "--model", work / "init", "--data", work / "data", "--method", "uniform", "--output_dir", work / "t"
    )
    return made


def launch(script: list[str], config: str, gpus: list[int], log: Path) -> subprocess.Popen:
    """`script` by `accelerate launch`, one process a GPU, in a process group of its own."""
    file = ROOT / "accelerate_configs" / f"{config}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    command += ["--num_processes", str(len(gpus)), "--main_process_port", str(29500 + gpus[0]), *script]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), "NCCL_NVLS_ENABLE": "0"}
    with open(log, "a") as out:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True)


def phase(recipe: dict, inputs: dict, config: str, gpus: list[int], output: Path, *more) -> subprocess.Popen:
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe | inputs | {"output_dir": str(output)}))
    script = ["-m", "abscot_trl.scripts.bottleneck", "--config", str(file), *more]
    return launch(script, config, gpus, output.with_suffix(".log"))


def wait(process: subprocess.Popen, seconds: float) -> bool:
    """Whether it ended well in time; what has not ended is killed with all it started."""
    try:
        return process.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return False


def last_words(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line or "abscot " in line]
    return (lines or ["no word"])[-1][:300]


def steps(output: Path) -> list[dict]:
    return json.loads((output / "training_log.json").read_text())["log"]


def agree(args: argparse.Namespace, work: Path, inputs: dict) -> Iterator[dict]:
    logs = {}
    todo = [(name, one) for name, one in AGREE.items() if "single" in name or not args.names or name in args.names]
    pairs = [args.gpus[i : i + 2] for i in range(0, len(args.gpus) - 1, 2)]
    while todo:
        slots = [[gpu] for gpu in args.gpus] if todo[0][1][1] == 1 else pairs
        wave = [one for one in todo[: len(slots)] if one[1][1] == len(slots[0])]
        todo = todo[len(wave) :]
        running = {}
        for gpus, (name, (config, _, recipe)) in zip(slots, wave, strict=False):
            output = work / name.replace(", ", "-")
            running[name] = output, phase(recipe, inputs, config, gpus, output)
        for name, (output, process) in running.items():
            if not wait(process, args.patience):
                print(f"{name}: FAILED: {last_words(output.with_suffix('.log'))}", flush=True)
                continue
            logs[name] = steps(output)
            one = logs["single, LoRA" if "LoRA" in name else "single, full"]
            difference = [abs(a["loss"] - b["loss"]) for a, b in zip(logs[name], one, strict=True)]
            rates = max(abs(a["learning_rate"] - b["learning_rate"]) for a, b in zip(logs[name], one, strict=True))
            losses = [round(entry["loss"], 4) for entry in logs[name]]
            read = [key for key in one[0] if key.startswith(("useful", "predictable"))]  # none of under 3200 rows
            gauges = max((abs(logs[name][0][key] - one[0][key]) for key in read), default=None)
            found = f"first differs {difference[0]:.1e}, rates {rates:.1e}, gauges {gauges}"
            print(f"{name}: losses {losses}, {found}", flush=True)
            if "single" not in name:
                row = {"name": f"agree: {name}", "value": difference[0], "unit": "nats, first loss", "losses": losses}
                row |= {"largest": max(difference), "rates_differ": rates, "gauges_differ": gauges}
                yield row | {"baseline": "one GPU"}


def files(output: Path) -> dict[str, str]:
    """Digests of what a phase leaves. peft writes sets in the order of their hashes, another one in each process."""
    kept = [file for file in output.iterdir() if file.suffix in (".safetensors", ".json") and file.is_file()]
    made = {file.name: file.read_bytes() for file in kept}
    if "adapter_config.json" in made:
        config = json.loads(made["adapter_config.json"])
        made["adapter_config.json"] = str(config | {"target_modules": sorted(config["target_modules"])}).encode()
    return {name: hashlib.sha256(content).hexdigest() for name, content in made.items()}


def kill(args: argparse.Namespace, work: Path, inputs: dict) -> Iterator[dict]:
    saving = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 2}
    for name in (name for name in ("ddp, LoRA", "zero3, full") if not args.names or name in args.names):
        config, processes, recipe = AGREE[name]
        here, there = args.gpus[:2], args.gpus[2:4] or args.gpus[:2]
        whole, killed = (work / f"{name.replace(', ', '-')}-{which}" for which in ("whole", "killed"))
        process = phase(recipe | saving, inputs, config, here, whole)
        if here == there:
            wait(process, args.patience)
        doomed, end = phase(recipe | saving, inputs, config, there, killed), time.monotonic() + args.patience
        while not (killed / "checkpoint-4" / "sealed.json").is_file() and time.monotonic() < end:
            time.sleep(0.05)
        os.killpg(doomed.pid, signal.SIGKILL)
        doomed.wait()
        wait(process, args.patience)
        sealed = [path.parent.name for path in killed.glob("*/sealed.json")]
        time.sleep(1)
        again = phase(recipe | saving, inputs, config, there, killed, "--resume_from_checkpoint", "true")
        if not wait(again, args.patience) or not (whole / "training_log.json").is_file():
            print(f"{name}, killed: FAILED: {last_words(killed.with_suffix('.log'))}", flush=True)
            continue
        one, other = files(whole), files(killed)
        differ = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
        largest = max(abs(a["loss"] - b["loss"]) for a, b in zip(steps(whole), steps(killed), strict=True))
        print(f"{name}, killed at {sealed}: files that differ {differ}, losses by {largest:.1e}", flush=True)
        row = {"name": f"kill: {name}", "value": len(differ), "unit": "files that differ", "files": differ}
        yield row | {"loss_differs": largest, "sealed": sealed, "baseline": "a run left alone"}


def timed(case: str, config: str, gpus: list[int], work: Path, patience: float) -> tuple[subprocess.Popen, Path]:
    output = work / f"{case}-{config}-{len(gpus)}.json"
    script = [str(ROOT / "tests/benchmarks/bench_train.py"), "--child", case, "--output", str(output)]
    return launch(script, config, gpus, output.with_suffix(".log")), output


def scale(args: argparse.Namespace, work: Path, inputs: dict) -> Iterator[dict]:
    found = {}
    if args.output.is_file():  # one GPU's figure of an earlier call: the same card and versions
        there = [row for row in json.loads(args.output.read_text()) if row["name"].endswith(" 1") and "step_s" in row]
        there = [row for row in there if (row["card"], row["versions"]) == (card(), versions())]
        names = [row["name"].removeprefix("scale: ").split(",")[0] for row in there]
        found = {(name, 1): {"tokens_per_s": row["value"]} for name, row in zip(names, there, strict=True)}
    waves = [
        [("smol-packed", "ddp", 1), ("full-1.7b", "zero3", 1)],
        [("smol-packed", "ddp", 2), ("full-1.7b", "zero3", 2)],
        [("smol-packed", "ddp", 4)],
        [("full-1.7b", "zero3", 4)],
        [("full-4b-zero3", "zero3", 2)],
    ]
    cases = args.cases or {case for wave in waves for case, *_ in wave}
    for wave in ([one for one in wave if one[2] in args.counts and one[0] in cases] for wave in waves):
        free, running = list(args.gpus), []
        for case, config, count in wave:
            if len(free) < count:
                for left in running:
                    wait(left[0], args.patience)
                free = list(args.gpus)
            if len(free) >= count:
                taken, free = free[:count], free[count:]
                running.append((*timed(case, config, taken, work, args.patience), case, config, count))
        for process, output, case, config, count in running:
            if not wait(process, args.patience) or not output.is_file():
                print(f"{case} by {config}, {count}: FAILED: {last_words(output.with_suffix('.log'))}", flush=True)
                continue
            result = found[case, count] = json.loads(output.read_text())
            shown = {key: round(v, 3) if isinstance(v, float) else v for key, v in result.items()}
            print(f"{case} by {config}, {count}: {shown}", flush=True)
            row = {"name": f"scale: {case}, {config} {count}", "value": round(result["tokens_per_s"], 1)}
            row |= {"unit": "tokens/s", "step_s": result["step_s"], "peak_gib": result["peak_gib"], "baseline": None}
            yield row
            if count > 1:
                yield compare(case, result, 3 if config == "zero3" else 0, count)
            if count > 1 and (case, 1) in found:
                share = result["tokens_per_s"] / (count * found[case, 1]["tokens_per_s"])
                name = f"{config}-{count}-gpu-scaling"
                row = {"name": name, "value": round(share, 3), "unit": f"of {count} times one GPU's tokens/s"}
                yield row | {"case": case, "baseline": f"the same on one GPU, {config}"}


SECTIONS = {"agree": agree, "kill": kill, "scale": scale}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="+", choices=["prepare", *SECTIONS])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="kept for another call; without it nothing stays")
    parser.add_argument("--gpus", type=int, nargs="+", default=list(range(torch.cuda.device_count())))
    parser.add_argument("--patience", type=float, default=120, help="seconds for one phase")
    parser.add_argument("--names", nargs="+", choices=[*AGREE], help="of agree and kill; all when left out")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4], help="of section scale: GPUs of a run")
    parser.add_argument("--cases", nargs="+", help="of section scale; all when left out")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpus.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        inputs = prepare(args.base, args.rows, work) if set(args.sections) != {"scale"} else {}
        for section in args.sections:
            if section != "prepare":
                for row in SECTIONS[section](args, work, inputs):
                    record(args.output, [row], "make bench-gpus")
    return 0


if __name__ == "__main__":
    sys.exit(main())
