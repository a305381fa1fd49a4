"""The policy iteration end to end: on the toy task in one process, on real rows, and with a process a phase."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from abscot_trl import warmup as driver
from abscot_trl.data.dolci import iter_rows, parse_row
from abscot_trl.data.prepare import load_prepared
from abscot_trl.data.toy import chain_arithmetic
from abscot_trl.phases import parse, run_phase
from abscot_trl.scripts.demo import write_problems
from abscot_trl.vocabulary import AbstractVocabulary
from abscot_trl.warmup import WarmupArguments, collect_results, lost_rounds, stages, warmup

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
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


@pytest.fixture
def toy(checkpoint, tmp_path):
    """Prepared toy rows, problems and recipes; returns the driver's fields."""
    rows = chain_arithmetic(84, 4, 5, seed=0)
    train = write_problems(tmp_path / "train.jsonl", rows[:64])
    write_problems(tmp_path / "test.jsonl", rows[64:])
    data = str(tmp_path / "data")
    arguments = ["--data", train, "--data_format", "problems", "--tokenizer", str(checkpoint), "--output_dir", data]
    run_phase("data", arguments)
    fields = {"run_dir": str(tmp_path / "run"), "model": str(checkpoint), "data": data, "launch": "inline"}
    return fields | {"rounds": 2, "rows_per_phase": 16, "seed": 0}


def traces(path) -> list[dict]:
    return [json.loads(line) for line in (Path(path) / "traces.jsonl").read_text().splitlines()]


def test_two_rounds_with_lora(toy, tmp_path, capsys):
    fields = toy | recipes(tmp_path, str(tmp_path / "test.jsonl"), LORA)
    results = warmup(WarmupArguments(**fields))
    run = Path(fields["run_dir"])
    assert [(r["round"], r["mode"], r["swap"], r["model"], r["n"]) for r in results] == [
        (t, "abstract", swap, "informed", 20) for t in (1, 2) for swap in ("own", "random")
    ]
    assert results == json.loads((run / "results.json").read_text())
    # The parts of the data are disjoint, and each phase trains on its own.
    rows = {
        (t, phase): [r["row"] for r in traces(run / f"round{t}" / f"{phase}-traces")]
        for t in (1, 2)
        for phase in ("bottleneck", "distill")
    }
    assert sorted(row for part in rows.values() for row in part) == list(range(64))
    assert [r["row"] for r in traces(run / "round1" / "bottleneck-traces")] == rows[1, "bottleneck"]
    # Each phase starts from the merged model of the one before.
    chain = [str(toy["model"])]
    for t in (1, 2):
        for phase in ("bottleneck", "distill"):
            settings = yaml.safe_load((run / f"round{t}" / f"{phase}.yaml").read_text())
            assert settings["model_name_or_path"] == chain[-1]
            sampler = yaml.safe_load((run / f"round{t}" / f"{phase}-traces.yaml").read_text())
            assert sampler["model"] == chain[-1]
            chain.append(str(run / f"round{t}" / f"{phase}-merged"))
    weights = [AutoModelForCausalLM.from_pretrained(path).model.layers[0].self_attn.q_proj.weight for path in chain]
    assert all((a != b).any() for a, b in zip(weights, weights[1:], strict=False))
    assert AbstractVocabulary.load(chain[-1]) == AbstractVocabulary.load(chain[0])
    printed = capsys.readouterr().out
    assert "[14/14] informed round2/evaluate" in printed and "total" in printed and "| informed (round 2)" in printed


def test_recipes_differ_where_they_should(toy, tmp_path):
    fields = toy | recipes(tmp_path, "problems.jsonl")
    informed = {s.name: s.settings for s in stages(WarmupArguments(**fields))}
    paper = {
        s.name: s.settings
        for s in stages(WarmupArguments(**fields, initial="uniform", distill_from="prompt", rehearsal=0.0))
    }
    different = {
        (name, key, informed[name][key], paper[name][key])
        for name in informed
        for key in informed[name]
        if informed[name][key] != paper[name][key]
    }
    assert different == {
        ("round1/bottleneck-traces", "method", "clusters", "uniform"),
        *((f"round{t}/distill-traces", "given", "cot", "prompt") for t in (1, 2)),
        *((f"round{t}/distill", "rehearsal", 1.0, 0.0) for t in (1, 2)),
    }
    assert paper["round2/bottleneck-traces"]["method"] == "policy"
    assert paper["round2/bottleneck-traces"]["given"] == "cot"  # z ~ pi(. | x, c), section 3.2


def test_done_stages_are_skipped_and_never_mixed(toy, tmp_path, monkeypatch):
    fields = toy | recipes(tmp_path, str(tmp_path / "test.jsonl")) | {"rounds": 1}
    launched, launch = [], driver.launch

    def failing(stage, config, args):
        launched.append(stage.name)
        if stage.name == "round1/distill" and len(launched) == 4:
            Path(stage.settings["output_dir"]).mkdir()  # half written
            raise RuntimeError("killed")
        launch(stage, config, args)

    monkeypatch.setattr(driver, "launch", failing)
    with pytest.raises(RuntimeError, match="killed"):
        warmup(WarmupArguments(**fields))
    before = {p: p.read_bytes() for p in Path(fields["run_dir"]).glob("round1/bottleneck*/*.jsonl")}
    results = warmup(WarmupArguments(**fields))
    assert launched[4:] == ["round1/distill", "round1/evaluate"] and len(results) == 2
    assert before == {p: p.read_bytes() for p in before}
    warmup(WarmupArguments(**fields))
    assert len(launched) == 6
    with pytest.raises(ValueError, match=r"made with other settings \(temperature: 1.0 -> 0.5\)"):
        warmup(WarmupArguments(**fields, temperature=0.5))
    with pytest.raises(ValueError, match="seed"):
        warmup(WarmupArguments(**fields | {"seed": 7}))


def test_a_round_that_loses_is_seen():
    def row(t, accuracy, low):
        return {"round": t, "mode": "abstract", "swap": "own", "accuracy": accuracy, "ci95": [low, 100.0]}

    assert lost_rounds([row(1, 90.0, 85.0), row(2, 86.0, 80.0), row(3, 60.0, 50.0)]) == [
        "round 3 (60.0) lost to round 2 (86.0): use round 2"
    ]


def test_bad_input_is_refused_before_anything_is_written(toy, tmp_path):
    fields = toy | recipes(tmp_path, str(tmp_path / "test.jsonl"))
    (tmp_path / "bottleneck.yaml").write_text("learning_rte: 1.0e-4\n")
    with pytest.raises(ValueError, match="bottleneck.yaml: unknown key 'learning_rte'; did you mean 'learning_rate'"):
        warmup(WarmupArguments(**fields))
    (tmp_path / "bottleneck.yaml").write_text("learning_rate: 1e-4\n")
    with pytest.raises(ValueError, match="learning_rate: '1e-4' is text; write a number"):
        warmup(WarmupArguments(**fields))
    (tmp_path / "bottleneck.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="must hold a YAML mapping"):
        warmup(WarmupArguments(**fields))
    (tmp_path / "bottleneck.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="bottleneck.yaml: no such recipe"):
        warmup(WarmupArguments(**fields))
    fields |= recipes(tmp_path, str(tmp_path / "test.jsonl"))
    with pytest.raises(ValueError, match="need 120 rows, the data has 64"):
        warmup(WarmupArguments(**fields | {"rows_per_phase": 30}))
    with pytest.raises(FileNotFoundError, match="not prepared data"):
        warmup(WarmupArguments(**fields | {"data": str(tmp_path / "nothing")}))
    assert not list(Path(fields["run_dir"]).glob("round*"))
    (tmp_path / "warmup.yaml").write_text("rouns: 2\n")
    with pytest.raises(ValueError, match="warmup.yaml: unknown key 'rouns'; did you mean 'rounds'"):
        parse((WarmupArguments,), ["--config", str(tmp_path / "warmup.yaml")])


def test_a_process_a_phase(toy, tmp_path):
    """The same stages launched: accelerate for the training phases, python for the others; same traces as inline."""
    fields = toy | recipes(tmp_path, str(tmp_path / "test.jsonl")) | {"rounds": 1}
    inline = warmup(WarmupArguments(**fields))
    launched = {"run_dir": str(tmp_path / "launched"), "launch": "accelerate", "accelerate_config": "cpu"}
    assert warmup(WarmupArguments(**fields | launched)) == inline
    for name in ("bottleneck-traces", "distill-traces"):
        assert traces(tmp_path / "run" / "round1" / name) == traces(tmp_path / "launched" / "round1" / name)
    (tmp_path / "bottleneck.yaml").write_text(yaml.safe_dump(TRAINING | {"max_length": 16}))
    with pytest.raises(RuntimeError, match="stage round1/bottleneck failed with exit code 1"):
        warmup(WarmupArguments(**fields | launched | {"run_dir": str(tmp_path / "fails")}))
    assert collect_results(WarmupArguments(**fields | launched)) == inline  # what was written is still there


CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real rows are not at {REAL}")
def test_one_round_on_real_rows(tmp_path):
    """Dolci's schema with all its odd shapes, and MATH; a tiny random Qwen3; MATH-500 graded. No accuracy expected."""
    texts = [
        m["content"]
        for row in iter_rows([str(REAL / "think_sft_sample.parquet")], shuffle_buffer=0)
        for m in row["messages"]
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", *(f"<|{role}|>" for role in ("system", "user", "assistant", "tool"))]
    tokenizer.train_from_iterator(
        texts[:400],
        trainers.BpeTrainer(
            vocab_size=1500,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    base = tmp_path / "base"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", chat_template=CHAT
    ).save_pretrained(base)
    tiny_model(vocabulary=1536, max_position_embeddings=4096).save_pretrained(base)
    init = str(tmp_path / "init")
    run_phase("init", ["--base_model", str(base), "--output_dir", init, "--codebook_size", "16", "--m_max", "12"])

    for name, data, data_format in [
        ("dolci", REAL / "think_sft_sample.parquet", "dolci"),
        ("math", REAL / "math_train_4500.jsonl", "problems"),
    ]:
        output = str(tmp_path / name)
        limits = ["--max_total_tokens", "1024", "--max_prompt_tokens", "512"] + (
            ["--limit", "400"] if name == "math" else []
        )
        run_phase(
            "data",
            ["--data", str(data), "--data_format", data_format, "--tokenizer", init, "--output_dir", output, *limits],
        )
    rows, counts = load_prepared(tmp_path / "dolci")
    assert counts["rejected"] == {"empty_think": 24, "no_think": 15, "unclosed_think": 14, "empty_answer": 10}
    assert counts["rows_read"] == 651 == len(rows) + 63 + sum(counts["filtered"].values())
    parsed = {
        parse_row(r).id
        for r in iter_rows([str(REAL / "think_sft_sample.jsonl")], shuffle_buffer=0)
        if r["id"] in set(rows["id"])
    }
    assert parsed == set(rows["id"])

    evaluation = recipes(
        tmp_path,
        str(REAL / "math500_test.jsonl"),
        {"packing": True},
        max_new_tokens=16,
        modes=["verbal", "abstract"],
        instruction=True,
        task="math500",
    )
    for name in ("dolci", "math"):
        fields = {
            "run_dir": str(tmp_path / f"run-{name}"),
            "model": init,
            "data": str(tmp_path / name),
            "launch": "inline",
        }
        results = warmup(WarmupArguments(**fields, **evaluation, rounds=1, rows_per_phase=40))
        assert [(r["mode"], r["swap"], r["n"]) for r in results] == [
            ("verbal", "own", 500),
            ("abstract", "own", 500),
            ("abstract", "random", 500),
        ]
        assert all(0 <= r["accuracy"] <= 100 for r in results)
        written = traces(tmp_path / f"run-{name}" / "round1" / "bottleneck-traces")
        assert all(1 <= len(r["trace"]) <= 12 for r in written) and len(written) == 40
