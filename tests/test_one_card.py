"""
One process trains on one card, however many the machine has, whichever door it came by.

    python -m pytest -q tests/test_one_card.py        # on a machine with two GPUs; elsewhere two of them are skipped
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import trl.trainer.utils
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from launched import ROOT
from trainers import rows, settings
from transformers import PreTrainedModel

from abscot_trl.training.bottleneck import BottleneckSFTTrainer
from abscot_trl.training.configs import BottleneckConfig

SINGLE = str(ROOT / "accelerate_configs" / "single.yaml")


@pytest.mark.skipif(torch.cuda.is_available(), reason="four cards are made up: for a machine without one")
def test_a_trainer_takes_one_of_four_cards(checkpoint, tmp_path, monkeypatch):
    """What transformers and trl would do with the other three shows on a CPU too."""
    asked, load = [], PreTrainedModel.from_pretrained.__func__

    def loaded(cls, *args, device_map=None, **kwargs):
        asked.append(device_map)
        return load(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(loaded))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    card = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    monkeypatch.setattr(trl.trainer.utils, "PartialState", lambda: card)
    config = BottleneckConfig(**settings(tmp_path, use_cpu=False))
    trainer = BottleneckSFTTrainer(str(checkpoint), config, rows(checkpoint))
    assert asked == [None]  # "auto" spreads it over all
    assert (trainer.args.n_gpu, trainer.args.train_batch_size) == (1, 8)  # no nn.DataParallel, nor its batch


def test_single_leaves_the_choice_of_the_card_to_the_user(monkeypatch):
    """accelerate's `gpu_ids` would write over CUDA_VISIBLE_DEVICES; no process group is asked for either."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    parsed = launch_command_parser().parse_args(["--config_file", SINGLE, "-m", "abscot_trl.scripts.bottleneck"])
    args, *_ = _validate_launch_command(parsed)
    assert not (args.multi_gpu or args.use_deepspeed or args.use_fsdp)  # accelerate's simple launcher
    environment = prepare_simple_launcher_cmd_env(args)[1]
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"
    assert not {"LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"} & (environment.keys() - os.environ.keys())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("door", [[], ["-m", "accelerate.commands.launch", "--config_file", SINGLE]], ids=str)
def test_one_of_two_real_cards(door, checkpoint, tmp_path):
    """Parameters, optimiser and batches on the first visible card, nothing on the second."""
    cards = []
    for visible in ("0,1", "1"):
        found = tmp_path / f"{visible}.json"
        subprocess.run(
            [sys.executable, *door, str(ROOT / "tests" / "launched.py"), "one_card"]
            + [json.dumps([str(checkpoint), str(tmp_path / visible), str(found)])],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": visible},
            check=True,
        )
        found = json.loads(found.read_text())
        cards.append(found.pop("card"))
        expected = {"devices": ["cuda:0"], "n_gpu": 1, "model_parallel": False, "elsewhere": 0}
        assert found == expected | {"visible": visible.count(",") + 1}
    assert cards[0] != cards[1]
