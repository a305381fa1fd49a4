"""`abscot new`: the shipped recipes are what it writes, what it chooses is what the plan says, and what it refuses."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from test_recipes import SHAPES, meta_model
from tiny import tiny_model
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, MistralConfig, MistralForCausalLM

from abscot_trl.data.toy import chain_arithmetic, toy_tokenizer, write_problems
from abscot_trl.errors import Refused
from abscot_trl.loop.duration import card_of
from abscot_trl.loop.forms import Hardware, hardware_of
from abscot_trl.loop.memory import GIB, shape_of_model
from abscot_trl.loop.new import recipe_files
from abscot_trl.loop.new_rows import Rows, held_out
from abscot_trl.loop.plan import plan
from abscot_trl.phases import PHASES, check_fields, parse_phase, read_yaml, run_phase
from abscot_trl.vocabulary import AbstractVocabulary

ROOT = Path(__file__).resolve().parents[1]
DOLCI = "allenai/Dolci-Think-SFT-7B"
FITS = "of Dolci about 22 % fits at 8192, 44 % at 16384, 90 % at 24576"
SMALL = Rows(DOLCI, "dolci", "HuggingFaceH4/MATH-500", fits=FITS)
PAPER = replace(SMALL, kept=600_000, limit=600_000, row=8000, longest=16384)  # the paper's rows need the longer ones
SHIPPED = {
    "qwen3-4b": ("Qwen/Qwen3-4B", "1x80gb", SMALL),
    "qwen3-8b": ("Qwen/Qwen3-8B", "8x80gb", PAPER),
    "granite-4.0-micro": ("ibm-granite/granite-4.0-micro", "8x80gb", PAPER),
}
LLAMA_1B = LlamaConfig(
    hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
    intermediate_size=8192, vocab_size=128256, tie_word_embeddings=True, max_position_embeddings=131072,
    architectures=["LlamaForCausalLM"],
    rope_parameters={
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_what_it_writes(name):
    model, hardware, rows = SHIPPED[name]
    built = meta_model(model)
    family, shape = built.config.model_type, shape_of_model(built)
    files, _, _ = recipe_files(f"recipes/{name}", f"runs/{name}", model, family, shape, hardware_of(hardware), rows)
    there = {path.name: path.read_text() for path in (ROOT / "recipes" / name).glob("*.yaml")}
    assert files.keys() == there.keys()
    for file, text in files.items():
        assert text == there[file], file


def base_model(folder: Path, config=None, **changes) -> Path:
    """A model's config and the toy tokenizer; with weights only where there is no `config`."""
    model = config or tiny_model(vocabulary=40, **changes)
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def new(*words: str) -> str:
    return run_phase("new", list(words))


# What was chosen: tuning, accelerate configuration, rows at once, gradient checkpointing.
CHOSEN = {
    ("Qwen3-4B", "1x80gb"): ("lora", "single", 1, False),
    ("Qwen3-4B", "2x80gb"): ("full", "zero3", 1, True),
    ("Qwen3-4B", "8x80gb"): ("full", "zero3", 1, True),
    ("Llama-3.2-1B", "1x80gb"): ("full", "single", 2, False),
    ("Llama-3.2-1B", "2x80gb"): ("full", "ddp", 2, False),
    ("Llama-3.2-1B", "8x80gb"): ("full", "ddp", 2, False),
    ("granite-4.0-micro", "1x80gb"): ("lora", "single", 1, False),
    ("granite-4.0-micro", "2x80gb"): ("full", "zero3", 1, True),
    ("granite-4.0-micro", "8x80gb"): ("full", "zero3", 1, True),
}


@pytest.mark.parametrize(("model", "hardware"), CHOSEN, ids=str)
def test_a_plan_finds_that_it_fits_before_anything_is_there(model, hardware, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    configs = {name.rpartition("/")[2]: config for name, (_, config) in SHAPES.items()} | {"Llama-3.2-1B": LLAMA_1B}
    base = base_model(tmp_path / model, configs[model])
    words = ["--data", DOLCI, "--data_format", "dolci", "--hardware", hardware, "--output_dir", "recipes/mine"]
    new("--model", str(base), *words)
    warm = read_yaml("recipes/mine/warmup.informed.yaml")
    phase = read_yaml(f"recipes/mine/bottleneck.{warm['tuning']}.yaml")
    found = plan(*parse_phase("plan", ["--config", "recipes/mine/warmup.informed.yaml", "--gpu", "h100"]))
    gpus = int(hardware[0])
    assert f"; {gpus} x h100, ZeRO stage {3 if warm['accelerate_config'] == 'zero3' else 0}" in found["assumptions"][0]
    trained = [line for line in found["stages"] if line["phase"] in ("bottleneck", "distill")]
    text = Path(f"recipes/mine/bottleneck.{warm['tuning']}.yaml").read_text()
    said = float(re.search(r"gradient_checkpointing: \w+ # ([\d.]+) GiB", text)[1])
    for line in trained:
        assert line["memory"] / GIB == pytest.approx(said, rel=0.01) and said < 0.75 * 79
    assert not [w for w in found["warnings"] if "learning_rate" in w or "GiB a GPU" in w or "refused" in w]
    micro, again = phase["per_device_train_batch_size"], phase["gradient_checkpointing"]
    with capsys.disabled():
        print(f"\n| {model} | {hardware} | {warm['tuning']} | {warm['accelerate_config']} | {micro} | {again} | "
              f"{warm['backend']} | {said} |")  # fmt: skip
    assert (warm["tuning"], warm["accelerate_config"], micro, again) == CHOSEN[model, hardware]
    assert warm["backend"] == "vllm" and warm.get("engine") == ({"data_parallel_size": gpus} if gpus > 1 else None)
    assert phase["global_batch_size"] % (micro * gpus) == 0
    for path in Path("recipes/mine").glob("*.yaml"):
        check_fields(read_yaml(path), PHASES[path.name.split(".")[0]].classes, path)


def problems(folder: Path, n: int = 200) -> str:
    return write_problems(folder / "rows.jsonl", chain_arithmetic(n, 6, 5, seed=7))


def test_rows_and_problems_are_counted_measured_and_held_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = problems(tmp_path)
    with open(data, "a") as file:  # a problem twice, and two rows that are none
        file.write(Path(data).read_text().splitlines()[0] + '\n{"prompt": "x"}\n{}\n')
    said = new(
        "--model", str(base_model(tmp_path / "base")), "--data", data, "--hardware", "cpu", "--output_dir", "r/m"
    )
    train, test = (
        [json.loads(line) for line in Path(f"runs/m/{name}.jsonl").read_text().splitlines()]
        for name in ("train", "problems")
    )
    asked = {row["prompt"] for row in test}
    assert len(test) == len(asked) == 20 and not asked & {row.get("prompt") for row in train}
    assert len(asked | {row.get("prompt") for row in train} - {None, "x"}) == 200
    kept = len(train) - 2
    warm, data_recipe = read_yaml("r/m/warmup.informed.yaml"), read_yaml("r/m/data.yaml")
    assert (
        warm["rows_per_phase"] == kept // 6 * 3 and read_yaml("r/m/warmup.paper.yaml")["rows_per_phase"] == kept // 6
    )
    assert data_recipe["data"] == ["runs/m/train.jsonl"] and "20 others held out" in said
    assert read_yaml("r/m/evaluate.yaml")["problems"] == "runs/m/problems.jsonl"
    tokenizer = toy_tokenizer()
    longest = max(len(tokenizer(row["prompt"] + row["cot"] + row["answer"])["input_ids"]) for row in train[:-2])
    assert longest < data_recipe["max_total_tokens"] <= 4 * longest
    run_phase("init", ["--config", "r/m/init.yaml"])
    assert run_phase("data", ["--config", "r/m/data.yaml"])["rows_kept"] == kept >= 2 * warm["rows_per_phase"]


def test_given_problems_are_evaluated_and_no_row_is_held_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, given = problems(tmp_path), write_problems(tmp_path / "mine.jsonl", chain_arithmetic(5, 3, 5, seed=0))
    base = str(base_model(tmp_path / "base"))
    new("--model", base, "--data", data, "--problems", given, "--hardware", "cpu", "--output_dir", "recipes/m")
    assert read_yaml("recipes/m/evaluate.yaml")["problems"] == given and not Path("runs").exists()
    assert read_yaml("recipes/m/data.yaml")["data"] == [data]
    assert read_yaml("recipes/m/warmup.informed.yaml")["rows_per_phase"] == 99  # 198 are six times 33


# Rows, hardware -> rows a step, and steps of a phase: three epochs of its rows (of 1080 ten are the gauges').
FEW = {(3000, "1x24gb"): (24, 159), (1200, "1x80gb"): (24, 69), (200, "1x80gb"): (4, 69)}
FEW |= {(200, "8x80gb"): (8, 36), (200, "cpu"): (4, 69)}


@pytest.mark.parametrize(("n", "hardware"), FEW)
def test_few_rows_are_not_packed_and_make_small_steps(n, hardware, tmp_path, monkeypatch):
    """Packs of 8192 tokens would make three steps of them; steps that stay few are said by both commands."""
    monkeypatch.chdir(tmp_path)
    data, (batch, steps) = problems(tmp_path, n), FEW[n, hardware]
    base = str(base_model(tmp_path / "base", max_position_embeddings=32768))
    said = new("--model", base, "--data", data, "--hardware", hardware, "--output_dir", "recipes/m")
    phase, warm = read_yaml("recipes/m/bottleneck.full.yaml"), read_yaml("recipes/m/warmup.informed.yaml")
    assert "packing" not in phase and phase["global_batch_size"] == batch and warm["tuning"] == "full"
    assert phase.get("gauge_rows") == {1200: 10, 3000: 25}.get(n)
    run_phase("init", ["--config", "recipes/m/init.yaml"])
    words = f"which are few: more rows, a global_batch_size under {batch} (on fewer GPUs)"
    assert ("too few to say, while they train, whether" in said) == (n == 200)
    assert f" at once: {steps} steps a phase" in said and (words in said) == (steps < 50)
    for command in (None, "data"):  # by what was measured, and by the prepared rows
        if command:
            run_phase(command, ["--config", f"recipes/m/{command}.yaml"])
        found = plan(*parse_phase("plan", ["--config", "recipes/m/warmup.informed.yaml"]))
        assert {line["steps"] for line in found["stages"] if "steps" in line} == {steps}
        assert f"distill: {steps} steps, {words}" in " ".join(found["warnings"]) or steps >= 50


# Hardware -> its name in a plan, and its memory.
CARDS = [("1x80gb", "h100", 79), ("2x141gb", "h200", 139), ("1x24gb", "24 GB GPU", 23), ("cpu", "CPU", None)]


@pytest.mark.parametrize(("hardware", "card", "gib"), CARDS)
def test_the_plan_that_it_prints_is_of_a_card_of_that_memory(hardware, card, gib, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = str(base_model(tmp_path / "base"))
    said = new("--model", base, "--data", problems(tmp_path), "--hardware", hardware, "--output_dir", "recipes/m")
    (command,) = (line for line in said.splitlines() if line.startswith("abscot plan"))
    assert ("--gpu " in command) == (hardware != "cpu")  # whatever card is here
    (args,) = parse_phase("plan", shlex.split(command)[2:])
    found = plan(args)
    assert f" x {card}" in found["assumptions"][0]
    assert gib is None or card_of(args.gpu).gib == gib
    assert all(("hours" in line) == card.startswith("h") for line in found["stages"] if "steps" in line)


def test_a_plan_before_the_data_takes_the_lengths_that_were_measured(tmp_path, monkeypatch):
    """Tokens of all stages within 3 % of those of the prepared rows; those of no recipe are fifty times as many."""
    monkeypatch.chdir(tmp_path)
    words = ["--data", problems(tmp_path), "--hardware", "cpu", "--output_dir", "recipes/m"]
    new("--model", str(base_model(tmp_path / "base")), *words)
    run_phase("init", ["--config", "recipes/m/init.yaml"])

    def tokens() -> list[float]:
        (args,) = parse_phase("plan", ["--config", "recipes/m/warmup.paper.yaml"])
        return [line["tokens"] for line in plan(args)["stages"] if line.get("tokens")]

    before = tokens()
    run_phase("data", ["--config", "recipes/m/data.yaml"])
    assert len(before) > 6 and before == pytest.approx(tokens(), rel=0.03)


def test_a_tenth_is_held_out_and_500_at_most():
    rows = [{"prompt": f"{i}", "cot": "c", "answer": "a", "gold": "1"} for i in range(7000)]
    for n, held in ((12, 2), (200, 20), (7000, 500)):
        train, tested = held_out(rows[:n])
        assert len(tested) == held and len(train) == n - held


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"hardware": "one"}, "hardware 'one' is none of cpu, auto and GPUs with their memory, such as 1x80gb"),
        ({"hardware": "0x80gb"}, "hardware '0x80gb' is none of"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"problems": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"output_dir": "full"}, r"full holds files already \(notes.txt, ..\); choose another"),
        ({"output_dir": "a b"}, "letters, digits"),
        ({"data": "few.jsonl"}, r"few\.jsonl: 9 of 9 rows can be trained on as problems; 12 are needed"),
        (
            {"data_format": "dolci"},
            "0 of 200 rows .* dolci .left out: malformed 200; the first: malformed.*messages is not a non-empty",
        ),
        (
            {"hardware": "1x1gb", "model": "large"},
            "3.4B parameters and rows of 128 tokens take .* GiB with LoRA .*, one 1 GB GPU has 0",
        ),
        ({"model": "sliding"}, "cannot carry the bottleneck mask: sliding_attention"),
        ({"model": "gpt2"}, "gpt2: its sizes are not named as a Llama's are"),
        ({"model": "plain"}, "the tokenizer has no chat template; start from an instruction-tuned model"),
        ({"model": "extended"}, "already holds '<TOKEN_A>'"),
        ({"model": "nothing"}, "nothing is no folder here"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals_write_nothing(change, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base_model(tmp_path / "base")
    name = change.get("model")
    if name == "large":
        base_model(tmp_path / name, SHAPES["ibm-granite/granite-4.0-micro"][1])
    elif name == "sliding":
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = MistralConfig(vocab_size=40, num_key_value_heads=1, sliding_window=8, **sizes)
        base_model(tmp_path / name, MistralForCausalLM(config))
    elif name == "gpt2":
        base_model(tmp_path / name, GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=64, n_layer=1, n_head=2)))
    elif name in ("plain", "extended"):
        base_model(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(name)
        if name == "extended":
            AbstractVocabulary(8).extend(tokenizer)
        else:
            tokenizer.chat_template = None
            (tmp_path / name / "chat_template.jinja").unlink()
        tokenizer.save_pretrained(name)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    write_problems(tmp_path / "few.jsonl", chain_arithmetic(10, 3, 5, seed=0))
    given = {"model": "base", "data": problems(tmp_path), "hardware": "cpu", "output_dir": "recipes/mine"} | change
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Refused, match=expected):
        new(*[part for key, value in given.items() for part in (f"--{key}", value)])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_six_commands_lead_from_a_model_and_200_rows_to_a_report(tmp_path, monkeypatch):
    """On a CPU, as `abscot new` prints them; no file is edited. What they served is tests/test_serve.py's."""
    monkeypatch.chdir(tmp_path)

    def abscot(*words: str) -> str:
        log = tmp_path / f"{words[0]}.txt"
        log.unlink(missing_ok=True)
        process = forked.abscot(words, log)
        process.join()
        assert process.exitcode == 0, log.read_text()[-2000:]
        return log.read_text()

    base, data = str(ROOT / "recipes/demo/base"), problems(tmp_path)
    said = abscot("new", "--model", base, "--data", data, "--hardware", "cpu", "--output_dir", "recipes/mine")
    commands = [shlex.split(line)[1:] for line in said.splitlines() if line.startswith("abscot ")]
    assert [words[0] for words in commands] == ["init", "data", "plan", "warmup", "report", "serve"]
    commands[3] += ["--launch", "inline"]  # a process a phase: test_warmup.py's
    shown = {words[0]: abscot(*words) for words in commands[:-1]}
    assert "1 x CPU" in shown["plan"] and "66 more tokens" in shown["init"]
    assert not [line for text in shown.values() for line in text.splitlines() if "WARNING" in line]  # all is well
    warmup = commands[3]
    assert [text.count("| model ") for text in (shown["warmup"], abscot(*warmup))] == [1, 1]  # the second time: done
    assert shown["warmup"].count("compete with the whole vocabulary") == 2  # once a phase
    assert "informed: nothing can be told about its traces: n = 20 is too few" in shown["report"]
    rows = json.loads((tmp_path / "runs/mine/informed/results.json").read_text())
    assert {row["swap"] for row in rows} == {"own", "random", "shuffled", "other", "none"}
    assert {row["n"] for row in rows} == {20} and (tmp_path / "runs/mine/informed/report/report.html").is_file()
    (serve,) = parse_phase("serve", commands[-1][1:])
    assert AbstractVocabulary.load(serve.model).size == 64 and serve.engine == {"gpu_memory_utilization": 0.3}


def test_of_many_rows_some_are_drawn_and_a_recipe_takes_no_more_than_it_needs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("abscot_trl.loop.new_rows.ROWS", 2400)
    base = str(base_model(tmp_path / "base"))
    for n, phase_rows in ((2500, 1068), (3000, 1200)):  # 0.95 of 2250; half of 2400
        words = ["--data", problems(tmp_path, n), "--hardware", "cpu", "--output_dir", f"recipes/m{n}"]
        assert f"2000 of 2000 rows fit, drawn from {n - n // 10}, " in new("--model", base, *words)
        assert read_yaml(f"recipes/m{n}/warmup.informed.yaml")["rows_per_phase"] == phase_rows
        assert read_yaml(f"recipes/m{n}/data.yaml").get("limit") == (2400 if n == 3000 else None)


def test_auto_is_what_is_here(monkeypatch):
    assert hardware_of("auto") == hardware_of("cpu") or torch.cuda.is_available()
    card = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=79 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert hardware_of("auto") == Hardware(2, 79, "2 x NVIDIA H100 80GB HBM3")
    assert hardware_of("cpu").gpus == 0 and hardware_of("2X80GB") == Hardware(2, 79, "2 x 80 GB")
