"""The command line, as a user meets it: help, mistakes, exit codes, what is left of errors that are not the user's."""

import dataclasses
import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import tiny_model
from torch.distributed.elastic.multiprocessing.api import SignalException
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import ModelConfig

from abscot_trl import cli
from abscot_trl.data.toy import chain_arithmetic, toy_tokenizer, write_problems
from abscot_trl.errors import Refused, save_error
from abscot_trl.phases import PHASES, check_fields, parse_phase, read_yaml, run_phase
from abscot_trl.training.adapters import lora_config

ROOT = Path(__file__).resolve().parents[1]


def abscot(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "abscot_trl.cli", *arguments], capture_output=True, text=True, cwd=ROOT
    )


@pytest.fixture
def run(monkeypatch, capsys):
    """`abscot <phase> ..` in this process; returns what it exits with: a code, or the line it says."""
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)

    def call(phase: str, *arguments) -> int | str | None:
        monkeypatch.setattr(sys, "argv", ["abscot", phase, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        capsys.readouterr()
        return exit.value.code

    before = dict(os.environ)
    yield call
    unset_hf_deepspeed_config()  # this and the environment are set by TrainingArguments
    os.environ.clear()
    os.environ.update(before)


def test_every_phase_has_a_script_and_help(capsys):
    scripts = {path.stem for path in (ROOT / "abscot_trl" / "scripts").glob("*.py")} - {"__init__"}
    assert scripts == set(PHASES)
    for name, phase in PHASES.items():
        with pytest.raises(SystemExit) as exit:
            parse_phase(name, ["--help"])
        assert exit.value.code == 0 and callable(cli.resolve_name(phase.function))
        assert phase.show is None or callable(cli.resolve_name(phase.show))
        shown = capsys.readouterr().out
        listed = re.findall(r"^  (?:-\w, )?--(\w+)", shown, flags=re.MULTILINE)
        fields = [field for cls in phase.classes for field in dataclasses.fields(cls) if field.init]
        needed = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
        assert listed[: 2 + len(needed)] == ["help", "config", *needed] and {f.name for f in fields} <= {*listed}, name
    with pytest.raises(SystemExit):
        parse_phase("push", ["--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "--private [PRIVATE] Only you may see it; false: everybody may. (default: True)" in words
    assert "--no_private, --no-private The same as --private false. --yes" in words
    shown = abscot("--help")
    assert shown.returncode == 0 and all(phase.sentence in shown.stdout for phase in PHASES.values())
    assert abscot().returncode == 2
    unknown = abscot("tarces")
    assert unknown.returncode == 1 and unknown.stderr.splitlines() == [
        f"abscot: no phase 'tarces'; one of {', '.join(PHASES)}"
    ]


@pytest.mark.slow
def test_a_training_process_imports_no_server_plots_or_sklearn():
    """Nor is torch imported for `abscot --help`."""
    code = """
import sys
import abscot_trl.cli
assert not {"torch", "trl", "transformers", "pydantic"} & sys.modules.keys()
sys.modules |= dict.fromkeys(("fastapi", "uvicorn", "matplotlib", "sklearn", "vllm", "math_verify"))
import abscot_trl.training.phase
from abscot_trl.phases import parse_phase
parse_phase("bottleneck", sys.argv[1:])
assert not any(name.startswith(("abscot_trl.serving", "abscot_trl.report", "abscot_trl.loop")) for name in sys.modules)
"""
    fields = ["--data", "d", "--traces", "t", "--model_name_or_path", "m", "--output_dir", "o", "--use_cpu", "true"]
    done = subprocess.run([sys.executable, "-c", code, *fields], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def prepared(checkpoint, tmp_path_factory):
    """A folder with prepared data, traces and damaged copies of a checkpoint."""
    folder = tmp_path_factory.mktemp("prepared")
    rows = write_problems(folder / "train.jsonl", chain_arithmetic(40, 3, 5, seed=0))
    fields = ["--data_format", "problems", "--tokenizer", str(checkpoint), "--shuffle_buffer", "0"]
    run_phase("data", ["--data", rows, "--output_dir", str(folder / "data"), *fields])
    fields = ["--model", str(checkpoint), "--data", str(folder / "data"), "--method", "uniform"]
    run_phase("traces", [*fields, "--output_dir", str(folder / "traces")])
    damage = {
        "cut-weights": ("model.safetensors", lambda content: content[:1000]),
        "no-header": ("model.safetensors", lambda content: b"\xff" * 64),
        "no-config": ("config.json", lambda content: content[:50]),
        "bad-width": ("config.json", lambda content: content.replace(b'"hidden_size": 64', b'"hidden_size": 32')),
        "bad-activation": ("config.json", lambda content: content.replace(b'"silu"', b'"nonsense"')),
        "bad-heads": ("config.json", lambda content: content.replace(b'heads": 2', b'heads": "two"')),
        "other-config": ("config.json", lambda content: b'{"model_type": "notamodel"}'),
        "list-config": ("config.json", lambda content: b"[1, 2]"),
        "cut-tokenizer": ("tokenizer.json", lambda content: content[:100]),
        "no-tokenizer": ("tokenizer.json", lambda content: b"{}"),
        "bad-generation": ("generation_config.json", lambda content: b"{"),
    }
    tiny_model(vocabulary=40).save_pretrained(folder / "base")
    toy_tokenizer().save_pretrained(folder / "base")
    for source, models in ((checkpoint, folder / "extended"), (folder / "base", folder / "bases")):
        for name, (file, change) in damage.items():
            shutil.copytree(source, models / name)
            (models / name / file).write_bytes(change((models / name / file).read_bytes()))
        shutil.copytree(source, models / "no-weights")
        (models / "no-weights" / "model.safetensors").unlink()
        shutil.copytree(source, models / "no-template")
        (models / "no-template" / "chat_template.jinja").unlink()
        (models / "empty").mkdir()
        (models / "file").write_text("x")
    return folder


MODELS = ["nothere", "no/such-model", "empty", "file", "cut-weights", "no-header", "no-config", "other-config"]
MODELS += ["list-config", "cut-tokenizer", "no-tokenizer", "no-weights", "no-template", "bad-generation"]
MODELS += ["bad-width", "bad-activation", "bad-heads"]
COMMANDS = {
    "init": "init --base_model {model} --output_dir {out}",
    "data": "data --data {here}/train.jsonl --data_format problems --tokenizer {model} --output_dir {out}",
    "traces": "traces --model {model} --data {here}/data --output_dir {out}",
    "bottleneck": "bottleneck --model_name_or_path {model} --data {here}/data --traces {here}/traces "
    "--output_dir {out} --use_cpu true --bf16 false --max_length 128 --max_steps 1 --report_to none",
    "evaluate": "evaluate --model {model} --problems {here}/train.jsonl --output_dir {out} --modes verbal --limit 2 "
    "--max_new_tokens 8",
    "concise": "concise --model {model} --data {here}/data --output_dir {out}",
}
# A model's tokenizer or weights that a phase does not read cannot be wrong there.
UNREAD = {("data", name) for name in ("cut-weights", "no-header", "no-weights", "bad-generation", "no-config")}
UNREAD |= {("data", "other-config"), ("data", "list-config"), ("data", "bad-width"), ("data", "bad-activation")}


@pytest.mark.parametrize("phase", COMMANDS)
def test_a_model_that_cannot_be_read_is_one_line(phase, prepared, tmp_path, run, monkeypatch):
    monkeypatch.chdir(prepared / ("bases" if phase == "init" else "extended"))
    for model in (model for model in MODELS if (phase, model) not in UNREAD):
        out = tmp_path / model.replace("/", "-")
        code = run(*COMMANDS[phase].format(model=model, here=prepared, out=out).split())
        said = f"{phase} of {model}: {code}"
        assert isinstance(code, str) and code.startswith(f"abscot {phase}: ") and "traceback" not in code, said
        assert model in code and "\n" not in code and len(code) < 600, said
        assert not list(tmp_path.rglob("*.error.txt")), said


MISTAKES = [
    # arguments, with {here} the prepared folder and {out} a new one; what is said
    ("init --base_model {here}/base --output_dir {here}/file/x", "file, not a folder"),
    ("init --base_model {here}/base --output_dir {long}", "no name of a folder"),
    ("init --base_model {here}/base --output_dir /dev/null/x", "/dev/null is a file, not a folder"),
    ("init --base_model {here}/base --output_dir {out} --dtype float99", "float99"),
    ("init --base_model {here}/base --output_dir {out} --m_min 9 --m_max 8", "0 <= m_min <= m_max"),
    (
        "init --base_model {here}/base --output_dir {out} --codebok_size 8",
        "unknown '--codebok_size'; did you mean '--codebook_size'?",
    ),
    ("init --base_model {here}/base --output_dir {out} --codebook_size many", "invalid int value: 'many'"),
    ("init --config {here}/file --output_dir {out}", "must hold a YAML mapping"),
    ("init --config {here}", "no such recipe"),
    ("init --config", "--config needs a file"),
    ("report", "required: --runs"),
    ("report {out}", "{out}"),
    ("report {out} --runs {out}", "named in two places"),
    ("merge --adapter {ok} --output_dir {out}", "no adapter_config.json"),
    ("merge --adapter {here}/adapter --output_dir {out}", "adapter"),
    ("traces --model {ok} --data {here}/data --output_dir {out} --dtype float99", "float99"),
    ("traces --model {ok} --data {here}/file --output_dir {out}", "not prepared data"),
    ("traces --model {ok} --data {here}/data --output_dir {out} --splits {here}/file --part 1.bottleneck", "file"),
    ("evaluate --model {ok} --problems {here}/bad.parquet --output_dir {out}", "bad.parquet"),
    ("evaluate --model {ok} --problems {here}/bad.jsonl --output_dir {out}", "bad.jsonl"),
    ("evaluate --model {ok} --problems {here}/empty --output_dir {out}", "empty"),
    ("evaluate --model {ok} --problems no/such-problems --output_dir {out}", "no/such-problems"),
    ("evaluate --model {ok} --problems {here}/train.jsonl --output_dir {out} --dtype float99 --swaps own", "float99"),
    ("evaluate --model {here}/bad-template --problems {here}/train.jsonl --output_dir {out}", "chat template"),
    ("data --data no/such-data --tokenizer {ok} --output_dir {out}", "no/such-data"),
    ("data --data {here}/latin.jsonl --tokenizer {ok} --output_dir {out} --num_proc 2", "latin.jsonl"),
    ("{train} --traces {here}/data", "traces.jsonl is missing"),
    ("{train} --attn_implementation flash_attention_2", "flash_attention_2"),
    ("{train} --attn_implementation nonsense", "nonsense"),
    ("{train} --attn_implementation flex_attention", "take sdpa on CPU"),
    ("{train} --dtype float99", "float99"),
    ("{train} --chat_template_path /nothere", "/nothere"),
    ("{train} --eos_token nonsense", "nonsense"),
    ("{train} --optim_args zzz", "zzz"),
    ('{train} --lr_scheduler_kwargs {{"a":1}}', "unexpected keyword argument 'a'"),
    ("{train} --learning_rate -1", "Invalid learning rate: -1.0"),
    ("{train} --adam_beta1 2", "Invalid beta parameter"),
    ("{train} --per_device_train_batch_size 0", "per_device_train_batch_size must be at least 1, got 0"),
    ("{train} --gradient_accumulation_steps 0", "gradient_accumulation_steps"),
    ("{train} --dataloader_num_workers -1", "dataloader_num_workers must be at least 0, got -1"),
    (
        "plan --config {root}/recipes/demo/warmup.paper.yaml --run_dir r --data d --model {here}/extended/bad-heads",
        "bad-heads",
    ),
    ("{train} --optim nonsense", "nonsense"),
    ("{train} --optim adamw_bnb_8bit", "bitsandbytes"),
    ("{train} --lr_scheduler_type nonsense", "nonsense"),
    ("{train} --report_to wandb", "wandb"),
    ("{train} --report_to nonsense", "nonsense"),
    ("{train} --save_strategy sometimes", "sometimes"),
    ("{train} --use_liger_kernel true", "iger"),
    ("{train} --deepspeed {here}/nothere.json", "nothere.json"),
    ("{train} --deepspeed {here}/file", "Expecting value: line 1 column 1 (char 0) in 'x'"),
    ("{train} --fsdp full_shard", "fsdp"),
    ("{train} --accelerator_config {here}/nothere.json", "nothere.json"),
    ("{train} --gradient_checkpointing_kwargs [", "gradient_checkpointing_kwargs"),
    ("{train} --learning_rate fast", "invalid float value: 'fast'"),
    ("{train} --load_in_4bit true --use_peft true", "load_in_4bit has no effect here"),
    ("{train} --use_peft true --lora_target_modules nonsense", "nonsense"),
    ("{train} --use_peft true --lora_r 0", "r"),
    ("{train} --output_dir {here}/file", "file, not a folder"),
    ("{train} --accelerate_config zero4", "'zero4' is neither a file nor one of"),
    ("{train} --accelerate_config", "--accelerate_config: expected one argument"),
    ("{train} --accelerate_config single --num_processes 2", "num_processes is 2, but accelerate starts one"),
    ("{train} --accelerate_config cpu --num_processes 2", "take ddp, which starts them on a machine without GPUs too"),
    ("{train} --accelerate_config ddp --num_processes 0", "num_processes must be at least 1, got 0"),
    ("{train} --accelerate_config ddp --num_processes two", "invalid int value: 'two'"),
    ("{train} --accelerate_config zero3_multinode --num_processes 3", "3 is no multiple of num_machines 2"),
    ("{train} --num_processes 2", "--num_processes goes with --accelerate_config"),
    ("plan {warmup} --num_processes 2", "num_processes 2 goes with an accelerate_config"),
    ("plan {warmup} --accelerate_config single --num_processes 2 --launch accelerate", "but accelerate starts one"),
    ("plan {warmup} --gpu b200", "gpu 'b200' is none of a100, "),
    ("plan {warmup} --gpu 0gb", "gpu '0gb' is none of a100, "),
    ("plan {warmup} --accelerate_config ddp --num_processes 2", "and launch: accelerate"),
    ("plan {warmup} --accelerate_config ddp --num_processes 2 --gpus 2", "gpus and num_processes"),
    ("serve --model {here}/nothere", "nothere"),
]


@pytest.fixture(scope="module")
def mistaken(prepared):
    """What the mistakes below name."""
    (prepared / "file").write_text("x")
    (prepared / "empty").mkdir()
    shutil.copytree(prepared / "extended" / "no-template", prepared / "bad-template")
    (prepared / "bad-template" / "chat_template.jinja").write_text("{% if %}")
    (prepared / "bad.parquet").write_bytes(b"PAR1" + b"\0" * 40)
    (prepared / "bad.jsonl").write_text('{"prompt": "2+2?", "cot": \n')
    (prepared / "latin.jsonl").write_bytes('{"prompt": "é", "cot": "c", "answer": "a", "gold": "4"}'.encode("latin-1"))
    (prepared / "adapter").mkdir()
    (prepared / "adapter" / "adapter_config.json").write_text("{")
    return prepared


@pytest.mark.parametrize("command, words", MISTAKES, ids=[command for command, _ in MISTAKES])
def test_a_mistake_is_one_line(command, words, mistaken, checkpoint, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    train = COMMANDS["bottleneck"].format(model=checkpoint, here=mistaken, out=out)
    values = {"root": ROOT, "here": mistaken, "ok": checkpoint, "out": out, "long": tmp_path / ("n" * 300)}
    values["warmup"] = f"--config {ROOT}/recipes/demo/warmup.paper.yaml --run_dir r --data d --model {checkpoint}"
    before = {path: path.read_bytes() for path in mistaken.rglob("*") if path.is_file()}
    code = run(*command.format(train=train, **values).split())
    assert isinstance(code, str) and code.startswith(
        f"abscot {command.format(train='bottleneck', **values).split()[0]}: "
    )
    assert words.format(**values) in code and "\n" not in code and "traceback" not in code, code
    assert not list(tmp_path.rglob("*.error*.txt"))
    assert {path: path.read_bytes() for path in mistaken.rglob("*") if path.is_file()} == before


@pytest.mark.slow  # trl's client imports vLLM
def test_a_server_that_is_not_there_is_one_line(prepared, checkpoint, tmp_path, run):
    arguments = ["--model", checkpoint, "--data", prepared / "data", "--output_dir", tmp_path / "out"]
    code = run("traces", *arguments, "--backend", "server", "--server", "http://127.0.0.1:9")
    assert code.startswith("abscot traces: no vLLM server answers at http://127.0.0.1:9 (")
    assert not list(tmp_path.glob("*.txt"))


def test_another_error_shows_its_traceback_and_leaves_it_beside_the_run(tmp_path, monkeypatch, capsys, run):
    """As an error hours in would; nothing that is there is overwritten."""

    def fail(args):
        raise RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr("abscot_trl.checkpoint.init_checkpoint", fail)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["abscot", "init", "--base_model", "m", "--output_dir", str(tmp_path / "out")])
    foreign = tmp_path / "out.error.txt"
    foreign.write_text("mine")
    with pytest.raises(SystemExit) as exit:
        cli.main()
    kept = tmp_path / "out.error2.txt"
    assert exit.value.code == (
        f"abscot init: RuntimeError: CUDA out of memory. Tried to allocate 2 GiB (traceback: {kept})"
    )
    assert "in fail\n" in capsys.readouterr().err and foreign.read_text() == "mine"
    text = kept.read_text()
    assert text.rstrip().endswith("Tried to allocate 2 GiB") and "in fail\n" in text and "--base_model m" in text
    assert {path.name for path in tmp_path.iterdir()} == {"out.error.txt", "out.error2.txt"}
    monkeypatch.setattr(cli, "save_error", lambda *_: os.stat(tmp_path / "gone"))  # where nothing can be written
    words = "Tried to allocate 2 GiB (the traceback could not be left beside "
    assert words in run("init", "--base_model", "m", "--output_dir", tmp_path / "out")


def test_each_rank_leaves_an_error_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert save_error(tmp_path / "deep" / "out", f"of {rank}").name == f"out.rank{rank}.error.txt"
    assert (tmp_path / "deep" / "out.rank1.error.txt").read_text().endswith("of 1")
    monkeypatch.chdir(tmp_path / "deep")
    assert save_error(".", "x") == tmp_path / "deep.rank1.error.txt"


def test_refused_by_the_machine_or_the_user(tmp_path, monkeypatch, run):
    """A full disk and missing rights are one line; Ctrl-C none; ABSCOT_TRACEBACK=1 shows where a mistake arose."""
    errors = [OSError(errno.ENOSPC, "No space left on device", "x/y"), PermissionError(errno.EACCES, "no", "x/y")]
    errors += [KeyboardInterrupt(), Refused("a\nb")]
    monkeypatch.setattr("abscot_trl.checkpoint.init_checkpoint", lambda args: (_ for _ in ()).throw(errors.pop(0)))
    arguments = ["init", "--base_model", "m", "--output_dir", tmp_path / "out"]
    assert run(*arguments).startswith("abscot init: x/y: No space left on device;")
    assert run(*arguments).startswith("abscot init: x/y: no;")
    assert run(*arguments) == 130
    assert run(*arguments) == "abscot init: a b"
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("ABSCOT_TRACEBACK", "1")
    errors.append(Refused("c"))
    with pytest.raises(Refused, match="c"):
        monkeypatch.setattr(sys, "argv", ["abscot", *map(str, arguments)])
        cli.main()


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    def pressed(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    monkeypatch.setattr("abscot_trl.loop.warmup.warmup", pressed)
    recipe = ROOT / "recipes/qwen3-4b/warmup.informed.yaml"
    monkeypatch.setattr(sys, "argv", ["abscot", "warmup", "--config", str(recipe), "--run_dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="130"):
        cli.main()
    said = f"abscot warmup: stopped; the same command goes on from where it was, in {tmp_path / 'run'}\n"
    assert capsys.readouterr().err == said


def test_a_launcher_that_is_told_to_stop_shows_no_traceback(monkeypatch, run):
    launched = [KeyboardInterrupt(), SignalException("told to stop", 15)]
    monkeypatch.setattr("accelerate.commands.launch.main", lambda: (_ for _ in ()).throw(launched.pop(0)))
    assert [run("distill", "--accelerate_config", "cpu") for _ in range(2)] == [130, 143]


@pytest.mark.parametrize("name", ["train.jsonl", "notes.txt"])
def test_a_demo_overwrites_nothing(name, tmp_path, run):
    (tmp_path / name).write_text("mine")
    code = run("demo", "--config", ROOT / "recipes/demo/demo.yaml", "--output_dir", tmp_path)
    assert code == f"abscot demo: {tmp_path} is not empty ({name}); choose another output_dir or remove it"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_make_demo_removes_its_own_folder_only():
    def printed(*arguments: str) -> str:
        command = ["make", "--dry-run", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout

    for target in ("demo", "demo-baselines"):
        assert f"rm -rf runs/{target}\n" in printed(target)
        assert "rm -rf" not in printed(target, "ARGS=--output_dir /home/me")


def test_a_recipe_holds_fields_only(tmp_path, monkeypatch):
    """TrlParser would set the environment from `env:`, children's PYTHONPATH too."""
    classes, recipe = PHASES["distill"].classes, tmp_path / "x.yaml"
    fields = {"data": "d", "traces": "t", "model_name_or_path": "m", "use_cpu": True}
    for wrong, words in {
        "env: {PYTHONPATH: /tmp/evil}": "unknown key 'env'",
        "learning_rate: 2e-5": "'2e-5' is text; write a number",
        "learning_rate: true": "True does not fit; float is wanted",
        "max_steps: true": "True does not fit; int is wanted",
        "max_steps: 1.5": "1.5 does not fit; int is wanted",
        "packing: 1": "1 does not fit; bool is wanted",
        "lora_target_modules: [1]": r"\[1\] does not fit",
        "liger_kernel_config: {rope: 7}": "does not fit",
        "_n_gpu: 1": "unknown key '_n_gpu'",
        "rehearsl: 1.0": "did you mean 'rehearsal'",
        "data: [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[x]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]": "does not fit",
        "channel: visible": "'visible' is not one of hidden, discrete",
        "data: 2024-13-45": "not valid YAML",
        "a: &a [b, b]\nc: [*a, *a]\ndata: x\ndata: y": "'data' stands twice",
        "data: " + 2000 * "[": "not valid YAML",
        "data: !!int ''": "not valid YAML",
        "data: !!bool 2": "not valid YAML",
        "data: !!timestamp x": "not valid YAML",
        "base: ''": "not the name of a recipe in the same folder",
        "base: " + 300 * "n": "no such recipe",
        "base: ../other.yaml": "not the name of a recipe in the same folder",
        "base: other.yaml": "other.yaml: no such recipe",
        "base: x.yaml": "x.yaml has a base itself",
    }.items():
        recipe.write_text(wrong + "\n")
        with pytest.raises(Refused, match=words):
            check_fields(read_yaml(recipe), classes, recipe)
    recipe.write_text(yaml.safe_dump(fields | {"learning_rate": 1, "warmup_steps": 0.5, "max_length": None}))
    check_fields(read_yaml(recipe), classes, recipe)
    assert "PYTHONPATH" not in os.environ or os.environ["PYTHONPATH"] != "/tmp/evil"


def test_the_last_recipe_wins_and_a_base_comes_first(tmp_path):
    one, two, base = tmp_path / "one.yaml", tmp_path / "two.yaml", tmp_path / "base.yaml"
    base.write_text("codebook_size: 8\nm_max: 8\nm_min: 2\n")
    one.write_text("base: base.yaml\nm_max: 4\nbase_model: a\n")
    two.write_text("base_model: b\n")
    (args,) = parse_phase("init", ["--config", str(one), f"--config={two}", "--output_dir", "o", "--m_min", "1"])
    assert (args.codebook_size, args.m_max, args.m_min, args.base_model) == (8, 4, 1, "b")


def test_accelerate_configurations():
    for path in sorted((ROOT / "accelerate_configs").glob("*.yaml")):
        assert cli.accelerate_config_path(path.stem) == str(path)
        assert {"distributed_type", "num_processes", "mixed_precision"} <= yaml.safe_load(path.read_text()).keys()
    with pytest.raises(Refused, match="'zero4' is neither a file nor one of cpu, ddp"):
        cli.accelerate_config_path("zero4")


def test_lora_is_refused_under_zero3(checkpoint):
    arguments = ModelConfig(model_name_or_path=str(checkpoint), use_peft=True)
    assert lora_config(arguments, [41]).trainable_token_indices == {"embed_tokens": [41]}
    zero3 = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # as a launched run sets it
    with pytest.raises(ValueError, match="does not work under DeepSpeed ZeRO-3.*zero2"):
        lora_config(arguments, [41])
    del zero3
