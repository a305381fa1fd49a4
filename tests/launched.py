"""
Training by several processes on CPU over gloo: how they are launched and, as their script, what each of them does.

    accelerate launch .. tests/launched.py train '[CHECKPOINT, FOLDER, FIELDS, LORA]' together '[..]'
"""

import atexit
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from trainers import LAST, build, lora, phase, rows, run, settings, weights

from abscot_trl.cli import leave_group
from abscot_trl.errors import Refused
from abscot_trl.training.bottleneck import BottleneckSFTTrainer
from abscot_trl.training.configs import BottleneckConfig

ROOT = Path(__file__).resolve().parents[1]


def accelerate(name: str, processes: int = 2) -> list[str]:
    """`accelerate launch` with a configuration of the repository; what is overridden is what a CPU cannot."""
    config = str(ROOT / "accelerate_configs" / f"{name}.yaml")
    overridden = ["--num_processes", str(processes), "--mixed_precision", "no", "--main_process_port", "0"]
    return ["accelerate.commands.launch", "--config_file", config, *overridden]


def launch(launcher: list[str], *jobs: tuple) -> None:
    """Run jobs, each a name and its arguments, in the launcher's processes, which take 15 s to start."""
    given = [part for name, *args in jobs for part in (name, json.dumps(args, default=str))]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, __file__, *given],
        capture_output=True,
        text=True,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def trained(folder: Path) -> dict:
    """What the first process of a job `train` found, and the weights that it saved."""
    weights = next((folder / "model").glob("*model.safetensors"))
    return json.loads((folder / "found.json").read_text()) | {"weights": load_file(weights)}


def train(checkpoint: str, folder: str, fields: dict, with_lora: bool = False) -> None:
    """A bottleneck phase, of as many `rows` as `fields` may name, or the baseline that it names."""
    if "baseline" in fields:
        trainer = build(checkpoint, folder, **fields)
        trainer.train()
    else:
        fields = dict(fields)
        data = rows(checkpoint, fields.pop("rows", 16))
        trainer = run(checkpoint, folder, data=data, peft_config=lora(checkpoint) if with_lora else None, **fields)
    trainer.save_model(folder + "/model")
    if trainer.is_world_process_zero():
        found = {
            "processes": trainer.accelerator.num_processes,
            "kind": trainer.accelerator.distributed_type.value,
            "rate_at_end": trainer.lr_scheduler.get_last_lr(),
            "log": trainer.state.log_history[: trainer.state.global_step],
        }
        Path(folder, "found.json").write_text(json.dumps(found))


def rollouts(checkpoint: str, folder: str, fields: dict, with_lora: bool = False) -> None:
    """GRPO, and its log."""
    import grpo_runs

    trainer = grpo_runs.grpo(checkpoint, folder, peft_config=lora(checkpoint) if with_lora else None, **fields)
    if trainer.is_world_process_zero():
        log = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
        found = {"log": log, "processes": trainer.accelerator.num_processes}
        Path(folder, "found.json").write_text(json.dumps(found))


def resumed_rollouts(checkpoint: str, folder: str) -> None:
    """GRPO from a checkpoint within its second epoch: whether its log is the whole run's."""
    import grpo_runs

    fields = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    fields |= {"rows": grpo_runs.data(8), "learning_rate": 1e-3}  # 4 steps an epoch
    whole = grpo_runs.grpo(checkpoint, folder, **fields)
    again = grpo_runs.grpo(checkpoint, folder, train=False, **fields)
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-6")
    kept = ("loss", "kl", "rollouts", "codebook_counts", "probe/own", "step")
    logs = [[{k: e.get(k) for k in kept} for e in t.state.log_history] for t in (whole, again)]
    prompts = [entry["rollouts"][0]["prompt"] for entry in whole.state.log_history if "rollouts" in entry]
    if whole.is_world_process_zero():  # whose log is kept
        Path(folder, "found.json").write_text(json.dumps({"same": logs[0] == logs[1], "prompts": prompts}))


def refusal(call, *args, **fields) -> str | None:
    try:
        call(*args, **fields)
    except Refused as error:
        return str(error)


def command(*arguments: str) -> None:
    """`python -m abscot_trl.scripts.bottleneck` with these arguments."""
    with patch.dict(os.environ), patch.object(sys, "argv", [sys.argv[0], *arguments]):
        runpy.run_module("abscot_trl.scripts.bottleneck", run_name="__main__", alter_sys=True)


def refused(folder: str, arguments: list[str], environment: dict[str, str] | None = None) -> None:
    """What the command with these arguments says, in such an environment; each process writes it."""
    try:
        with patch.dict(os.environ, environment or {}):
            command(*arguments)
        said = "nothing"
    except SystemExit as end:
        said = end.code
    Path(folder, f"said{os.environ['RANK']}.txt").write_text(str(said))


def together(checkpoint: str, folder: str, inputs: dict) -> None:
    """What processes must refuse, stop and resume as one; each writes what it saw."""
    folder = Path(folder)

    def log(trainer) -> list[dict]:
        return [entry for entry in trainer.state.log_history if "train_runtime" not in entry]

    found = {"foreign": refusal(phase, checkpoint, inputs, folder / "foreign")}
    fields = {"per_device_train_batch_size": 2, "max_steps": 10, "learning_rate": 1.0e30}
    found["loss"] = refusal(run, checkpoint, folder / "loss", **fields)
    fields |= {"save_strategy": "steps", "save_steps": 1}
    found["weights"] = refusal(phase, checkpoint, inputs, folder / "weights", **fields)
    fields = LAST | {"per_device_train_batch_size": 2}
    whole = run(checkpoint, folder / "whole", **fields)
    found["processes"], found["same"] = whole.accelerator.num_processes, []
    for step in (6, 7):
        config = BottleneckConfig(**settings(folder / "whole", **fields))
        again = BottleneckSFTTrainer(checkpoint, config, rows(checkpoint))
        again.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{step}"))
        equal = all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))
        found["same"].append(equal and log(again) == log(whole) and again.state.global_step == 7)
    (folder / f"found{whole.args.process_index}.json").write_text(json.dumps(found))


def one_card(checkpoint: str, folder: str, found: str) -> None:
    """A step on the GPU, and where everything was afterwards."""
    trainer = run(checkpoint, folder, use_cpu=False)
    there = torch.cuda.device_count()
    report = {
        "devices": sorted({str(parameter.device) for parameter in trainer.model.parameters()}),
        "n_gpu": trainer.args.n_gpu,
        "model_parallel": trainer.is_model_parallel,
        "visible": there,
        "elsewhere": sum(torch.cuda.max_memory_allocated(i) for i in range(1, there)),
        "card": str(torch.cuda.get_device_properties(0).uuid),
    }
    print(report)
    Path(found).write_text(json.dumps(report))


def left() -> None:
    """Fails this process if it is still in its group."""
    if torch.distributed.is_initialized():
        os._exit(9)


if __name__ == "__main__":
    atexit.register(left)  # first, and so the last to run
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        # For inference on CPU: training never calls it, and compiling it takes both cores for over a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    known = (train, rollouts, resumed_rollouts, together, command, refused, one_card)
    jobs = {job.__name__: job for job in known}
    for name, args in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        jobs[name](*json.loads(args))
    if "command" not in sys.argv[1::2]:  # which leaves the group by itself
        leave_group()
