"""The policy iteration end to end: on the toy task in one process, on real rows, and with a process a phase."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from warmups import LORA, Killed, recipes

from abscot_trl import storage
from abscot_trl.data import splits
from abscot_trl.data.dolci import iter_rows, parse_row
from abscot_trl.data.prepare import load_prepared
from abscot_trl.errors import Refused
from abscot_trl.evaluation.statistics import wilson_interval
from abscot_trl.loop import driver
from abscot_trl.loop.warmup import WarmupArguments, lost_rounds, stages, warmup
from abscot_trl.phases import parse, run_phase
from abscot_trl.storage import MANIFEST, input_digests, path_digest
from abscot_trl.training.resume import SEAL
from abscot_trl.vocabulary import AbstractVocabulary

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


def traces(path) -> list[dict]:
    return [json.loads(line) for line in (Path(path) / "traces.jsonl").read_text().splitlines()]


def test_the_splits_of_a_run_are_drawn_once(toy, tmp_path, monkeypatch):
    drawn, draw = [], splits.staged_splits
    monkeypatch.setattr(splits, "staged_splits", lambda *given: drawn.append(given) or draw(*given))
    warmup(WarmupArguments(**toy | recipes(tmp_path, str(tmp_path / "test.jsonl"), LORA), dry_run=True))
    assert drawn == [(64, 2, 16, 0)]


def test_a_dry_run_asks_no_hub_for_problems(toy, tmp_path, monkeypatch, capsys):
    def unreachable(*_, **__):
        raise Refused("the hub cannot be reached")

    monkeypatch.setattr("abscot_trl.loop.stages.load_problems", unreachable)
    fields = toy | recipes(tmp_path, "HuggingFaceH4/MATH-500", LORA)
    with pytest.raises(Refused, match="cannot be reached"):
        warmup(WarmupArguments(**fields))
    assert warmup(WarmupArguments(**fields, dry_run=True)) == []
    assert capsys.readouterr().out.count("to do") == 14


@pytest.mark.slow
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
    assert "[14/14] informed round2/evaluate" in printed and "total" in printed and "| informed r2 " in printed


def test_recipes_differ_where_they_should(toy, tmp_path):
    fields = toy | recipes(tmp_path, "problems.jsonl")
    informed = {s.name: s.settings for s in stages(WarmupArguments(**fields))}
    paper = {
        s.name: s.settings
        for s in stages(WarmupArguments(**fields | {"initial": "uniform", "distill_from": "prompt", "rehearsal": 0.0}))
    }
    different = {
        (name, key, informed[name][key], paper[name][key])
        for name in informed
        for key in informed[name]
        if informed[name][key] != paper[name][key]
    }
    assert different == {
        ("round1/bottleneck-traces", "method", "cycle", "uniform"),
        *((f"round{t}/distill-traces", "given", "cot", "prompt") for t in (1, 2)),
        *((f"round{t}/distill", "rehearsal", 1.0, 0.0) for t in (1, 2)),
    }
    assert paper["round2/bottleneck-traces"]["method"] == "policy"
    assert paper["round2/bottleneck-traces"]["given"] == "cot"  # z ~ pi(. | x, c), section 3.2


def test_the_backend_reaches_every_stage_that_samples_a_policy(toy, tmp_path):
    fields = toy | recipes(tmp_path, "problems.jsonl", backend="vllm") | {"launch": "accelerate"}
    engine = {"tensor_parallel_size": 2}
    found = list(stages(WarmupArguments(**fields, backend="vllm", engine=engine)))
    policy = [s.settings for s in found if s.settings.get("method") == "policy"]
    assert len(policy) == 3 and all(s["backend"] == "vllm" and s["engine"] == engine for s in policy)
    assert "backend" not in found[0].settings and found[0].settings["method"] == "cycle"
    for sizes in ({"data_parallel_size": 0}, {"tensor_parallel_size": "2"}):
        with pytest.raises(Refused, match="^engine: .*_size: .* is no number of processes"):
            WarmupArguments(**fields, backend="vllm", engine=sizes)
    with pytest.raises(ValueError, match="backend vllm hangs in a process that trains"):
        WarmupArguments(**fields | {"launch": "inline"}, backend="vllm")
    with pytest.raises(ValueError, match="evaluate.yaml: backend vllm hangs in a process that trains"):
        warmup(WarmupArguments(**fields | {"launch": "inline"}))


def test_another_engine_or_server_is_no_other_stage(toy, tmp_path, monkeypatch):
    """A server comes back on another port: what is done stays done."""
    fields = toy | recipes(tmp_path, str(tmp_path / "test.jsonl")) | {"rounds": 1}
    warmup(WarmupArguments(**fields))
    again = stages(WarmupArguments(**fields | {"launch": "accelerate"}))
    monkeypatch.setattr(driver, "launch", lambda stage, *_: pytest.fail(f"{stage.name} ran again"))
    for stage in (stage for stage in again if stage.phase == "traces"):
        stage.settings |= {"server": "http://127.0.0.1:1", "engine": {"block_size": 32}}
        recorded = json.loads((Path(stage.settings["output_dir"]) / MANIFEST).read_text())["wall_s"]
        assert driver.run_stage(stage, WarmupArguments(**fields)) == recorded
        with pytest.raises(ValueError, match="other settings"):
            driver.run_stage(replace(stage, settings=stage.settings | {"seed": -1}), WarmupArguments(**fields))


@pytest.mark.slow
def test_done_stages_are_skipped_and_never_mixed(toy, tmp_path, monkeypatch, capsys):
    fields = toy | recipes(tmp_path, str(tmp_path / "test.jsonl")) | {"rounds": 1}
    launched, launch, recorded, record = [], driver.launch, [], driver.write_record
    monkeypatch.setattr(driver, "write_record", lambda run, done: recorded.append(len(done)) or record(run, done))

    def failing(stage, config, options):
        launched.append(stage.name)
        if stage.name == "round1/distill" and len(launched) == 4:
            Path(stage.settings["output_dir"]).mkdir()  # half written
            raise RuntimeError("killed")
        launch(stage, config, options)

    monkeypatch.setattr(driver, "launch", failing)
    with pytest.raises(RuntimeError, match="killed"):
        warmup(WarmupArguments(**fields))
    before = {p: p.read_bytes() for p in Path(fields["run_dir"]).glob("round1/bottleneck*/*.jsonl")}
    capsys.readouterr()
    warmup(WarmupArguments(**fields, dry_run=True))
    notes = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert notes["round1/bottleneck"].startswith("done ") and notes["round1/evaluate"].startswith("to do ")
    assert notes["round1/distill"].startswith("begun ")
    seal = Path(fields["run_dir"]) / "round1/distill/checkpoint-5" / SEAL
    seal.parent.mkdir()
    seal.touch()
    warmup(WarmupArguments(**fields, dry_run=True))
    assert "begun, has checkpoint-5 " in capsys.readouterr().out
    shutil.rmtree(seal.parent)
    results = warmup(WarmupArguments(**fields))
    assert launched[4:] == ["round1/distill", "round1/evaluate"] and len(results) == 2
    assert before == {p: p.read_bytes() for p in before}
    warmup(WarmupArguments(**fields))
    assert len(launched) == 6 and recorded == [1, 2, 3, 3, 4, 5, 5]  # of what was done before: once
    with pytest.raises(ValueError, match=r"made with other settings \(temperature: 1.0 -> 0.5\)"):
        warmup(WarmupArguments(**fields, temperature=0.5))
    with pytest.raises(ValueError, match="seed"):
        warmup(WarmupArguments(**fields | {"seed": 7}))
    counts = Path(fields["data"]) / "counts.json"
    counts.write_text(counts.read_text() + " ")
    with pytest.raises(ValueError, match="made with other settings .other files at data"):
        warmup(WarmupArguments(**fields))


def test_two_merged_adapters_of_one_base_are_two_inputs(tmp_path):
    """Same names, sizes and heads (safetensors' header, embedding rows that LoRA leaves as they are)."""
    torch.manual_seed(0)
    frozen, digests = torch.randn(4000, 512), set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        embedding = torch.cat([frozen, torch.randn(66, 512)])
        save_file(
            {"model.embed_tokens.weight": embedding, "model.layers.0.q_proj.weight": torch.randn(512, 512)},
            tmp_path / "model.safetensors",
        )
        digests |= {path_digest(tmp_path), path_digest(tmp_path)}
    assert len(digests) == 2


def test_files_in_a_list_are_inputs_too(tmp_path):
    """`data` of the stage that prepares the rows of `abscot concise`."""
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    one, both = ({"data": [str(tmp_path / name) for name in names]} for names in ("a", "ab"))
    before = input_digests(one), input_digests(both)
    assert before[0] == input_digests({"data": one["data"][0]}) and before[0] != before[1]
    (tmp_path / "b").write_text("c")
    assert (input_digests(one), input_digests(both)) == (before[0], {"data": input_digests(both)["data"]})
    assert input_digests(both) != before[1] and input_digests({"data": ["someone/on-the-hub"]}) == {}


def test_a_run_has_one_driver_and_deletes_only_what_it_made(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "GRACE_S", 0.2)
    fields = toy | recipes(tmp_path, str(tmp_path / "test.jsonl")) | {"rounds": 1}
    run = Path(fields["run_dir"])
    mine = run / "round1" / "bottleneck-traces" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(Refused, match="not made by this run; move it away"):
        warmup(WarmupArguments(**fields))
    assert mine.read_text() == "mine"
    holder = (  # what a killed driver may leave: a process that holds the run's lock
        "import fcntl, sys, time; lock = open(sys.argv[1], 'w'); fcntl.flock(lock, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", holder, str(run / ".lock")], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(Refused, match="still at work here"):
            warmup(WarmupArguments(**fields))
        process.kill()


FOREIGN = [".notes.2024", "sub/.backup.2024-11-01.tar", "round1/.bottleneck-traces-mine/notes", "round1/.x.json.1234"]


def test_what_others_put_into_a_run_stays(toy, tmp_path, monkeypatch):
    """Hidden files with numbers in their names, folders beside a stage's, checkpoints of somebody's, other weights."""
    fields = toy | recipes(tmp_path, str(tmp_path / "test.jsonl")) | {"rounds": 1, "keep": "last", "evaluate": None}
    run, launch = Path(fields["run_dir"]), driver.launch
    foreign = [run / name for name in FOREIGN]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")

    def dying(stage, *args):
        launch(stage, *args)
        if stage.name == "round1/bottleneck-traces":
            (stage.output / "notes").write_text("mine")
            raise Killed  # before its manifest
        if stage.name == "round1/bottleneck":
            for name in ("checkpoint-best/notes", "mine.safetensors"):
                (stage.output / name).parent.mkdir(exist_ok=True)
                (stage.output / name).write_text("mine")

    monkeypatch.setattr(driver, "launch", dying)
    with pytest.raises(Killed):
        warmup(WarmupArguments(**fields))
    left = run / "round1" / f".x.json.7{storage.TEMPORARY}"  # ours, of a process that was killed
    left.write_text("half")
    half = run / "round1" / f".distill-abcd{storage.TEMPORARY}"
    half.mkdir()
    launched = []
    monkeypatch.setattr(driver, "launch", lambda stage, *args: launched.append(stage.name) or dying(stage, *args))
    warmup(WarmupArguments(**fields))
    assert launched == ["round1/bottleneck", "round1/distill-traces", "round1/distill"]  # the traces were whole
    foreign.append(run / "round1/bottleneck-traces/notes")
    foreign += [run / "round1/bottleneck" / name for name in ("checkpoint-best/notes", "mine.safetensors")]
    assert [path.read_text() for path in foreign] == ["mine"] * len(foreign)
    assert not left.exists() and not (run / "round1/bottleneck/model.safetensors").exists()  # pruned


def test_a_whole_stage_without_a_manifest_is_not_mixed_with_other_settings(toy, tmp_path, monkeypatch):
    fields = toy | recipes(tmp_path, str(tmp_path / "test.jsonl")) | {"rounds": 1, "until": "round1/bottleneck-traces"}
    write = driver.write_whole

    def dying(path, text):
        if Path(path).name == MANIFEST:
            raise Killed
        write(path, text)

    monkeypatch.setattr(driver, "write_whole", dying)
    with pytest.raises(Killed):
        warmup(WarmupArguments(**fields))
    before = traces(Path(fields["run_dir"]) / "round1" / "bottleneck-traces")
    monkeypatch.setattr(driver, "write_whole", write)
    with pytest.raises(Refused, match=r"begun with other settings \(.*temperature: 1.0 -> 0.5.*go back to them"):
        warmup(WarmupArguments(**fields, temperature=0.5))
    assert traces(Path(fields["run_dir"]) / "round1" / "bottleneck-traces") == before


def test_a_folder_that_holds_what_a_run_would_write_is_refused(toy, tmp_path):
    fields = toy | recipes(tmp_path, str(tmp_path / "test.jsonl")) | {"rounds": 1}
    Path(fields["run_dir"]).mkdir()
    for name in ("results.json", "record.md"):
        path = Path(fields["run_dir"]) / name
        path.write_text("mine")
        with pytest.raises(Refused, match=f"holds a {name} but no run"):
            warmup(WarmupArguments(**fields))
        assert path.read_text() == "mine"
        path.unlink()


def test_a_phase_by_hand_has_its_folder_alone(toy, tmp_path, monkeypatch):
    """Two `abscot bottleneck`, or an orphan of a driver: the second is refused, by hand and by a driver."""
    monkeypatch.setattr(storage, "GRACE_S", 0.2)
    fields = toy | recipes(tmp_path, str(tmp_path / "test.jsonl")) | {"rounds": 1}
    warmup(WarmupArguments(**fields, until="round1/bottleneck"))
    run = Path(fields["run_dir"]) / "round1"
    settings = yaml.safe_load((run / "bottleneck.yaml").read_text())
    for phase, name in [("bottleneck", "a"), ("evaluate", "b"), ("traces", "c")]:
        output = tmp_path / name
        if phase == "bottleneck":
            (tmp_path / "by-hand.yaml").write_text(yaml.safe_dump(settings | {"output_dir": str(output)}))
        elif phase == "evaluate":
            recipe = yaml.safe_load((tmp_path / "evaluate.yaml").read_text())
            recipe |= {"model": str(run / "bottleneck"), "output_dir": str(output)}
            (tmp_path / "by-hand.yaml").write_text(yaml.safe_dump(recipe))
        else:
            recipe = {"model": str(run / "bottleneck"), "data": toy["data"], "output_dir": str(output)}
            (tmp_path / "by-hand.yaml").write_text(yaml.safe_dump(recipe))
        with storage.at_work(output), pytest.raises(Refused, match=f"{name}: another process is still at work here"):
            run_phase(phase, ["--config", str(tmp_path / "by-hand.yaml")])
        assert not output.exists()
    with storage.at_work(run / "distill-traces"), pytest.raises(Refused, match="traces: another process is still"):
        warmup(WarmupArguments(**fields))


def test_one_server_cannot_serve_all_rounds(toy, tmp_path):
    """Refused before anything is written: it would sample all rounds from what it happens to serve."""
    server = {"backend": "server", "server": "http://127.0.0.1:1"}
    fields = toy | recipes(tmp_path, str(tmp_path / "test.jsonl"))
    with pytest.raises(Refused, match="backend: server asks one URL, which serves one model"):
        warmup(WarmupArguments(**fields, **server))
    with pytest.raises(Refused, match="backend: server asks one URL"):
        warmup(WarmupArguments(**fields | {"rounds": 1, "evaluate": None}, **server))
    fields |= recipes(tmp_path, str(tmp_path / "test.jsonl"), **server)
    with pytest.raises(Refused, match="backend: server asks one URL"):
        warmup(WarmupArguments(**fields))
    assert not Path(fields["run_dir"]).exists()


def test_a_trained_model_is_not_overwritten(toy, tmp_path):
    fields = toy | recipes(tmp_path, str(tmp_path / "test.jsonl")) | {"rounds": 1, "evaluate": None}
    warmup(WarmupArguments(**fields))
    stage = Path(fields["run_dir"]) / "round1" / "distill"
    before = (stage / "model.safetensors").read_bytes()
    with pytest.raises(Refused, match="holds a trained model"):
        run_phase("distill", ["--config", str(stage.with_name("distill.yaml"))])
    assert (stage / "model.safetensors").read_bytes() == before


def test_a_round_that_loses_is_seen(tmp_path):
    """By the same problems: a loss of 15 in 200 that unpaired intervals would not see, and as many won as lost."""
    fields = {"run_dir": str(tmp_path), "model": "m", "data": "d", "bottleneck": "b", "distill": "d", "rounds": 4}

    def answers(t: int, right: list[int]) -> None:
        folder = tmp_path / f"round{t}" / "evaluate"
        folder.mkdir(parents=True)
        lines = [
            {"mode": "abstract", "swap": swap, "id": str(i), "score": float(i in right and swap == "own")}
            for i in range(200)
            for swap in ("own", "random")
        ]
        (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    answers(1, list(range(100)))
    answers(2, list(range(15, 115)))  # 15 lost, 15 others won
    assert lost_rounds(WarmupArguments(**fields)) == []
    answers(3, list(range(30, 115)))  # 15 lost
    answers(4, list(range(31, 115)))  # 1 lost
    (sentence,) = lost_rounds(WarmupArguments(**fields))
    assert sentence.startswith("round 3 (42.5) lost to round 2 (50.0): -7.5 points, 95 % interval -11")
    assert sentence.endswith("; use round 2") and wilson_interval(85, 200)[1] > wilson_interval(100, 200)[0]


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
    with pytest.raises(Refused, match="bottleneck.yaml: no such recipe"):
        warmup(WarmupArguments(**fields))
    fields |= recipes(tmp_path, str(tmp_path / "test.jsonl"))
    for key, value, words in [
        ("initial", "unifrom", "'unifrom' is not one of uniform, cycle"),
        ("rounds", 1.5, "rounds: 1.5 does not fit; int is wanted"),
        ("data", ["a"], "does not fit; str is wanted"),
        ("accelerate_config", 3, "does not fit"),
    ]:
        (tmp_path / "warmup.yaml").write_text(yaml.safe_dump({key: value}))
        with pytest.raises(ValueError, match=words):
            parse((WarmupArguments,), ["--config", str(tmp_path / "warmup.yaml")])
    (tmp_path / "warmup.yaml").write_text("rounds: 1\nrounds: 2\n")
    with pytest.raises(ValueError, match="'rounds' stands twice"):
        parse((WarmupArguments,), ["--config", str(tmp_path / "warmup.yaml")])
    with pytest.raises(ValueError, match="--config needs a file"):
        parse((WarmupArguments,), ["--config"])
    with pytest.raises(Refused, match="'sinlge' is neither a file"):
        warmup(WarmupArguments(**fields, accelerate_config="sinlge"))
    wrong = fields | recipes(tmp_path, str(tmp_path / "none.jsonl"))
    with pytest.raises((FileNotFoundError, ValueError), match="none.jsonl"):
        warmup(WarmupArguments(**wrong))
    wrong = fields | recipes(tmp_path, str(tmp_path / "test.jsonl"), swaps=["owm"])
    with pytest.raises(ValueError, match="evaluate.yaml.*swap 'owm'"):
        warmup(WarmupArguments(**wrong))
    recipes(tmp_path, str(tmp_path / "test.jsonl"))
    with pytest.raises(ValueError, match="need 120 rows, the data has 64"):
        warmup(WarmupArguments(**fields | {"rows_per_phase": 30}, dry_run=True))
    with pytest.raises(ValueError, match="must be finite"):
        WarmupArguments(**fields | {"temperature": float("nan")})
    for name in ("bottleneck", "distill", "evaluate"):
        with pytest.raises(Refused, match=f"{name} names no recipe"):
            WarmupArguments(**fields | {name: ""})
    for name, text in {"counts.json": "{}", "state.json": "{", "dataset_info.json": '{"features": "x"}'}.items():
        damaged = shutil.copytree(fields["data"], tmp_path / f"damaged-{name}")
        (damaged / name).write_text(text)
        with pytest.raises(ValueError, match=f"{damaged}.* is damaged .*prepare the data again"):
            warmup(WarmupArguments(**fields | {"data": str(damaged)}))
    with pytest.raises(Refused, match="not prepared data"):
        warmup(WarmupArguments(**fields | {"data": str(tmp_path / "nothing")}))
    assert not list(Path(fields["run_dir"]).glob("round*"))
    (tmp_path / "warmup.yaml").write_text("rouns: 2\n")
    with pytest.raises(ValueError, match="warmup.yaml: unknown key 'rouns'; did you mean 'rounds'"):
        parse((WarmupArguments,), ["--config", str(tmp_path / "warmup.yaml")])


@pytest.mark.slow
def test_a_process_a_phase(toy, tmp_path):
    """Phase B and the evaluation launched, as inline. (Phase A: test_kill.py; one that fails: test_launch.py.)"""
    fields = toy | recipes(tmp_path, str(tmp_path / "test.jsonl")) | {"rounds": 1}
    inline = warmup(WarmupArguments(**fields))
    fields |= {"run_dir": str(tmp_path / "launched")}
    warmup(WarmupArguments(**fields, until="round1/bottleneck"))
    assert warmup(WarmupArguments(**fields | {"launch": "accelerate", "accelerate_config": "cpu"})) == inline
    for name in ("bottleneck-traces", "distill-traces"):
        assert traces(tmp_path / "run" / "round1" / name) == traces(tmp_path / "launched" / "round1" / name)


CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.slow
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
            ["--limit", "100"] if name == "math" else []
        )
        run_phase(
            "data",
            ["--data", str(data), "--data_format", data_format, "--tokenizer", init, "--output_dir", output, *limits],
        )
    rows, counts = load_prepared(tmp_path / "dolci")
    assert counts["rejected"] == {"empty_think": 24, "no_think": 15, "unclosed_think": 14, "empty_answer": 10}
    assert counts["rows_read"] == 651 == len(rows) + 63 + sum(counts["filtered"].values())
    ids = set(rows["id"])
    given = iter_rows([str(REAL / "think_sft_sample.jsonl")], shuffle_buffer=0)
    assert {parse_row(r).id for r in given if r["id"] in ids} == ids

    evaluation = recipes(
        tmp_path,
        str(REAL / "math500_test.jsonl"),
        {"packing": True},
        max_new_tokens=16,
        modes=["verbal", "abstract"],
        instruction=True,
        task="math500",
        limit=30,  # all 500 are graded in test_grading.py
    )
    for name in ("dolci", "math"):
        fields = {
            "run_dir": str(tmp_path / f"run-{name}"),
            "model": init,
            "data": str(tmp_path / name),
            "launch": "inline",
        }
        results = warmup(WarmupArguments(**fields, **evaluation, rounds=1, rows_per_phase=20))
        assert [(r["mode"], r["swap"], r["n"]) for r in results] == [
            ("verbal", "own", 30),
            ("abstract", "own", 30),
            ("abstract", "random", 30),
        ]
        assert all(0 <= r["accuracy"] <= 100 for r in results)
        written = traces(tmp_path / f"run-{name}" / "round1" / "bottleneck-traces")
        assert all(1 <= len(r["trace"]) <= 12 for r in written) and len(written) == 20
