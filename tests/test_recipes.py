"""No recipe can rot: each parses, fits its model's real shape and forms its first batch; each command shown parses."""

import re
import shlex
import subprocess
from dataclasses import MISSING, fields, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_model
from peft import get_peft_model
from test_training import rows
from transformers import (
    AutoTokenizer,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl import ModelConfig

from abscot_trl.attention import check_supported
from abscot_trl.checkpoint import extend_model, save_checkpoint
from abscot_trl.cli import TRAINING, accelerate_config_path
from abscot_trl.data.toy import toy_tokenizer
from abscot_trl.errors import Refused
from abscot_trl.evaluation.alpaca import AlpacaArguments
from abscot_trl.loop.baselines import BaselinesArguments, baseline_stages
from abscot_trl.loop.plan import PlanArguments
from abscot_trl.loop.sweep import SweepArguments
from abscot_trl.loop.warmup import WarmupArguments, stages
from abscot_trl.phases import PHASES, check_fields, parse, read_yaml
from abscot_trl.report.make import ReportArguments
from abscot_trl.scripts.demo import DemoArguments
from abscot_trl.training.adapters import lora_config
from abscot_trl.training.baselines import BaselineTrainer
from abscot_trl.training.bottleneck import BottleneckSFTTrainer
from abscot_trl.training.configs import BASELINES
from abscot_trl.training.distillation import SelfDistillationTrainer
from abscot_trl.vocabulary import AbstractVocabulary

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*.yaml"))
DOCUMENTS = FILES + [path.relative_to(ROOT) for path in [ROOT / "README.md", *(ROOT / "recipes").rglob("*.md")]]
MODELS = [path for path in FILES if path.parts[1] != "demo"]
TRAINED = [path for path in MODELS if path.name.startswith(("bottleneck", "distill"))]
WARMUPS = [path for path in MODELS if path.name.startswith("warmup")]
COMPARED = [path for path in MODELS if path.name == "baselines.yaml"]
CLASSES = {name: classes for name, (_, classes) in PHASES.items()}
CLASSES |= {
    "warmup": (WarmupArguments,),
    "baselines": (BaselinesArguments,),
    "report": (ReportArguments,),
    "demo": (DemoArguments,),
}
CLASSES |= {"plan": (PlanArguments,), "sweep": (SweepArguments,), "alpaca": (AlpacaArguments,)}
TRAINERS = {"bottleneck": BottleneckSFTTrainer, "distill": SelfDistillationTrainer}
# What a recipe asks of a GPU, as a machine without one can be asked it.
ON_CPU = ["--use_cpu", "true", "--bf16", "false", "--use_liger_kernel", "false", "--attn_implementation", "sdpa"]

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
}
PARAMETERS = {
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "ibm-granite/granite-4.0-micro": 3_402_836_480,
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


def parse_as_its_phase(phase: str, arguments: list[str]) -> tuple:
    """As `abscot <phase>` parses; what is required and comes from the driver or the command line is filled in."""
    required = {
        field.name
        for cls in CLASSES[phase]
        for field in fields(cls)
        if field.init and field.default is MISSING and field.default_factory is MISSING
    }
    given = {part[2:] for part in arguments if part.startswith("--")}
    path = Path(arguments[arguments.index("--config") + 1])
    check_fields(read_yaml(path), CLASSES[phase], path)
    given |= read_yaml(path).keys()
    filled = [part for name in sorted(required - given) for part in (f"--{name}", "x")]
    return parse(CLASSES[phase], [*arguments, *filled, *(ON_CPU if phase in TRAINING else [])])


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_recipe_parses_as_its_phase_would(path):
    parsed = parse_as_its_phase(phase_of(path), ["--config", str(path)])
    if path in TRAINED:
        _, training, model = parsed
        recipe = read_yaml(path)
        assert {"learning_rate", "num_train_epochs", "global_batch_size", "bf16", "save_steps"} <= recipe.keys()
        assert training.gradient_accumulation_steps == recipe["global_batch_size"]  # one process, a row at a time
        assert model.use_peft == (".lora." in path.name) and recipe["attn_implementation"] == "flex_attention"
        assert all(recipe["global_batch_size"] % processes == 0 for processes in (1, 2, 4, 8, 16))


@pytest.mark.parametrize("folder", sorted({path.parent for path in TRAINED}), ids=str)
def test_a_folder_is_whole_and_its_numbers_agree(folder):
    names = {path.name for path in MODELS if path.parent == folder}
    forms = {"paper"} if folder.name == "production" else {"paper", "informed"}
    tunings = {"lora"} if folder.name == "production" else {"lora", "full"}
    others = set() if folder.name == "production" else {"baselines.yaml", "concise.yaml"}
    assert names == {"init.yaml", "data.yaml", "evaluate.yaml"} | others | {
        *(f"{phase}.{form}.yaml" for phase in ("traces", "warmup") for form in forms),
        *(f"{phase}.{tuning}.yaml" for phase in TRAINERS for tuning in tunings),
    }
    assert (ROOT / folder / "README.md").is_file()
    init, data = read_yaml(folder / "init.yaml"), read_yaml(folder / "data.yaml")
    assert (init["codebook_size"], init["m_max"]) == (64, 128)  # the paper's
    assert init["output_dir"] == data["tokenizer"]
    for form in forms:
        warm, traces = read_yaml(folder / f"warmup.{form}.yaml"), read_yaml(folder / f"traces.{form}.yaml")
        assert warm["rounds"] == 3 and 2 * 3 * warm["rows_per_phase"] <= data["limit"]
        assert traces["method"] == warm["initial"] and traces["given"] == warm["distill_from"]
        assert traces["temperature"] == warm["temperature"]
        assert warm["model"] == traces["model"] == init["output_dir"]
        assert warm["data"] == traces["data"] == data["output_dir"]
    for path in (path for path in TRAINED if path.parent == folder):
        assert read_yaml(path)["max_length"] == data["max_total_tokens"]  # every prepared row fits


@pytest.mark.parametrize("model", ["qwen3-4b", "qwen3-8b", "granite-4.0-micro"])
def test_forms_and_tunings_differ_where_they_should(model):
    folder = Path("recipes") / model
    for phase in TRAINERS:
        lora, full = (read_yaml(folder / f"{phase}.{tuning}.yaml") for tuning in ("lora", "full"))
        different = {key for key in lora.keys() | full.keys() if lora.get(key) != full.get(key)}
        assert {key for key in different if not key.startswith("lora_")} == {"use_peft", "learning_rate", "dtype"}
        assert (lora["dtype"], full["dtype"]) == ("bfloat16", "float32") and lora["learning_rate"] > full[
            "learning_rate"
        ]
    paper, informed = (read_yaml(folder / f"warmup.{form}.yaml") for form in ("paper", "informed"))
    different = {key for key in paper | informed if paper.get(key) != informed.get(key)}
    assert different == {"name", "run_dir", "initial", "distill_from", "rehearsal"}
    assert (paper["initial"], paper["distill_from"], paper["rehearsal"]) == ("uniform", "prompt", 0.0)


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
    evaluate = read_yaml(folder / "evaluate.yaml")
    assert (evaluate["trace_temperature"], evaluate["temperature"]) == (0.7, 0.0)


def test_the_benchmarks():
    """One recipe each, of evaluate's fields only; those that sample use Qwen3's settings for thinking off."""
    found = {path.stem: read_yaml(path) for path in FILES if path.parent.name == "benchmarks"}
    assert set(found) == {"math500", "aime24", "aime25", "gpqa_diamond", "gsm8k", "hotpotqa", "alpacaeval"}
    for name, recipe in found.items():
        assert recipe["task"] == name and {"problems", "samples", "swaps", "max_new_tokens"} <= recipe.keys()
        sampling = (recipe["temperature"], recipe.get("top_p"), recipe.get("top_k"))
        assert sampling in ((0.0, None, None), (0.7, 0.8, 20)) and (recipe["samples"] == 1 or sampling[0] > 0)
        assert "other" in recipe["swaps"] or name == "alpacaeval"  # without it no verdict can say "information"
    assert {"cut:64", "cut:48", "cut:32"} <= set(found["math500"]["swaps"])  # the paper's


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("path", WARMUPS, ids=str)
def test_every_stage_of_a_warm_up_has_its_recipe(path, tuning, tmp_path):
    (args,) = parse((WarmupArguments,), ["--config", str(path), "--tuning", tuning])
    if "production" in path.parts and tuning == "full":
        with pytest.raises(Refused, match="bottleneck.full.yaml: no such recipe"):
            list(stages(args))
        return
    found = list(stages(args))
    a_phase = ["traces", "train", "merge"] if tuning == "lora" else ["traces", "train"]
    phases = ["train" if stage.phase in TRAINERS else stage.phase for stage in found]
    assert phases == 3 * (2 * a_phase + ["evaluate"])
    for stage in found:  # each as its own process would read it
        check_fields(stage.settings, CLASSES[stage.phase], stage.name)
        if stage.phase not in TRAINERS:
            (tmp_path / "stage.yaml").write_text(yaml.safe_dump(stage.settings))
            parse(CLASSES[stage.phase], ["--config", str(tmp_path / "stage.yaml")])
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
    concise = read_yaml(args.concise)
    assert (concise["model"], concise["data"]) == (args.model, args.data)
    trained = {stage.name.split("/")[0]: stage.settings for stage in compared(args) if stage.phase == "baseline"}
    assert trained.keys() == BASELINES.keys()
    for name, settings in trained.items():
        check_fields(settings, CLASSES["baseline"], name)
        other = {key for key, value in read_yaml(args.bottleneck).items() if settings.get(key) != value}
        assert settings["baseline"] == name and other == ({"packing"} if name == "icot" else set())
        assert settings["max_steps"] == 9
    assert args.verbal_tokens == read_yaml(args.bottleneck)["max_length"]


def compared(args: BaselinesArguments) -> list:
    """The stages where no model was extended yet: m_max pauses are read from its recipe."""
    names = [name for name in args.names if name != "pause"]
    found = baseline_stages(replace(args, names=names))
    recipe = read_yaml("recipes/baselines/baseline.pause.yaml")
    check_fields(recipe, CLASSES["baseline"], "pause")
    return [*found, replace(found[1], name="pause/train", settings=found[1].settings | recipe)]


@pytest.mark.parametrize("kind", BASELINES)
@pytest.mark.parametrize("path", [path for path in TRAINED if path.name == "bottleneck.lora.yaml"], ids=str)
def test_a_baseline_forms_its_first_batch(path, kind, stand_ins, tmp_path):
    """The recipe of phase A and the baseline's over it, as `abscot baseline` reads them."""
    checkpoint = stand_ins[base_model(path)]
    arguments = ["--config", str(path), "--config", f"recipes/baselines/baseline.{kind}.yaml", "--max_length", "256"]
    arguments += ["--output_dir", str(tmp_path), "--dtype", "float32", "--model_name_or_path", str(checkpoint)]
    _, training, model = parse(CLASSES["baseline"], [*arguments, "--data", "x", "--max_steps", "4", *ON_CPU])
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
    found = {}
    for name, (_, config) in SHAPES.items():
        folder = found[name] = tmp_path_factory.mktemp("stand-in") / "extended"
        folder.mkdir()
        tokenizer, vocabulary = toy_tokenizer(), AbstractVocabulary(size=8, m_min=1, m_max=6)
        family = "granite" if "granite" in name else "qwen3"
        model = tiny_model(family, vocabulary=40, tied=config.tie_word_embeddings)
        vocabulary.extend(tokenizer)
        extend_model(model, vocabulary.all_ids(tokenizer))
        save_checkpoint(model, tokenizer, vocabulary, folder)
    return found


@pytest.mark.parametrize("path", TRAINED, ids=str)
def test_a_phase_forms_its_first_batch(path, stand_ins, tmp_path):
    """The recipe's own fields on a tiny model of the family and toy rows; only sizes and the device are others."""
    phase, recipe, checkpoint = phase_of(path), read_yaml(path), stand_ins[base_model(path)]
    sizes = ["--max_length", "256", "--output_dir", str(tmp_path), "--dtype", "float32", "--disable_tqdm", "true"]
    arguments = ["--config", str(path), "--model_name_or_path", str(checkpoint), *sizes]
    arguments += ["--rehearsal", "1.0"] if phase == "distill" else []
    _, training, model = parse_as_its_phase(phase, arguments)
    ids = AbstractVocabulary.load(checkpoint).all_ids(AutoTokenizer.from_pretrained(checkpoint))
    data = rows(checkpoint, n=64)
    trainer = TRAINERS[phase](str(checkpoint), training, data, peft_config=lora_config(model, ids))
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1 and batch["input_ids"].shape[1] % 128 == 0
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
    """The `abscot ..` and `make ..` lines of a recipe's comments, or of a document's fenced blocks, whole."""
    text = (ROOT / path).read_text()
    if path.suffix == ".yaml":
        text = "\n".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
        text = re.sub(r" {3,}\(.*", "", text)  # the hardware, after the command
    else:
        text = "\n".join(re.findall(r"```\n(.*?)```", text, re.DOTALL))
    lines = text.replace("\\\n", " ").splitlines()
    shown = [line.strip() for line in lines if re.match(r"(abscot|make) [a-z]+ .*(--|RECIPE=)", line.strip())]
    return [line for line in shown if "..." not in line.split()]


SHOWN = [(path, command) for path in DOCUMENTS if path.parts[1:2] != ("demo",) for command in commands(path)]


def test_each_recipe_shows_its_own_command():
    for path in MODELS:
        own = [command for command in commands(path) if command.startswith(f"abscot {phase_of(path)} ")]
        assert any(f"--config {path}" in command for command in own), path


@pytest.mark.parametrize("path, command", SHOWN, ids=[f"{path}:{command[:60]}" for path, command in SHOWN])
def test_a_command_that_is_shown_parses(path, command):
    if command.startswith("make"):
        printed = subprocess.run(
            ["make", "--dry-run", "--no-print-directory", *shlex.split(command.partition(" #")[0])[1:]],
            capture_output=True,
            text=True,
        )
        assert printed.returncode == 0, printed.stderr
        command = next(line for line in printed.stdout.splitlines() if "/abscot " in line)
    _, phase, *arguments = shlex.split(command, comments=True)
    if phase in TRAINING and "--accelerate_config" in arguments:
        at = arguments.index("--accelerate_config")
        accelerate_config_path(arguments[at + 1])
        del arguments[at : at + 2]
    parsed = parse(CLASSES[phase], [*arguments, *(ON_CPU if phase in TRAINING else [])])
    if phase == "warmup":
        assert list(stages(parsed[0])) and accelerate_config_path(parsed[0].accelerate_config)
