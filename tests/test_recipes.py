"""No recipe can rot: each parses, fits its model's real shape and forms its first batch; each command shown parses."""

import ast
import re
import shlex
import subprocess
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from peft import get_peft_model
from tiny import make_checkpoint
from trainers import rows
from transformers import (
    AutoTokenizer,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl import ModelConfig

from abscot_trl.attention import check_supported
from abscot_trl.cli import TRAINING, accelerate_config_path
from abscot_trl.loop.baselines import BaselinesArguments, baseline_stages
from abscot_trl.loop.warmup import WarmupArguments, stages
from abscot_trl.phases import PHASES, check_fields, parse, parse_phase, read_yaml
from abscot_trl.training.adapters import lora_config
from abscot_trl.training.baselines import BaselineTrainer
from abscot_trl.training.bottleneck import BottleneckSFTTrainer
from abscot_trl.training.configs import BASELINES
from abscot_trl.training.distillation import SelfDistillationTrainer
from abscot_trl.vocabulary import AbstractVocabulary

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*.yaml"))
READ = [ROOT / "README.md", *(p for room in ("recipes", "abscot_trl", "tests") for p in (ROOT / room).rglob("*.md"))]
DOCUMENTS = FILES + [path.relative_to(ROOT) for path in READ]
MODELS = [path for path in FILES if path.parts[1] != "demo"]
TRAINED = [path for path in MODELS if path.name.startswith(("bottleneck", "distill"))]
WARMUPS = [path for path in MODELS if path.name.startswith("warmup")]
COMPARED = [path for path in MODELS if path.name == "baselines.yaml"]
SMALL = Path("recipes/smollm2-135m")  # full fine-tuning on one GPU: its recipes have no tunings
TRAINERS = {"bottleneck": BottleneckSFTTrainer, "distill": SelfDistillationTrainer}
# What a recipe asks of a GPU, as a machine without one can be asked it.
ON_CPU = ["--use_cpu", "true", "--bf16", "false", "--use_liger_kernel", "false", "--attn_implementation", "sdpa"]
ON_CPU += ["--compile_layers", "false", "--dataloader_num_workers", "0"]

SPEED = {"gradient_checkpointing", "compile_layers", "use_liger_kernel"}  # say how fast, not what is trained

# The shapes of the real models, from their config.json.
QWEN3 = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1.0e6,
}
SHAPES = {
    "Qwen/Qwen3-4B": (
        Qwen3ForCausalLM,
        Qwen3Config(hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True, **QWEN3),
    ),
    "Qwen/Qwen3-8B": (
        Qwen3ForCausalLM,
        Qwen3Config(hidden_size=4096, intermediate_size=12288, tie_word_embeddings=False, **QWEN3),
    ),
    "ibm-granite/granite-4.0-micro": (
        GraniteMoeHybridForCausalLM,
        GraniteMoeHybridConfig(
            hidden_size=2560,
            num_hidden_layers=40,
            num_attention_heads=40,
            num_key_value_heads=8,
            vocab_size=100352,
            intermediate_size=8192,
            shared_intermediate_size=8192,
            num_local_experts=0,
            num_experts_per_tok=0,
            tie_word_embeddings=True,
            layer_types=["attention"] * 40,
            position_embedding_type="rope",
            max_position_embeddings=131072,
            embedding_multiplier=12,
            attention_multiplier=0.015625,
            residual_multiplier=0.22,
            logits_scaling=10,
        ),
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        LlamaForCausalLM,
        LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49152,
            max_position_embeddings=8192,
            rms_norm_eps=1.0e-5,
            rope_theta=1.0e5,
            tie_word_embeddings=True,
        ),
    ),
}
PARAMETERS = {
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "ibm-granite/granite-4.0-micro": 3_402_836_480,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
}


def phase_of(path: Path) -> str:
    if path.parent.name == "benchmarks":
        return "evaluate"
    return path.name.split(".")[0]


def base_model(path: Path) -> str:
    return read_yaml(ROOT / path.parent / "init.yaml")["base_model"]


@cache
def meta_model(name: str):
    kind, config = SHAPES[name]
    with torch.device("meta"):
        return kind(config)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def on_cpu(phase: str) -> list[str]:
    """What of `ON_CPU` the phase has a field for, where it trains."""
    names = {f"--{field.name}" for cls in PHASES[phase].classes for field in fields(cls)}
    pairs = zip(ON_CPU[::2], ON_CPU[1::2], strict=True)
    return [part for pair in pairs if pair[0] in names for part in pair] if phase in TRAINING else []


def own_arguments(path: Path) -> list[str]:
    """The command that a recipe shows for itself, without its first two words."""
    shown = [shlex.split(command) for command in commands(path) if f"--config {path}" in command]
    return as_abscot(next(words for words in shown if words[1] == phase_of(path)))[2:]


@pytest.mark.parametrize("path", MODELS, ids=str)
def test_a_recipe_shows_its_own_command(path):
    parsed = parse_phase(phase_of(path), [*own_arguments(path), *on_cpu(phase_of(path))])
    if path in TRAINED:
        _, training, model = parsed
        recipe = read_yaml(path)
        assert {"learning_rate", "num_train_epochs", "global_batch_size", "bf16", "save_steps"} <= recipe.keys()
        rows = training.gradient_accumulation_steps * recipe["per_device_train_batch_size"]  # one process
        assert rows == recipe["global_batch_size"]
        assert model.use_peft == (".lora." in path.name) and recipe["attn_implementation"] == "flex_attention"
        assert path.parent == SMALL or recipe["global_batch_size"] % 16 == 0  # on 1 to 16 GPUs


@pytest.mark.parametrize("path", [path for path in FILES if path not in MODELS], ids=str)
def test_the_demos_recipes_hold_fields_of_their_phases(path):
    check_fields(read_yaml(path), PHASES[phase_of(path)].classes, path)


@pytest.mark.parametrize("path", [path for path in TRAINED if path.name.startswith("distill")], ids=str)
def test_phase_b_takes_phase_as_fields(path):
    own = yaml.safe_load(path.read_text())
    assert own.pop("base") == path.name.replace("distill", "bottleneck")
    assert own.keys() == ({"num_train_epochs"} if path.parent == SMALL else set())


@pytest.mark.parametrize("folder", sorted({path.parent for path in TRAINED} - {SMALL}), ids=str)
def test_a_folder_is_whole_and_its_numbers_agree(folder):
    names = {path.name for path in MODELS if path.parent == folder}
    forms = {"paper"} if folder.name == "production" else {"paper", "informed"}
    tunings = {"lora", "full"}
    others = {"evaluate.verbal.yaml"} if folder.name == "production" else {"baselines.yaml", "concise.yaml"}
    if folder.name != "production":
        others |= {f"grpo.{tuning}.yaml" for tuning in tunings}
    assert names == {"init.yaml", "data.yaml", "evaluate.yaml"} | others | {
        *(f"{phase}.{form}.yaml" for phase in ("traces", "warmup") for form in forms),
        *(f"{phase}.{tuning}.yaml" for phase in TRAINERS for tuning in tunings),
    }
    assert (ROOT / folder / "README.md").is_file()
    init, data = read_yaml(folder / "init.yaml"), read_yaml(folder / "data.yaml")
    assert (init["codebook_size"], init["m_max"]) == (64, 128)  # the paper's
    assert init["output_dir"] == data["tokenizer"]
    rows = {}
    for form in forms:
        warm, traces = read_yaml(folder / f"warmup.{form}.yaml"), read_yaml(folder / f"traces.{form}.yaml")
        rows[form] = 2 * warm["rounds"] * warm["rows_per_phase"]
        assert rows[form] <= data["limit"] and traces["method"] == warm["initial"]
        if form == "paper":
            assert (traces["given"], traces["temperature"]) == (warm["distill_from"], warm["temperature"])
        else:
            assert traces["ratio"] == warm["ratio"] and warm["distill_from"] == warm["initial"]
        assert warm["model"] == traces["model"] == init["output_dir"]
        assert warm["data"] == traces["data"] == data["output_dir"]
    assert len({*rows.values()}) == 1  # as many in both forms
    for path in (path for path in TRAINED if path.parent == folder):
        assert read_yaml(path)["max_length"] == data["max_total_tokens"]  # every prepared row fits


@pytest.mark.parametrize("model", ["qwen3-4b", "qwen3-4b/production", "qwen3-8b", "granite-4.0-micro"])
def test_forms_and_tunings_differ_where_they_should(model):
    folder = Path("recipes") / model
    for phase in TRAINERS:
        lora, full = (read_yaml(folder / f"{phase}.{tuning}.yaml") for tuning in ("lora", "full"))
        different = {key for key in lora.keys() | full.keys() if lora.get(key) != full.get(key)}
        different = {key for key in different - SPEED if not key.startswith("lora_")}
        assert different == {"use_peft", "learning_rate", "dtype"}
        assert (lora["dtype"], full["dtype"]) == ("bfloat16", "float32") and lora["learning_rate"] > full[
            "learning_rate"
        ]
    if model == "qwen3-4b/production":
        return  # one form
    paper, informed = (read_yaml(folder / f"warmup.{form}.yaml") for form in ("paper", "informed"))
    different = {key for key in paper | informed if paper.get(key) != informed.get(key)}
    different -= {"rounds", "rows_per_phase", "engine"}
    assert different == {"name", "run_dir", "initial", "ratio", "distill_from", "temperature"}
    assert (paper["initial"], paper["distill_from"], paper["rehearsal"]) == ("uniform", "prompt", 0.0)


def test_the_small_models_recipes_are_of_one_run():
    """Each reads what another writes; the two forms differ in what they are."""
    found = {path.stem: read_yaml(path) for path in MODELS if path.parent == SMALL}
    init, data, paper, informed = (found[name] for name in ("init", "data", "warmup.paper", "warmup.informed"))
    different = {key for key in paper | informed if paper.get(key) != informed.get(key)}
    assert different == {"name", "run_dir", "initial", "ratio", "distill_from", "temperature"}
    shown = dict(zip(*[iter(own_arguments(SMALL / "baseline.verbal.yaml"))] * 2, strict=True))
    assert shown["--model_name_or_path"] == data["tokenizer"] == init["output_dir"]
    assert shown["--data"] == data["output_dir"] == paper["data"] and shown["--output_dir"] == paper["model"]
    assert found["baseline.verbal"]["baseline"] == "cot"
    rows = Path(data["data"][0]).parent
    for task in ("gsm-symbolic", "facts", "states"):
        evaluate = found["evaluate" if task == "gsm-symbolic" else f"evaluate.{task}"]
        assert evaluate["task"] == task and not evaluate["instruction"]  # rows are trained without one
        assert evaluate["problems"] == f"{rows}/test.jsonl".replace("gsm-symbolic", task)
        others = {key for key, value in found["evaluate"].items() if evaluate.get(key) != value}
        assert others == (set() if task == "gsm-symbolic" else {"task", "problems"})


def test_the_production_run_is_the_seed_reports():
    folder = Path("recipes/qwen3-4b/production")
    for phase in TRAINERS:
        recipe = read_yaml(folder / f"{phase}.lora.yaml")
        expected = {"num_train_epochs": 1, "max_length": 8192, "lora_r": 32, "lora_alpha": 64, "learning_rate": 1e-4}
        expected |= {"lr_scheduler_type": "cosine", "warmup_steps": 0.05, "global_batch_size": 32, "packing": False}
        assert expected.items() <= recipe.items()
        assert len(recipe["lora_target_modules"]) == 7
    init, warm = read_yaml(folder / "init.yaml"), read_yaml(folder / "warmup.paper.yaml")
    assert (init["m_min"], init["m_max"]) == (16, 128)
    expected = {"rounds": 3, "rows_per_phase": 5000, "temperature": 0.7, "engine": {"tensor_parallel_size": 2}}
    assert (expected | {"accelerate_config": "ddp"}).items() <= warm.items()
    evaluate, verbal = (read_yaml(folder / name) for name in ("evaluate.yaml", "evaluate.verbal.yaml"))
    assert (evaluate["trace_temperature"], evaluate["temperature"]) == (0.7, 0.0)
    assert verbal["model"] == init["base_model"] and (verbal["modes"], verbal["swaps"]) == (["verbal"], ["own"])
    assert {key: verbal[key] for key in ("problems", "task", "temperature")} == {
        key: evaluate[key] for key in ("problems", "task", "temperature")
    }


def test_the_benchmarks():
    """One recipe each, of evaluate's fields only; those that sample use Qwen3's settings for thinking off."""
    found = {path.stem: read_yaml(path) for path in FILES if path.parent.name == "benchmarks"}
    assert set(found) == {"math500", "aime24", "aime25", "gpqa_diamond", "gsm8k", "hotpotqa", "alpacaeval"}
    for name, recipe in found.items():
        assert recipe["task"] == name and {"problems", "samples", "swaps", "max_new_tokens"} <= recipe.keys()
        sampling = (recipe["temperature"], recipe.get("top_p"), recipe.get("top_k"))
        assert sampling in ((0.0, None, None), (0.7, 0.8, 20)) and (recipe["samples"] == 1 or sampling[0] > 0)
        assert "other" in recipe["swaps"] or name == "alpacaeval"  # without it no verdict can say "tokens"
    assert {"cut:64", "cut:48", "cut:32"} <= set(found["math500"]["swaps"])  # the paper's


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("path", WARMUPS, ids=str)
def test_every_stage_of_a_warm_up_has_its_recipe(path, tuning, tmp_path):
    (args,) = parse((WarmupArguments,), ["--config", str(path), "--tuning", tuning])
    found = list(stages(args))
    a_phase = ["traces", "train", "merge"] if tuning == "lora" and path.parent != SMALL else ["traces", "train"]
    phases = ["train" if stage.phase in TRAINERS else stage.phase for stage in found]
    expected = args.rounds * (2 * a_phase + ["evaluate"])
    assert phases == (["traces", "init"] + expected[1:] if args.initial == "content" else expected)
    for stage in found:  # each as its own process would read it
        check_fields(stage.settings, PHASES[stage.phase].classes, stage.name)
        if stage.phase not in TRAINERS:
            (tmp_path / "stage.yaml").write_text(yaml.safe_dump(stage.settings))
            parse(PHASES[stage.phase].classes, ["--config", str(tmp_path / "stage.yaml")])
    assert found[0].settings["method"] == args.initial and accelerate_config_path(args.accelerate_config)


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("path", COMPARED, ids=str)
def test_baselines_are_compared_with_their_warm_up(path, tuning):
    """The same data, rows, recipes and evaluation; each stage's settings are fields of its phase."""
    (args,) = parse((BaselinesArguments,), ["--config", str(path), "--tuning", tuning, "--steps", "9"])
    (warm,) = parse((WarmupArguments,), ["--config", str(path.parent / "warmup.informed.yaml"), "--tuning", tuning])
    same = ("model", "data", "rounds", "rows_per_phase", "seed", "bottleneck", "distill", "evaluate", "rehearsal")
    assert all(getattr(args, name) == getattr(warm, name) for name in same)
    assert args.warmup == warm.run_dir and args.accelerate_config == warm.accelerate_config
    trained = {stage.name.split("/")[0]: stage.settings for stage in compared(args) if stage.phase == "baseline"}
    if path.parent == SMALL:
        assert trained.keys() == BASELINES.keys() - {"concise", "icot"}
    else:
        concise = read_yaml(args.concise)
        assert (concise["model"], concise["data"]) == (args.model, args.data)
        assert trained.keys() == BASELINES.keys()
        assert args.verbal_tokens == read_yaml(args.bottleneck)["max_length"]
    for name, settings in trained.items():
        check_fields(settings, PHASES["baseline"].classes, name)
        other = {key for key, value in read_yaml(args.bottleneck).items() if settings.get(key) != value}
        assert settings["baseline"] == name and other - SPEED == ({"packing"} if name == "icot" else set())
        assert settings["max_steps"] == 9


def compared(args: BaselinesArguments) -> list:
    """The stages where no model was extended yet: m_max pauses are read from its recipe."""
    names = [name for name in args.names if name != "pause"]
    found = baseline_stages(replace(args, names=names))
    recipe = read_yaml("recipes/baselines/baseline.pause.yaml")
    check_fields(recipe, PHASES["baseline"].classes, "pause")
    return [*found, replace(found[1], name="pause/train", settings=found[1].settings | recipe)]


@pytest.mark.parametrize("kind", BASELINES)
@pytest.mark.parametrize("path", [path for path in TRAINED if path.name == "bottleneck.lora.yaml"], ids=str)
def test_a_baseline_forms_its_first_batch(path, kind, stand_ins, tmp_path):
    """The recipe of phase A and the baseline's over it, as `abscot baseline` reads them."""
    checkpoint = stand_ins[base_model(path)]
    arguments = ["--config", str(path), "--config", f"recipes/baselines/baseline.{kind}.yaml", "--max_length", "256"]
    arguments += ["--output_dir", str(tmp_path), "--dtype", "float32", "--model_name_or_path", str(checkpoint)]
    _, training, model = parse(PHASES["baseline"].classes, [*arguments, "--data", "x", "--max_steps", "4", *ON_CPU])
    assert training.learning_rate == read_yaml(path)["learning_rate"] and training.baseline == kind
    ids = AbstractVocabulary.load(checkpoint).all_ids(AutoTokenizer.from_pretrained(checkpoint))
    data = rows(checkpoint, n=64, trace=False)
    trainer = BaselineTrainer(str(checkpoint), training, data, peft_config=lora_config(model, ids))
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1 and batch["input_ids"].shape[1] % 128 == 0
    packs = read_yaml(path)["packing"] and kind != "icot"
    assert (int(batch["document_ids"].max()) > 1) == packs
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    loss.backward()
    assert loss.isfinite() and any(p.grad is not None and p.grad.any() for p in trainer.model.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_the_real_shapes(name):
    model = meta_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    check_supported(model)  # full attention everywhere
    assert {base_model(path) for path in TRAINED} == set(SHAPES)


def matrices(name: str) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a layer's matrices, by arithmetic on the config alone."""
    config = SHAPES[name][1]
    hidden, head = config.hidden_size, getattr(config, "head_dim", None) or 64
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
    }
    if "granite" in name:
        wide = config.shared_intermediate_size
        return shapes | {"input_linear": (hidden, 2 * wide), "output_linear": (wide, hidden)}
    wide = config.intermediate_size
    return shapes | {"gate_proj": (hidden, wide), "up_proj": (hidden, wide), "down_proj": (wide, hidden)}


@pytest.mark.parametrize("path", [path for path in TRAINED if ".lora." in path.name], ids=str)
def test_lora_finds_its_targets_in_the_real_model(path, tmp_path):
    name, recipe = base_model(path), read_yaml(path)
    kind, config = SHAPES[name]
    config.save_pretrained(tmp_path)
    arguments = {key: value for key, value in recipe.items() if key.startswith("lora_") or key == "use_peft"}
    ids = list(range(1000, 1066))
    peft_config = lora_config(ModelConfig(model_name_or_path=str(tmp_path), **arguments), ids)
    with torch.device("meta"):
        model = get_peft_model(kind(config), peft_config)
    wrapped = [module for module, _ in model.named_modules() if module.endswith(".lora_A")]
    shapes, layers = matrices(name), config.num_hidden_layers
    for target in recipe["lora_target_modules"]:
        assert sum(module.endswith(f".{target}.lora_A") for module in wrapped) == layers, target
    assert set(recipe["lora_target_modules"]) == set(shapes)  # every matrix of a layer
    heads = 1 if config.tie_word_embeddings else 2
    expected = layers * recipe["lora_r"] * sum(map(sum, shapes.values())) + heads * 66 * config.hidden_size
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == expected
    written = re.search(r"([\d.]+)M of", (ROOT / path.parent / "README.md").read_text())
    assert float(written[1]) == round(trained / 1e6, 1)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Tiny extended checkpoints of the families, their heads tied as in the real models."""
    made = {}
    for name, (_, config) in SHAPES.items():
        made[name] = tmp_path_factory.mktemp("stand-in") / "extended"
        family = {"granitemoehybrid": "granite"}.get(config.model_type, config.model_type)
        make_checkpoint(made[name], family, tied=config.tie_word_embeddings)
    return made


@pytest.mark.parametrize("path", TRAINED, ids=str)
def test_a_phase_forms_its_first_batch(path, stand_ins, tmp_path):
    """The recipe's own fields on a tiny model of the family and toy rows; only sizes and the device are others."""
    phase, recipe, checkpoint = phase_of(path), read_yaml(path), stand_ins[base_model(path)]
    sizes = ["--max_length", "256", "--output_dir", str(tmp_path), "--dtype", "float32", "--disable_tqdm", "true"]
    arguments = [*own_arguments(path), "--model_name_or_path", str(checkpoint), *sizes, *ON_CPU]
    arguments += ["--rehearsal", "1.0"] if phase == "distill" else []
    _, training, model = parse_phase(phase, arguments)
    ids = AbstractVocabulary.load(checkpoint).all_ids(AutoTokenizer.from_pretrained(checkpoint))
    data = rows(checkpoint, n=64)
    trainer = TRAINERS[phase](str(checkpoint), training, data, peft_config=lora_config(model, ids))
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == recipe["per_device_train_batch_size"]
    assert batch["input_ids"].shape[1] % 128 == 0
    documents = len(trainer.train_dataset)
    examples = 64 * (2 if phase == "distill" else 1)
    assert documents < examples / 2 if recipe["packing"] else documents == examples
    if recipe["packing"]:
        filled = sum(len(row["input_ids"]) for row in trainer.train_dataset)
        assert filled > 0.95 * 256 * (documents - 1)  # but for the last pack, under 5 % padding
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    loss.backward()
    moved = {name for name, p in trainer.model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert loss.isfinite() and any("embed_tokens" in name for name in moved)
    tied = SHAPES[base_model(path)][1].tie_word_embeddings
    assert any("lm_head" in name for name in moved) == (not tied)  # a head of its own learns the tokens too
    assert all("lora_" in name or "token" in name for name in moved) == (".lora." in path.name)


def commands(path: Path) -> list[str]:
    """The `abscot`, `make`, `python -m` and `accelerate launch` commands that a file prints, each in one line."""
    text = (ROOT / path).read_text()
    if path.suffix == ".yaml":
        text = "\n".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    elif path.suffix == ".py":
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant | ast.JoinedStr)]
        strings = [
            getattr(node, "values", [node]) for node in nodes
        ]  # in a message VALUE stands for what is filled in
        text = "\n".join("".join(str(getattr(part, "value", "VALUE")) for part in parts) for parts in strings)
    lines = text.replace("\\\n", " ").splitlines() + re.findall(r"`([^`\n]+)`", text)
    lines = [re.sub(r"( #| {2,}\(|(?<=\w)[.,:;]$).*", "", line.strip()) for line in lines]  # alone
    begins = rf"(abscot ({'|'.join(PHASES)})|make [a-z-]+|python -m abscot_trl\.\S+|accelerate launch)( |$)"
    return list(dict.fromkeys(line for line in lines if re.match(begins, line) and re.match(COMMAND, line)))


def as_abscot(words: list[str]) -> list[str]:
    """`accelerate launch --config_file F -m abscot_trl.scripts.P ..` and the like as `abscot P ..`, no launcher."""
    for flag in ("--config_file", "--accelerate_config"):
        if flag in words:
            at = words.index(flag)
            assert accelerate_config_path(words[at + 1])
            words = words[:at] + words[at + 2 :]
    if "--num_processes" in words:
        at = words.index("--num_processes")
        assert int(words[at + 1]) > 0
        words = words[:at] + words[at + 2 :]
    if "-m" in words:
        _, module, *rest = words[words.index("-m") :]
        words = ["abscot", module.removeprefix("abscot_trl.scripts."), *rest]
    return words


HARNESS = "abscot_trl.evaluation.harness_lm_eval"
COMMAND = r".*(--|=|/)|(make|abscot) [\w-]+$"  # what begins like one and is none: "abscot data counts every row"
CODE = [path.relative_to(ROOT) for path in sorted((ROOT / "abscot_trl").rglob("*.py"))]
CARD = Path("abscot_trl/model_card.md")
SHOWN = [(path, command) for path in [*DOCUMENTS, CARD, *CODE] for command in commands(path)]
# Others are shown in part: `abscot traces ... --shard 2/8`, or in running text.
WHOLE = [
    (path, command)
    for path, command in SHOWN
    if not re.search(r"\.\.|[<|]", command)
    and (command.startswith("make ") or " -" in command or "/" in command)
    and (path not in CODE or path.parent.name == "scripts")
]


def test_commands_are_found_where_they_are_printed():
    found = {(str(path), command.split()[0]) for path, command in WHOLE}
    for name in PHASES:
        assert (f"abscot_trl/scripts/{name}.py", "accelerate" if name in TRAINING else "python") in found
    assert {("README.md", "abscot"), ("README.md", "make"), (str(CARD), "abscot")} <= found
    assert sum(command not in dict(map(reversed, WHOLE)) for _, command in SHOWN) > 20


@pytest.mark.parametrize("path, command", WHOLE, ids=[f"{path}:{command[:60]}" for path, command in WHOLE])
def test_a_command_that_is_shown_parses_as_it_stands(path, command):
    words = shlex.split(command)
    if HARNESS in words:
        from lm_eval._cli.harness import HarnessCLI  # of the development set

        with patch("sys.argv", ["lm_eval", *words[words.index(HARNESS) + 1 :]]):
            assert HarnessCLI().parse_args().model == "abscot"
        return
    if words[0] == "make":
        printed = subprocess.run(
            ["make", "--dry-run", "--no-print-directory", *words[1:]], capture_output=True, text=True
        )
        assert printed.returncode == 0, printed.stderr
        calls = [shlex.split(line) for line in printed.stdout.replace("\\\n", " ").splitlines() if "/abscot " in line]
        if not calls:
            return  # make install, make test
        words = calls[-1]
    _, phase, *arguments = as_abscot(words)
    parsed = parse_phase(phase, [*arguments, *on_cpu(phase)])
    if phase == "warmup":
        assert list(stages(parsed[0])) and accelerate_config_path(parsed[0].accelerate_config)


def test_what_is_shown_in_part_names_phases_and_their_fields():
    for path, command in SHOWN:
        words = command.split()
        if (path, command) in WHOLE or words[0] != "abscot":
            continue
        names = {"--help", "--config", "--accelerate_config"}
        for field in (field for cls in PHASES[words[1]].classes for field in fields(cls)):
            names |= {f"--{field.name}", *field.metadata.get("aliases", ())}
        assert {word for word in words if word.startswith("--")} <= names, (path, command)
