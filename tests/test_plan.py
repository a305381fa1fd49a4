"""The plan against what was measured, against transformers' own counts, and against files on disk."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from trainers import lora, rows, run
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config
from warmups import LORA, TRAINING, recipes

from abscot_trl.checkpoint import MergeArguments, merge_adapter
from abscot_trl.cli import accelerate_config_path
from abscot_trl.data.prepare import load_prepared, row_lengths
from abscot_trl.data.splits import staged_splits
from abscot_trl.data.toy import chain_arithmetic, write_problems
from abscot_trl.errors import Refused
from abscot_trl.examples import Encoder
from abscot_trl.loop import driver
from abscot_trl.loop.duration import GPUS, batch_seconds, card_of
from abscot_trl.loop.lengths import row_tokens
from abscot_trl.loop.memory import (
    GIB,
    saved_bytes,
    shape_of,
    stage_disk,
    trained_parameters,
    training_disk,
    training_memory,
)
from abscot_trl.loop.plan import PlanArguments, describe_plan, plan
from abscot_trl.loop.warmup import WarmupArguments, stages, warmup
from abscot_trl.phases import parse, read_yaml, run_phase
from abscot_trl.training.bottleneck import BottleneckSFTTrainer
from abscot_trl.training.distillation import SelfDistillationTrainer
from abscot_trl.training.steps import steps_of

# Peak GiB of a step of BottleneckSFTTrainer on one H200: flex attention, Liger, bf16, AdamW, micro-batches of one row.
SIZES = {  # d, layers, heads, d_ff, tied
    "0.6b": (1024, 28, 16, 3072, True),
    "1.7b": (2048, 28, 16, 6144, True),
    "4b": (2560, 36, 32, 9728, True),
    "8b": (4096, 36, 32, 12288, False),
}
MEASURED = [  # size, LoRA rank, gradient checkpointing, tokens, rows of a step, GiB, trained parameters
    ("0.6b", 32, True, 8192, 1, 3.051, 20.25e6),
    ("0.6b", None, True, 8192, 1, 9.593, None),
    ("0.6b", 32, False, 8192, 1, 12.407, 20.25e6),
    ("1.7b", 32, True, 8192, 1, 6.929, 35.0e6),
    ("1.7b", 32, True, 16384, 1, 7.840, 35.0e6),
    ("1.7b", None, True, 8192, 1, 26.997, None),
    ("4b", 32, True, 8192, 1, 12.740, 66.2e6),
    ("4b", None, True, 8192, 1, 61.93, None),
    ("4b", 32, False, 8192, 1, 41.8, 66.2e6),
    ("8b", 32, True, 8192, 1, 23.348, 87.8e6),
    ("0.6b", 32, True, 4096, 1, 2.82, 20.25e6),
    ("1.7b", 32, True, 12288, 2, 7.55, 35.0e6),
    ("4b", 16, True, 4096, 1, 11.635, 33.2e6),
    ("1.7b", None, True, 4096, 1, 26.931, None),
    ("0.6b", None, True, 12288, 2, 11.616, None),
    ("0.6b", 32, True, 32768, 1, 4.937, 20.25e6),
    ("1.7b", None, False, 4096, 2, 39.67, None),
    ("0.6b", 16, True, 16384, 2, 3.482, 10.16e6),
    ("1.7b", 32, True, 24576, 1, 8.835, 35.0e6),
    ("4b", 32, True, 16384, 2, 14.493, 66.2e6),
    ("1.7b", 32, False, 4096, 2, 13.948, 35.0e6),
]
# The same on one H100 with compiled layers, without Liger (tests/benchmarks/results/train.json).
COMPILED = [  # size, recipe, tokens, GiB
    ("4b", {"gradient_checkpointing": False, "lora_r": 32}, 8192, 41.80),
    ("4b", {"gradient_checkpointing": True, "lora_r": 32}, 8192, 12.78),
    ("4b", {"gradient_checkpointing": True, "lora_r": 32}, 32768, 20.34),
    ("4b", {"gradient_checkpointing": False, "dtype": "bfloat16"}, 8192, 55.13),
    ("4b", {"gradient_checkpointing": False, "dtype": "bfloat16", "gradient_accumulation_steps": 8}, 8192, 62.66),
    ("135m", {"gradient_checkpointing": False}, 4 * 8192, 20.35),
    ("135m", {"gradient_checkpointing": False}, 2 * 8192, 11.17),
]
# Seconds of a micro-batch there: size, recipe, tokens, document length, seconds.
SECONDS = [
    ("4b", {"lora_r": 32}, 8192, 8192, 0.499),
    ("4b", {"lora_r": 32, "gradient_checkpointing": True}, 8192, 8192, 0.686),
    ("4b", {"lora_r": 32, "gradient_checkpointing": True}, 32768, 32768, 5.017),
    ("4b", {"dtype": "bfloat16"}, 8192, 8192, 4.28 / 8),
    ("4b", {"gradient_checkpointing": True}, 8192, 8192, 6.173 / 8),
    ("135m", {}, 4 * 8192, 200, 0.107),
]
STARTING = [  # so little that the host sets the time
    ("4b", {"lora_r": 32, "gradient_checkpointing": True}, 2048, 2048, 0.22),
    ("135m", {}, 200, 200, 0.0896),
]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config_of(size: str, folder: Path) -> str:
    if size == "135m":
        config = LlamaConfig(
            hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
            intermediate_size=1536, vocab_size=49280, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
        )  # fmt: skip
        config.save_pretrained(folder / size)
        return str(folder / size)
    width, layers, heads, mlp, tied = SIZES[size]
    config = Qwen3Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8, head_dim=128,
        intermediate_size=mlp, vocab_size=151936, tie_word_embeddings=tied, architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder / size)
    return str(folder / size)


@pytest.mark.parametrize(("size", "rank", "checkpointing", "tokens", "rows_a_step", "gib", "trained"), MEASURED)
def test_peak_memory_is_what_an_h200_measured(tmp_path, size, rank, checkpointing, tokens, rows_a_step, gib, trained):
    shape = shape_of(config_of(size, tmp_path))
    recipe = {"gradient_checkpointing": checkpointing, "per_device_train_batch_size": 1}
    recipe |= {"gradient_accumulation_steps": rows_a_step, "use_peft": rank is not None}
    if rank:
        recipe |= {"lora_r": rank, "lora_target_modules": PROJECTIONS}
        assert trained_parameters(shape, recipe, 64) == pytest.approx(trained, rel=2e-3)
    predicted = training_memory(shape, recipe, trained_parameters(shape, recipe, 64), tokens) / GIB
    assert predicted == pytest.approx(gib, rel=0.04)
    shared = training_memory(shape, recipe, trained_parameters(shape, recipe, 64), tokens, stage=3, gpus=8) / GIB
    assert shared < predicted


@pytest.mark.parametrize(("size", "recipe", "tokens", "gib"), COMPILED)
def test_peak_memory_with_compiled_layers_is_what_an_h100_measured(tmp_path, size, recipe, tokens, gib):
    recipe = recipe | {"compile_layers": True, "use_peft": "lora_r" in recipe, "lora_target_modules": PROJECTIONS}
    shape = shape_of(config_of(size, tmp_path))
    predicted = training_memory(shape, recipe, trained_parameters(shape, recipe, 64), tokens) / GIB
    assert predicted == pytest.approx(gib, rel=0.04)


def test_parameters_are_counted_right(checkpoint, tmp_path):
    shape = shape_of(str(checkpoint))
    assert shape.parameters == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(checkpoint).parameters())
    trainer = run(checkpoint, tmp_path, peft_config=lora(checkpoint))
    recipe = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "down_proj"]}
    really = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert trained_parameters(shape, recipe, 8) == really
    with pytest.raises(Refused, match="config.json is not there; run `abscot init` first"):
        shape_of(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_train_epochs": 1, "per_device_train_batch_size": 3},
        {"num_train_epochs": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 5},
        {"num_train_epochs": 2, "per_device_train_batch_size": 1, "global_batch_size": 6},
        {"num_train_epochs": 1.5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
        {"max_steps": 2, "per_device_train_batch_size": 4},
    ],
)
def test_steps_are_transformers_own(checkpoint, tmp_path, fields):
    trainer = run(checkpoint, tmp_path, data=rows(checkpoint, 16), **{"max_steps": -1} | fields)
    assert steps_of(16, fields, 1) == trainer.state.max_steps == trainer.state.global_step


def test_disk_is_what_stages_write(checkpoint, tmp_path):
    def size(folder):
        return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))

    settings = {"model_name_or_path": str(checkpoint), "save_total_limit": 1, "save_strategy": "steps"}
    fields = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path / dtype
        trainer = run(checkpoint, folder, **fields, model_init_kwargs={"dtype": dtype})
        trainer.save_model(str(folder))
        written = size(folder) + sum(p.stat().st_size for p in folder.rglob("optimizer.pt"))
        assert stage_disk("bottleneck", settings | {"dtype": dtype}) == pytest.approx(written, rel=0.1)
    adapter = run(checkpoint, tmp_path / "lora", peft_config=lora(checkpoint))
    adapter.save_model(str(tmp_path / "lora"))
    merge_adapter(MergeArguments(str(tmp_path / "lora"), str(tmp_path / "merged")))
    merge = {"adapter": str(tmp_path / "lora"), "output_dir": str(tmp_path / "merged")}
    assert stage_disk("merge", merge) == pytest.approx(size(tmp_path / "merged"), rel=0.2)


def test_a_checkpoint_takes_what_its_launcher_writes(checkpoint, toy, tmp_path, monkeypatch):
    """
    Bytes a parameter: as tests/test_distributed.py finds them on disk; FSDP's as accelerate's `save_fsdp_model` and
    `save_fsdp_optimizer` write them beside the model.
    """
    shape = shape_of(str(checkpoint))
    full, adapter = {"bf16": True, "dtype": "float32"}, {"use_peft": True, "dtype": "bfloat16"}
    for recipe, name, result, saved in (
        (full, "ddp", 4, 12), (full, "zero2", 2, 16), (full, "zero3", 2, 14), (full, "zero3_offload", 2, 14),
        (full, "fsdp2", 4, 16), (full | {"bf16": False}, "zero3", 4, 16), (full | {"dtype": "bfloat16"}, "ddp", 2, 6),
        (adapter, "ddp", 4, 12), (adapter, "zero2", 2, 16), (adapter | {"bf16": False}, "zero2", 4, 20),
    ):  # fmt: skip
        launcher = read_yaml(accelerate_config_path(name))
        assert saved_bytes(recipe, launcher) == (result, saved), (recipe, name)
        expected = (result + 3 * saved) * shape.parameters
        assert training_disk(shape, recipe, shape.parameters, launcher) == expected
        settings = recipe | {"use_peft": False, "model_name_or_path": str(checkpoint)}
        if not recipe.get("use_peft"):
            assert stage_disk("distill", settings, launcher) == expected
    fields = toy | recipes(tmp_path, "", {"save_strategy": "steps", "bf16": True}) | {"evaluate": None, "rounds": 1}
    lines = plan(PlanArguments(**fields, accelerate_config="zero3"))["stages"]
    assert lines[1]["disk"] == 44 * shape.parameters and lines[1]["stays"] == 2 * shape.parameters
    asked, options = [], WarmupArguments(**fields | {"launch": "accelerate"}, accelerate_config="zero3")
    monkeypatch.setattr(driver, "stage_disk", lambda *given: asked.append(given) or 2**62)
    stage = next(stage for stage in stages(options) if stage.phase == "bottleneck")
    with pytest.raises(Refused, match="will write about"):
        driver.check_disk(stage, options)
    assert asked == [("bottleneck", stage.settings, read_yaml(accelerate_config_path("zero3")))]


@pytest.mark.slow
def test_steps_of_packed_rows_are_those_of_a_run(checkpoint, tmp_path):
    """CoTs of 2 to 24 lines in packs of 160 tokens: what a plan counts from the prepared rows, and the trainer."""
    examples = [e for steps in (2, 3, 5, 9, 16, 24) for e in chain_arithmetic(20, steps, 5, seed=0)]
    arguments = {"data": write_problems(tmp_path / "rows.jsonl", examples), "data_format": "problems"}
    arguments |= {"tokenizer": str(checkpoint), "output_dir": str(tmp_path / "data")}
    run_phase("data", [part for key, value in arguments.items() for part in (f"--{key}", value)])
    packed = LORA | {"packing": True, "max_length": 200, "max_steps": -1, "per_device_train_batch_size": 1}
    fields = recipes(tmp_path, "", packed) | {"data": str(tmp_path / "data"), "model": str(checkpoint)}
    fields |= {"run_dir": str(tmp_path / "run"), "rounds": 1, "rows_per_phase": 60, "rehearsal": 1.0, "evaluate": None}
    fields |= {"initial": "content", "ratio": 4.0, "distill_from": "cot"}
    warmup(WarmupArguments(**fields, launch="inline"))
    trained = [line for line in plan(PlanArguments(**fields))["stages"] if line["phase"] in ("bottleneck", "distill")]
    for line in trained:
        log = json.loads((tmp_path / "run" / line["name"] / "training_log.json").read_text())
        assert line["steps"] == pytest.approx(log["steps"], rel=0.05) and log["steps"] > 20


@pytest.mark.parametrize("channel", ["hidden", "discrete"])
@pytest.mark.parametrize("rehearsal", [0.0, 0.5])
def test_row_tokens_are_the_trainers(channel, rehearsal):
    rng, names = np.random.default_rng(0), ("prompt", "cot", "answer", "trace")
    lengths = {name: rng.integers(1, 9, size=5) for name in names}
    encoder = Encoder(list(range(8)), 8, 9, channel=channel)
    trainer = SimpleNamespace(encoder=encoder, args=SimpleNamespace(rehearsal=rehearsal))
    rows = [
        {"trace": [0] * z, **{f"{name}_ids": [7] * n for name, n in zip(names, (x, c, y), strict=False)}}
        for x, c, y, z in zip(*lengths.values(), strict=True)
    ]
    recipe = {"channel": channel, "rehearsal": rehearsal}
    for phase, trainer_class in {"bottleneck": BottleneckSFTTrainer, "distill": SelfDistillationTrainer}.items():
        encoded = [[len(row["input_ids"]) for row in trainer_class.encode(trainer, row)] for row in rows]
        wanted = [row[k] for k in range(len(encoded[0])) for row in encoded]
        assert row_tokens(lengths, lengths["trace"] + 2, phase, recipe).tolist() == wanted


def test_a_plan_counts_the_copy_of_a_discrete_trace(toy, tmp_path):
    fields, found = toy | recipes(tmp_path, "", LORA | {"max_steps": -1, "num_train_epochs": 1}) | {"rounds": 1}, {}
    data, _ = load_prepared(fields["data"])
    part = staged_splits(len(data), 1, 16, 0)["1.bottleneck"]
    copies = sum(np.minimum(6, row_lengths(data)["cot"][part] // 2) + 2)  # as many tokens as the plan assumes
    for channel in ("hidden", "discrete"):
        (tmp_path / "bottleneck.yaml").write_text(yaml.safe_dump(LORA | {"channel": channel, "num_train_epochs": 1}))
        lines = plan(PlanArguments(**fields | {"evaluate": None}))["stages"]
        found[channel] = next(line["tokens"] for line in lines if line["name"] == "round1/bottleneck")
    assert found["discrete"] - found["hidden"] == copies > 0


@pytest.mark.parametrize("phase", ["bottleneck", "distill"])
def test_rows_that_are_too_long_are_refused_before_the_first_stage(toy, tmp_path, capsys, phase):
    """However short their traces turn out, some rows or all of them exceed a phase's `max_length`."""
    fields = toy | recipes(tmp_path, str(tmp_path / "test.jsonl"), LORA) | {"rounds": 1, "rehearsal": 0.0}
    recipe, data = tmp_path / f"{phase}.yaml", load_prepared(fields["data"])[0]
    lengths = row_lengths(data)
    lengths = {name: values[staged_splits(len(data), 1, 16, 0)[f"1.{phase}"]] for name, values in lengths.items()}
    rows = lengths["prompt"] + lengths["answer"] + lengths["cot"] * (phase == "bottleneck")
    shortest = rows + 2 + (phase == "distill")  # the fixture's m_min is 1; the first traces are not sampled
    for longest, overlong, words in (
        (int(shortest.max()) - 1, "error", f"shorter than {(shortest == shortest.max()).sum()} of 16 rows"),
        (int(shortest.min()) - 1, "drop", "shorter than 16 of 16 rows"),
    ):
        recipe.write_text(yaml.safe_dump(TRAINING | LORA | {"max_length": longest, "overlong": overlong}))
        for call in (lambda: plan(PlanArguments(**fields)), lambda: warmup(WarmupArguments(**fields))):
            with pytest.raises(Refused, match=f"round1/{phase}: max_length {longest} is {words}, however short"):
                call()
        assert not Path(fields["run_dir"]).exists()
    for longest, overlong, words in (
        (int(shortest.max()), "error", f"{(rows + 8 > shortest.max()).sum()} of 16 rows, and they are refused, if"),
        (int(rows.max()) + 7, "drop", f"drops 0 to {(rows == rows.max()).sum()} of 16 rows"),
    ):
        recipe.write_text(yaml.safe_dump(TRAINING | LORA | {"max_length": longest, "overlong": overlong}))
        (warning,) = (w for w in plan(PlanArguments(**fields))["warnings"] if f"{phase}: max_length" in w)
        assert words in warning
        warmup(WarmupArguments(**fields, dry_run=True))
        assert f"WARNING: {warning}" in capsys.readouterr().out
    recipe.write_text(yaml.safe_dump(TRAINING | LORA | {"max_length": int(rows.max()) + 8}))
    assert not [w for w in plan(PlanArguments(**fields))["warnings"] if f"{phase}: max_length" in w]


def test_a_batch_that_the_gpus_cannot_share_is_refused_by_its_stage(toy, tmp_path):
    fields = toy | recipes(tmp_path, "none", {"global_batch_size": 8}) | {"evaluate": None}
    with pytest.raises(Refused, match="^round1/bottleneck: global_batch_size 8 is no multiple of .* x 3"):
        plan(PlanArguments(**fields, gpus=3))


def test_what_phase_b_would_refuse_is_refused_before_phase_a(toy, tmp_path):
    fields = toy | recipes(tmp_path, "none", {}) | {"evaluate": None}
    Path(fields["distill"]).write_text(Path(fields["distill"]).read_text() + "gauge_rows: 1\n")
    for begin in (lambda: plan(PlanArguments(**fields)), lambda: warmup(WarmupArguments(**fields, dry_run=True))):
        with pytest.raises(Refused, match="^round1/distill: .*at least 2 rows"):
            begin()


def test_a_plan_before_what_trains_its_model_says_so(toy, tmp_path):
    """SmolLM2's warm-up starts from what a baseline makes of init's model: of the same sizes."""
    fields = toy | recipes(tmp_path, "", LORA) | {"rounds": 1, "evaluate": None}
    trained, model = plan(PlanArguments(**fields)), fields["model"]
    assert not trained["warnings"]
    fields["model"] = str(tmp_path / "verbal")
    with pytest.raises(Refused, match="verbal/config.json is not there; run `abscot init` first"):  # nothing is known
        plan(PlanArguments(**fields))
    (tmp_path / "init.yaml").write_text(yaml.safe_dump({"output_dir": str(model), "base_model": "not/there"}))
    found = plan(PlanArguments(**fields))
    assert found["stages"] == trained["stages"] and found["warnings"] == [
        f"{fields['model']} is not there; `abscot init` makes {model}, what trains that one comes before this"
    ]


def test_rows_that_the_sampler_drops_are_not_refused(toy, tmp_path):
    fields = toy | recipes(tmp_path, "", LORA) | {"rounds": 1, "evaluate": None}
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(TRAINING | LORA | {"max_length": 4}))
    with pytest.raises(Refused, match="round1/distill: max_length 4 is shorter"):
        plan(PlanArguments(**fields))
    engine = {"max_model_len": 4}  # no trace is sampled, so none is trained on
    assert plan(PlanArguments(**fields | {"launch": "accelerate"}, backend="vllm", engine=engine))["stages"]


def test_the_card_that_is_here_is_planned_for(toy, tmp_path, monkeypatch):
    fields = toy | recipes(tmp_path, "", LORA) | {"rounds": 1, "evaluate": None}
    found = plan(PlanArguments(**fields))  # recipes of a CPU
    assert "1 x CPU, ZeRO" in found["assumptions"][0]
    shown = describe_plan(found).splitlines()
    assert shown[0] == "| stage | rows | steps | tokens | trained | disk |" and {len(shown[0].split("|"))} == {
        len(line.split("|")) for line in shown if line.startswith("|")
    }
    assert "- memory and time are reckoned of GPUs only: not of a CPU" in shown and "GPU" not in " ".join(shown[:9])
    fields |= recipes(tmp_path, "", LORA | {"use_cpu": False}) | {"evaluate": None}

    def planned(name=None, gib=0.0, **asked):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: name is not None)
        card = SimpleNamespace(name=name, total_memory=int(gib * GIB))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
        found = plan(PlanArguments(**fields, **asked))
        hours = [line.get("hours") for line in found["stages"] if line["phase"] == "distill"]
        return hours[0], " ".join(found["assumptions"]), " ".join(found["warnings"]), describe_plan(found)

    hours, said, _, _ = planned()
    assert hours > 0 and "1 x h100 (no GPU is here; `gpu` names another)" in said
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835),
    ):  # fmt: skip
        hours, said, warned, _ = planned(name, 39.5)
        assert hours > 0 and f"1 x {name} (found here)" in said and "GiB a GPU" not in warned
        assert card_of(None).peak == peak * 1e12
    _, _, warned, _ = planned("NVIDIA H200", 0.01)
    assert "GiB a GPU, which has 0; more GPUs" in warned  # its own memory, not the table's
    assert planned("NVIDIA H200", 0.01, gpu="a100")[:3] == planned(gpu="a100")[:3]
    for name in ("NVIDIA L40S", "NVIDIA A100-SXM4-80GB MIG 3g.40gb"):
        hours, said, warned, table = planned(name, 44.0)
        assert hours is None and f"hours are not reckoned: of {name} (found here) no peak is known" in said
        assert table.splitlines()[0] == "| stage | rows | steps | tokens | trained | memory a GPU | disk |"


@pytest.mark.parametrize("size, recipe, tokens, length, seconds", SECONDS + STARTING)
def test_a_batch_takes_what_an_h100_measured(tmp_path, size, recipe, tokens, length, seconds):
    """Three constants were fitted to the first six, the fourth to the others; `make bench-plan` has more."""
    recipe = {"use_peft": "lora_r" in recipe, "gradient_checkpointing": False} | recipe
    predicted = batch_seconds(shape_of(config_of(size, tmp_path)), recipe, tokens, length, GPUS["h100"])
    assert predicted == pytest.approx(seconds, rel=0.1 if tokens > 2048 else 0.2)


def test_a_card_with_twice_of_all_halves_a_step(tmp_path):
    """Down to what the host takes, which no card changes."""
    card = GPUS["h100"]
    twice = replace(card, peak=2 * card.peak, bandwidth=2 * card.bandwidth)
    shape, recipe = shape_of(config_of("4b", tmp_path)), {"use_peft": True}
    seconds = [batch_seconds(shape, recipe, 8192, 8192, one) for one in (card, twice)]
    assert seconds[0] == pytest.approx(2 * seconds[1])
    assert batch_seconds(shape, recipe, 64, 64, card) == batch_seconds(shape, recipe, 64, 64, twice)


def test_the_production_run_fits_two_cards_with_full_fine_tuning(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    (tmp_path / "zero3.yaml").write_text("deepspeed_config: {zero_stage: 3}\nnum_processes: 2\n")
    arguments = ["--config", "recipes/qwen3-4b/production/warmup.paper.yaml", "--tuning", "full", "--gpu", "a100"]
    arguments += ["--accelerate_config", str(tmp_path / "zero3.yaml"), "--run_dir", str(tmp_path / "run")]
    (args,) = parse((PlanArguments,), [*arguments, "--model_config", config_of("4b", tmp_path) + "/config.json"])
    found = plan(args)
    trained = [line for line in found["stages"] if line["phase"] in ("bottleneck", "distill")]
    assert len(trained) == 6 and {line["steps"] for line in trained} == {155}  # of 5000 rows less 64
    states = 16 * trained[0]["trained"] / 2  # weights, gradients and moments in 32 bits
    assert all(states < line["memory"] < 79 * GIB for line in trained)
    assert not [warning for warning in found["warnings"] if "GiB a GPU" in warning or "learning_rate" in warning]


@pytest.mark.slow
def test_a_plan_is_the_run(toy, tmp_path, capsys):
    """Steps of every training stage as they were taken, nothing written; then what makes no sense is said."""
    training = LORA | {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 3}
    fields = toy | recipes(tmp_path, str(tmp_path / "test.jsonl"), training) | {"rounds": 1}
    found = plan(PlanArguments(**fields))
    assert not Path(fields["run_dir"]).exists()
    warmup(WarmupArguments(**fields))
    for line in found["stages"]:
        log = Path(fields["run_dir"]) / line["name"] / "training_log.json"
        if log.is_file():
            steps = [entry["step"] for entry in json.loads(log.read_text())["log"]]
            assert line["steps"] == max(steps) and line["rows"] == json.loads(log.read_text())["rows"]["rows"]
    shown = describe_plan(found)
    assert "| round1/distill |" in shown and "the prepared data" in shown
    cells = [cell.strip() for line in shown.splitlines()[2:] if line.startswith("|") for cell in line.split("|")]
    assert not [cell for cell in cells if re.match(r"0\.0+|0\D", cell)]  # small is not nothing; random traces read 0
    assert not [w for w in found["warnings"] if "rows are needed" in w]
    for name, steps in (("bottleneck", 11), ("distill", 22)):  # 16 rows, with rehearsal 32, in threes, twice
        less = (tmp_path / f"{name}.yaml").read_text().replace("max_steps: -1", f"max_steps: {steps}")
        (tmp_path / f"{name}.yaml").write_text(less.replace("num_train_epochs: 2", "num_train_epochs: 7"))
    for line, other in zip(found["stages"], plan(PlanArguments(**fields))["stages"], strict=True):
        for name in ("tokens", "hours"):
            assert other.get(name, 0) == pytest.approx(line.get(name, 0), rel=0.05)
    (tmp_path / "bottleneck.yaml").write_text(
        yaml.safe_dump(training | {"learning_rate": 1.0e-5, "warmup_steps": 1000})
    )
    found = plan(PlanArguments(**fields | {"rows_per_phase": 100, "accelerate_config": "zero3"}))
    words = " ".join(found["warnings"])
    for expected in (
        "learning_rate 1e-05 is one of full", "refused on ZeRO-3", "warmup_steps 1000 is not under",
        "200 rows are needed",
    ):  # fmt: skip
        assert expected in words
    with pytest.raises(Refused, match="give model_config"):
        plan(PlanArguments(**fields | {"model": str(tmp_path / "none")}))
    for name, value in {"gpus": 0, "cot_tokens": -9}.items():
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            PlanArguments(**fields, **{name: value})
    for text, expected in {
        "- 1": "must hold a YAML mapping", "a: [": "is not valid YAML", "num_processes: two": "'two' is no number",
        "deepspeed_config:": "deepspeed_config: None is no mapping",
        "deepspeed_config: {zero_stage: '2'}": "zero_stage: '2' is none of 0, 1, 2, 3",
        "deepspeed_config: {zero_stage: 4}": "zero_stage: 4 is none of 0, 1, 2, 3",
    }.items():  # fmt: skip
        (tmp_path / "launcher.yaml").write_text(text)
        with pytest.raises(ValueError, match=f"launcher.yaml.*{expected}"):
            plan(PlanArguments(**fields, accelerate_config=str(tmp_path / "launcher.yaml")))
    (tmp_path / "odd.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="odd.json is no configuration of a decoder"):
        plan(PlanArguments(**fields | {"model": "none", "model_config": str(tmp_path / "odd.json")}))


@pytest.mark.slow
def test_a_plan_takes_content_traces_by_their_ratio(toy, tmp_path):
    """Their tokens as made; a plan by half of the CoT would have had three times as many."""
    epoch = {"max_steps": -1, "num_train_epochs": 1}
    fields = toy | recipes(tmp_path, "", epoch) | {"initial": "content", "ratio": 6.0, "rounds": 1, "evaluate": None}
    stage = next(line for line in plan(PlanArguments(**fields))["stages"] if line["phase"] == "bottleneck")
    run = tmp_path / "run"
    warmup(WarmupArguments(**fields | {"run_dir": str(run), "until": "round1/bottleneck-traces"}))
    data, _ = load_prepared(fields["data"])
    rows = [json.loads(line) for line in (run / "round1/bottleneck-traces/traces.jsonl").read_text().splitlines()]
    made = sum(  # of the answers as of the traces: an EOS is theirs
        sum(len(data[row["row"]][f"{part}_ids"]) for part in ("prompt", "cot", "answer")) + len(row["trace"]) + 2
        for row in rows
    )
    assert stage["tokens"] == pytest.approx(made, rel=0.02)
