"""Two processes on CPU over gloo: one process's losses and learning rates, and ZeRO's equal to DDP's."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from launched import ROOT, accelerate, launch, rollouts, train, trained
from trainers import build, contents, foreign

from abscot_trl.checkpoint import verify_checkpoint
from abscot_trl.cli import accelerate_config_path
from abscot_trl.loop.memory import saved_bytes, shape_of
from abscot_trl.phases import read_yaml
from abscot_trl.training.resume import sealed_checkpoints

STEPS, WARMUP, PEAK = 8, 2, 1.0e-3
FIELDS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "global_batch_size": 8,  # 4 micro-batches by one process, 2 by each of two
    "learning_rate": PEAK,
    "lr_scheduler_type": "cosine",
    "warmup_steps": WARMUP / STEPS,  # a share, as in the recipes
    "max_grad_norm": 0.5,
}

GAUGED = {"rows": 200, "gauge_rows": 4, "gauge_steps": 1, "max_steps": 2, "per_device_train_batch_size": 1}
GAUGED |= {"global_batch_size": 4}

ROLLOUTS = {"max_steps": 4, "per_device_train_batch_size": 4, "global_batch_size": 16, "learning_rate": 1e-3}
ROLLOUTS |= {"num_iterations": 2, "probe_steps": 2}

ICOT = {"max_steps": 8, "removal_stages": 3, "adam_epsilon": 1e-4, "baseline": "icot"}
ICOT |= {"per_device_train_batch_size": 2, "global_batch_size": 4}


@pytest.fixture(scope="module")
def ddp(checkpoint, inputs, tmp_path_factory):
    """What two processes train under DDP, full and by LoRA, and what they refuse, stop and resume."""
    folder = tmp_path_factory.mktemp("ddp")
    before = foreign(folder / "foreign")
    jobs = [("train", checkpoint, folder / "full", FIELDS), ("train", checkpoint, folder / "lora", FIELDS, True)]
    jobs.append(("train", checkpoint, folder / "gauged", GAUGED))
    jobs.append(("rollouts", checkpoint, folder / "rollouts", ROLLOUTS))
    jobs.append(("resumed_rollouts", checkpoint, folder / "resumed"))
    jobs.append(("together", checkpoint, folder, inputs))
    fsdp = {key: value for key, value in launched_environment("fsdp2")[1].items() if "FSDP" in key}
    launch(accelerate("ddp"), *jobs, ("refused", folder, with_lora(checkpoint, inputs, folder / "out"), fsdp))
    found = {name: trained(folder / name) for name in ("full", "lora", "gauged")} | refusals(folder)
    found["rollouts"] = json.loads((folder / "rollouts" / "found.json").read_text())
    return SimpleNamespace(**found, folder=folder, before=before)


@pytest.fixture(scope="module")
def zero2(checkpoint, inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero2")
    jobs = [command(checkpoint, inputs, folder / "command", bf16=True)]
    jobs += [("train", checkpoint, folder / "full", FIELDS), ("train", checkpoint, folder / "lora", FIELDS, True)]
    launch(accelerate("zero2"), *jobs)
    return SimpleNamespace(folder=folder, full=trained(folder / "full"), lora=trained(folder / "lora"))


@pytest.fixture(scope="module")
def zero3(checkpoint, inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero3")
    jobs = [command(checkpoint, inputs, folder / "command", bf16=False)]  # while nothing is set up
    jobs += [("train", checkpoint, folder / "full", FIELDS), ("train", checkpoint, folder / "icot", ICOT)]
    jobs.append(("train", checkpoint, folder / "gauged", GAUGED | {"packing": True, "max_length": 300}))
    jobs.append(("rollouts", checkpoint, folder / "rollouts", ROLLOUTS))
    launch(accelerate("zero3"), *jobs, ("refused", folder, with_lora(checkpoint, inputs, folder / "out")))
    full, icot, gauged = (trained(folder / name) for name in ("full", "icot", "gauged"))
    found = {"rollouts": json.loads((folder / "rollouts" / "found.json").read_text())} | refusals(folder)
    return SimpleNamespace(**found, folder=folder, full=full, icot=icot, gauged=gauged)


def refusals(folder: Path) -> dict:
    """What the processes said of `with_lora`, and the models that they wrote all the same."""
    said = {(folder / f"said{rank}.txt").read_text() for rank in range(2)}
    return {"said": said, "models": list((folder / "out").glob("*model*"))}


def command(checkpoint, inputs: dict, output: Path, bf16: bool) -> tuple[str, ...]:
    """The job of `abscot bottleneck` for two steps of full fine-tuning."""
    fields = inputs | {"model_name_or_path": checkpoint, "output_dir": output}
    fields |= {"use_cpu": "true", "bf16": bf16, "dtype": "float32", "attn_implementation": "sdpa", "max_steps": "2"}
    fields |= {"max_length": "256", "per_device_train_batch_size": "2", "save_steps": "1", "save_total_limit": "1"}
    return "command", *[part for key, value in fields.items() for part in (f"--{key}", str(value))]


def with_lora(checkpoint, inputs: dict, output: Path) -> list[str]:
    """Arguments of `abscot bottleneck`."""
    fields = inputs | {"model_name_or_path": checkpoint, "output_dir": output, "use_peft": "true"}
    fields |= {"use_cpu": "true", "bf16": "false"}
    return [part for key, value in fields.items() for part in (f"--{key}", str(value))]


def assert_same_training(found: dict, expected: dict) -> None:
    assert len(found["log"]) == len(expected["log"]) == STEPS
    for a, b in zip(found["log"], expected["log"], strict=True):
        for key in ("loss", "loss_trace", "loss_end", "loss_answer", "num_tokens", "learning_rate"):
            assert a[key] == pytest.approx(b[key], abs=1e-5), key
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["grad_norm"] > FIELDS["max_grad_norm"]  # clipping was at work
    for name, weight in expected["weights"].items():
        assert (found["weights"][name] - weight).abs().max() < 1e-4, name


@pytest.mark.slow
def test_two_processes_train_as_one(checkpoint, tmp_path, ddp):
    train(str(checkpoint), str(tmp_path), FIELDS)  # by this process
    one = trained(tmp_path)
    assert (one["processes"], ddp.full["processes"], ddp.full["kind"]) == (1, 2, "MULTI_CPU")
    assert_same_training(ddp.full, one)


@pytest.mark.slow
def test_two_processes_refuse_stop_and_resume_together(ddp):
    found = [json.loads((ddp.folder / f"found{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1] and found[0]["processes"] == 2
    assert "no phase of ours wrote" in found[0]["foreign"] and contents(ddp.folder / "foreign") == ddp.before
    assert "the loss of step 3 is nan" in found[0]["loss"]
    assert "after step 2 the weights are not finite" in found[0]["weights"]
    assert [path.name for path in sealed_checkpoints(ddp.folder / "weights")] == ["checkpoint-1"]
    assert found[0]["same"] == [True, True]


@pytest.mark.slow
def test_the_cosine_ends_at_zero_and_never_rises_again(ddp):
    rates = [entry["learning_rate"] for entry in ddp.full["log"]]
    decay = [0.5 * (1 + math.cos(math.pi * i / (STEPS - WARMUP))) for i in range(STEPS - WARMUP)]
    assert rates == pytest.approx([PEAK * share for share in [0.0, 0.5, *decay]], abs=1e-12)
    after = rates[WARMUP:] + ddp.full["rate_at_end"][:1]
    assert all(a > b for a, b in zip(after, after[1:], strict=False)) and set(ddp.full["rate_at_end"]) == {0.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_zero_trains_as_ddp(ddp, name, request):
    found = request.getfixturevalue(name).full
    assert (found["processes"], found["kind"]) == (2, "DEEPSPEED")
    assert_same_training(found, ddp.full)
    assert set(found["rate_at_end"]) == {0.0}


@pytest.mark.slow
def test_lora_under_zero2_trains_as_under_ddp(ddp, zero2):
    assert zero2.lora["kind"] == "DEEPSPEED" and any("token" in name for name in zero2.lora["weights"])
    assert_same_training(zero2.lora, ddp.lora)


@pytest.mark.slow
def test_two_processes_of_zero3_internalise_as_one(checkpoint, tmp_path, zero3):
    """The same rows a step, and moments that are forgotten in DeepSpeed's partitions too."""
    two, one = zero3.icot, build(checkpoint, tmp_path / "one", **ICOT)
    assert (two["processes"], two["kind"]) == (2, "DEEPSPEED")
    one.train()
    for a, b in zip(one.state.log_history, two["log"], strict=False):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-3) and a["num_tokens"] == b["num_tokens"]
    weights = dict(one.model.named_parameters())
    assert max((weights[name] - weight).abs().max() for name, weight in two["weights"].items()) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "zero3"])
def test_two_processes_read_the_gauges_as_one(checkpoint, tmp_path, name, request):
    two, packed = request.getfixturevalue(name).gauged, {"packing": True, "max_length": 300}
    train(str(checkpoint), str(tmp_path), GAUGED | (packed if name == "zero3" else {}))
    one = trained(tmp_path)
    assert (one["processes"], two["processes"]) == (1, 2)
    for a, b in zip(two["log"], one["log"], strict=True):  # both steps
        assert "useful_own" in b and a == pytest.approx(b, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, words", [("zero3", "does not work under DeepSpeed ZeRO-3"), ("ddp", "is not supported under FSDP")]
)
def test_lora_is_refused_in_one_line(name, words, request):
    """By the command itself; FSDP2's settings came over those of DDP, last."""
    found = request.getfixturevalue(name)
    (said,) = found.said
    assert said.startswith("abscot bottleneck: LoRA with trained token") and words in said and "\n" not in said
    assert not found.models


@pytest.mark.slow
@pytest.mark.parametrize("name, bf16", [("zero3", False), ("zero2", True)])
def test_full_fine_tuning_on_zero_ends_in_a_checkpoint(checkpoint, name, bf16, request):
    """By the command itself: before and after training one process reads models, which ZeRO-3 would divide."""
    output = request.getfixturevalue(name).folder / "command"
    assert verify_checkpoint(output).size == 8
    log = json.loads((output / "training_log.json").read_text())
    assert log["steps"] == 2 and {entry["sequences_per_step"] for entry in log["log"]} == {2 * 2}
    kept, shape = output / "checkpoint-2", shape_of(str(checkpoint))
    result, saved = saved_bytes({"bf16": bf16}, read_yaml(accelerate_config_path(name)))
    weights = (output / "model.safetensors").stat().st_size
    assert weights == pytest.approx(result * shape.parameters, rel=0.1)
    written = sum(file.stat().st_size for end in ("safetensors", "states.pt") for file in kept.rglob(f"*{end}"))
    assert written == pytest.approx(saved * shape.parameters, rel=0.1)


def launched_environment(name: str) -> tuple:
    """accelerate's arguments for a configuration, and the environment that it would give its processes."""
    config = str(ROOT / "accelerate_configs" / f"{name}.yaml")
    parsed = launch_command_parser().parse_args(["--config_file", config, "--main_process_port", "0", "train.py"])
    args, defaults, _ = _validate_launch_command(parsed)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return args, prepare_deepspeed_cmd_env(args)[1]
    return args, prepare_multi_gpu_env(args)


DEEPSPEED = {  # stage, where weights and optimiser lie, processes, machines
    "zero2": (2, "none", 2, 1),
    "zero3": (3, "none", 8, 1),
    "zero3_offload": (3, "cpu", 2, 1),
    "zero3_multinode": (3, "none", 16, 2),
}


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "accelerate_configs").glob("*.yaml"))])
def test_accelerate_reads_each_configuration_as_it_is_meant(name, monkeypatch):
    args, environment = launched_environment(name)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert args.mixed_precision == ("no" if name == "cpu" else "bf16")
    if name in DEEPSPEED:
        stage, where, processes, machines = DEEPSPEED[name]
        plugin = DeepSpeedPlugin()
        assert (plugin.zero_stage, args.num_processes, args.num_machines) == (stage, processes, machines)
        zero = plugin.deepspeed_config["zero_optimization"]
        assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == where
        assert zero["stage3_gather_16bit_weights_on_model_save"] == (stage == 3)  # a whole checkpoint is written
        assert plugin.deepspeed_config["gradient_clipping"] == "auto"  # the recipe's max_grad_norm
        if machines > 1:
            assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "8", 0)
    elif name == "fsdp2":
        plugin = FullyShardedDataParallelPlugin()
        assert (plugin.fsdp_version, plugin.reshard_after_forward, args.num_processes) == (2, True, 8)
        assert plugin.state_dict_type.name == "FULL_STATE_DICT" and plugin.cpu_ram_efficient_loading
        assert "transformer" in str(plugin.auto_wrap_policy) and not plugin.activation_checkpointing
    else:
        assert not args.use_deepspeed and not args.use_fsdp
        assert (args.multi_gpu, args.num_processes) == {"cpu": (False, 1), "single": (False, 1), "ddp": (True, 2)}[
            name
        ]


@pytest.mark.slow
def test_rollouts_of_a_resumed_second_epoch(ddp):
    """Its own order of prompts, which is not the first epoch's."""
    found = json.loads((ddp.folder / "resumed" / "found.json").read_text())
    assert found["same"] and found["prompts"][:4] != found["prompts"][4:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero3"])
def test_rollouts_of_two_processes_are_those_of_one(request, checkpoint, tmp_path, kind):
    """The same draws, rewards and probes, and losses that the order of sums alone tells apart."""
    rollouts(checkpoint, tmp_path / "one", ROLLOUTS)
    one = json.loads((tmp_path / "one" / "found.json").read_text())
    two = request.getfixturevalue(kind).rollouts
    assert (one["processes"], two["processes"]) == (1, 2) and len(one["log"]) == len(two["log"]) == 7
    for here, there in zip(one["log"], two["log"], strict=True):
        assert here.keys() == there.keys() and here.get("codebook_counts") == there.get("codebook_counts")
        for name in {"loss", "grad_norm", "reward", "trace/length", "probe/own", "probe/random"} & here.keys():
            assert there[name] == pytest.approx(here[name], rel=1e-3, abs=1e-6), name
        if "kl" in here:  # a mean of micro-batches' means
            assert there["kl"] == pytest.approx(here["kl"], rel=0.1, abs=1e-6)
