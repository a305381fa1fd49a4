"""
`abscot grpo` killed (SIGKILL) at random moments and started again with the same command, until it ends: its log and
its weights must be those of a run that was not killed.

    python tests/kill_grpo.py FOLDER 10         # so many kills
"""

import json
import random
import sys
import time
from multiprocessing import Process
from pathlib import Path

import yaml
from forked import abscot
from tiny import make_checkpoint

from abscot_trl.data.toy import chain_arithmetic, write_problems
from abscot_trl.training.resume import LOG_FILE, sealed_checkpoints

CLOCK = ("step_time", "epoch", "time/")
RECIPE = {
    "dtype": "float32",
    "num_generations": 4,
    "num_iterations": 2,
    "max_completion_length": 16,
    "instruction": False,
    "rewards": ["accuracy", "trace_length"],
    "per_device_train_batch_size": 8,
    "learning_rate": 1.0e-3,
    "lr_scheduler_type": "cosine",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "disable_tqdm": True,
    "probe_rows": 4,
    "probe_steps": 6,
    "resume_from_checkpoint": True,
}


def start(folder: Path, name: str) -> Process:
    words = ["grpo", "--config", folder / "grpo.yaml", "--model_name_or_path", folder / "model"]
    return abscot([*words, "--output_dir", folder / name], folder / f"{name}.txt")


def end(folder: Path, name: str) -> None:
    process = start(folder, name)
    process.join()
    assert process.exitcode == 0, (folder / f"{name}.txt").read_text()[-2000:]


def last_step(folder: Path) -> int:
    return max((int(path.name.rpartition("-")[2]) for path in sealed_checkpoints(folder)), default=0)


def ended(folder: Path) -> tuple[list[dict], bytes]:
    log = json.loads((folder / LOG_FILE).read_text())["log"]
    log = [{key: value for key, value in entry.items() if not key.startswith(CLOCK)} for entry in log]
    return log, (folder / "model.safetensors").read_bytes()


def main(folder: Path, kills: int, seed: int = 0) -> int:
    """
    Returns:
        How many kills met a run at work.

    Raises:
        AssertionError: it ends in another log or other weights, or in an error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    make_checkpoint(folder / "model")
    prompts = write_problems(folder / "prompts.jsonl", chain_arithmetic(24, 3, 5, seed=1))
    (folder / "grpo.yaml").write_text(yaml.safe_dump(RECIPE | {"prompts": [prompts], "max_steps": 8 * kills + 8}))
    end(folder, "whole")
    rng, met = random.Random(seed), 0
    for _ in range(kills):
        process = start(folder, "killed")
        target = last_step(folder / "killed") + rng.randint(0, 5)
        while process.is_alive() and last_step(folder / "killed") < target:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))  # in a rollout, a step, or a checkpoint half written
        met += process.is_alive()
        process.kill()
        process.join()
        print(f"killed after checkpoint {last_step(folder / 'killed')}", flush=True)
    if not (folder / "killed" / LOG_FILE).is_file():
        end(folder, "killed")
    (log, weights), (other, others) = ended(folder / "whole"), ended(folder / "killed")
    assert log == other and weights == others
    return met


if __name__ == "__main__":
    met = main(Path(sys.argv[1]), int(sys.argv[2]))
    print(f"{met} kills met the run at work; the same log and the same weights")
