"""The recipes of a tiny warm-up on CPU (its other fields: the fixture `toy`), and a kill within one process."""

from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from abscot_trl import storage
from abscot_trl.data.toy import chain_arithmetic, write_problems
from abscot_trl.phases import run_phase

TRAINING = {
    "dtype": "float32",
    "attn_implementation": "sdpa",
    "max_length": 2048,
    "pad_to_multiple_of": 8,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1.0e-3,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]}
# Two names of this machine. `env NODE={node}` stands for `srun --nodelist={node}`: it starts a command and becomes it.
NODES = {"nodes": ["localhost", "127.0.0.1"], "launcher": "env NODE={node}"}


def recipes(folder: Path, problems: str, training: dict | None = None, **evaluation) -> dict[str, str]:
    """Write the three phase recipes and return their paths as the driver's fields."""
    evaluation = {
        "problems": problems,
        "instruction": False,
        "max_new_tokens": 8,
        "swaps": ["own", "random"],
    } | evaluation
    for name in ("bottleneck", "distill"):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(TRAINING | (training or {})))
    (folder / "evaluate.yaml").write_text(yaml.safe_dump(evaluation))
    return {name: str(folder / f"{name}.yaml") for name in ("bottleneck", "distill", "evaluate")}


def toy_fields(checkpoint: Path, folder: Path) -> dict:
    """Prepared toy rows and problems in `folder`; returns the driver's fields."""
    rows = chain_arithmetic(84, 4, 5, seed=0)
    train = write_problems(folder / "train.jsonl", rows[:64])
    write_problems(folder / "test.jsonl", rows[64:])
    data = str(folder / "data")
    arguments = ["--data", train, "--data_format", "problems", "--tokenizer", str(checkpoint), "--output_dir", data]
    run_phase("data", arguments)
    fields = {"run_dir": str(folder / "run"), "model": str(checkpoint), "data": data, "launch": "inline"}
    # no default: most kinds of stages
    fields |= {"initial": "cycle", "distill_from": "cot", "rehearsal": 1.0}
    return fields | {"rounds": 2, "rows_per_phase": 16, "seed": 0}


class Killed(BaseException):
    """As sudden as a kill, within one process."""


def killed_at_every_write(monkeypatch, module, run: Callable, writes: Callable = lambda: 1) -> Iterator[None]:
    """Run until it ends: each attempt finishes `writes()` files and is killed at the next, then comes a turn here."""
    write, left = storage.write_whole, 0

    def dying(path, text):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        write(path, text)

    for place in (storage, module):
        monkeypatch.setattr(place, "write_whole", dying)
    for _ in range(30):
        left = writes()
        try:
            run()
        except Killed:
            yield
        else:
            return
