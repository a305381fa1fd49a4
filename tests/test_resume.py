"""A training phase and its output folder: what is refused, what is cleared, and where a killed phase ends."""

import json
import shutil
from dataclasses import fields

import pytest
import torch
from trainers import LAST, contents, foreign, lora, phase, rows, run, settings, weights
from transformers import TrainerCallback
from transformers import trainer as transformers_trainer
from trl import ModelConfig

from abscot_trl.errors import Refused
from abscot_trl.phases import parse, run_phase
from abscot_trl.training.baselines import BaselineTrainer
from abscot_trl.training.bottleneck import BottleneckSFTTrainer
from abscot_trl.training.configs import BaselineConfig, BottleneckConfig, DistillationConfig
from abscot_trl.training.distillation import SelfDistillationTrainer
from abscot_trl.training.phase import TrainArguments, train_bottleneck
from abscot_trl.training.resume import sealed_checkpoints


@pytest.mark.parametrize("changes", [{}, {"traces": "/nothere"}, {"resume_from_checkpoint": True}], ids=str)
@pytest.mark.parametrize("way", ["itself", "link", "here"])
def test_a_folder_of_others_is_refused_and_stays(checkpoint, inputs, tmp_path, monkeypatch, changes, way):
    before = foreign(tmp_path / "mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    output = {"itself": tmp_path / "mine", "link": tmp_path / "link", "here": "."}[way]
    with pytest.raises(Refused, match="holds files that no phase of ours wrote; choose another output_dir"):
        phase(checkpoint, inputs, output, **changes)
    assert contents(tmp_path / "mine") == before


@pytest.mark.parametrize("name", [".hidden", "checkpoint-5", "config.json"])
def test_one_file_of_others_is_enough(checkpoint, inputs, tmp_path, name):
    foreign(tmp_path / "mine")
    for path in (path for path in (tmp_path / "mine").iterdir() if path.name != name):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / "mine" / "config.json").write_text("{}") if name == "config.json" else None
    with pytest.raises(Refused, match="choose another output_dir"):
        phase(checkpoint, inputs, tmp_path / "mine", resume_from_checkpoint=True)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [name]


def test_what_is_no_folder_is_refused(checkpoint, inputs, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output in ("file", "file/below"):
        with pytest.raises(Refused, match=f"{output}: .*file is a file, not a folder"):
            phase(checkpoint, inputs, tmp_path / output)
    assert (tmp_path / "file").read_text() == "mine"


class Stop(TrainerCallback):
    """Ends the training within a step, as a kill would."""

    def __init__(self, at: int):
        self.at = at

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise KeyboardInterrupt


def killed(checkpoint, inputs, output, monkeypatch, at: int, **changes) -> None:
    """A phase that dies within a step, with half a checkpoint."""
    begin = BottleneckSFTTrainer.__init__
    with monkeypatch.context() as patch:
        stop = [Stop(at)]
        patch.setattr(BottleneckSFTTrainer, "__init__", lambda *args, **given: begin(*args, **given, callbacks=stop))
        with pytest.raises(KeyboardInterrupt):
            phase(checkpoint, inputs, output, **changes)
    (output / f"checkpoint-{at}").mkdir()
    (output / f"checkpoint-{at}" / "model.safetensors").write_bytes(b"half")


WRONG = {
    "traces": {"traces": "/nothere"},
    "data": {"data": "/nothere"},
    "model": {"model": "/nothere"},
    "rows": {"max_length": 4},
}


def test_a_killed_phase_goes_on_and_clears_only_its_own(checkpoint, inputs, tmp_path, monkeypatch):
    output = tmp_path / "cut"
    phase(checkpoint, inputs, tmp_path / "whole", **LAST)
    killed(checkpoint, inputs, output, monkeypatch, 5, **LAST)
    (output / "notes.txt").write_text("mine")  # put into our folder by somebody
    before = contents(output)
    for changes in WRONG.values():  # inputs come first
        with pytest.raises(ValueError):
            phase(checkpoint, inputs, output, resume_from_checkpoint=True, **LAST | changes)
        assert contents(output) == before
    with pytest.raises(Refused, match="checkpoint-3 of a phase that did not end.*--resume_from_checkpoint true"):
        phase(checkpoint, inputs, output, **LAST)
    assert contents(output) == before
    warned = []
    monkeypatch.setattr(transformers_trainer.logger, "warning", warned.append)
    phase(checkpoint, inputs, output, resume_from_checkpoint=True, **LAST)
    assert not [words for words in warned if "missing keys" in words]  # of the tied head
    assert (output / "notes.txt").read_text() == "mine" and not (output / "checkpoint-5").exists()
    whole, cut = ({k: v for k, v in contents(tmp_path / name).items() if "/" not in k} for name in ("whole", "cut"))
    assert whole | {"notes.txt": b"mine"} == cut
    with pytest.raises(Refused, match="holds a trained model"):
        phase(checkpoint, inputs, output, resume_from_checkpoint=True, **LAST)


def test_a_phase_killed_before_its_first_checkpoint_begins_again(checkpoint, inputs, tmp_path, monkeypatch):
    killed(checkpoint, inputs, tmp_path / "cut", monkeypatch, 1)
    phase(checkpoint, inputs, tmp_path / "cut")
    phase(checkpoint, inputs, tmp_path / "whole")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


ENDS = {  # 16 rows by 4
    "max_steps": {"max_steps": 7},
    "accumulated": {"max_steps": 7, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
    "part of an epoch": {"max_steps": -1, "num_train_epochs": 1.6, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    "whole epochs": {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch", "logging_steps": 3},
    "odd saves": {"logging_steps": 2},
}


@pytest.mark.parametrize(
    "tuning, end", [*(("full", end) for end in ENDS), ("lora", "max_steps"), ("lora", "accumulated")]
)
def test_from_every_checkpoint_a_phase_ends_as_if_never_killed(checkpoint, tmp_path, tuning, end):
    """The last one too, made at the very end: nothing is left to train."""
    given = {"peft_config": lora(checkpoint) if tuning == "lora" else None}
    given |= {"per_device_train_batch_size": 4} | LAST | ENDS[end]
    whole = run(checkpoint, tmp_path, **given)
    log = [entry for entry in whole.state.log_history if "train_runtime" not in entry]
    found = sealed_checkpoints(tmp_path)
    assert found[-1].name == f"checkpoint-{whole.state.max_steps}" and len(found) > 1
    for path in found:
        config = BottleneckConfig(**settings(tmp_path, **{k: v for k, v in given.items() if k != "peft_config"}))
        peft_config = lora(checkpoint) if tuning == "lora" else None
        again = BottleneckSFTTrainer(str(checkpoint), config, rows(checkpoint), peft_config=peft_config)
        again.train(resume_from_checkpoint=str(path))
        assert again.state.global_step == whole.state.max_steps
        means = {"train_loss", "train_steps_per_second"}  # over this attempt's steps, divided by all
        assert means <= whole.state.log_history[-1].keys() and not means & again.state.log_history[-1].keys()
        for a, b in zip(weights(whole), weights(again), strict=True):
            assert torch.equal(a, b)
        assert [entry for entry in again.state.log_history if "train_runtime" not in entry] == log
    assert [path.name for path in sealed_checkpoints(tmp_path)] == [path.name for path in found]


def test_a_checkpoint_beyond_the_end_is_refused(checkpoint, tmp_path):
    run(checkpoint, tmp_path, **LAST)
    config = BottleneckConfig(**settings(tmp_path, **LAST | {"max_steps": 3}))
    with pytest.raises(Refused, match="7 steps.* max_steps 3"):
        again = BottleneckSFTTrainer(str(checkpoint), config, rows(checkpoint))
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))


@pytest.mark.parametrize(
    "every, saves, found",
    [
        (1, "no", "the loss of step 3 is nan"),
        (5, "no", "the loss of steps 1 to 5 is nan"),
        (5, "steps", r"after step 2 the weights are not finite \(last loss \d.*\)"),
    ],
)
def test_a_phase_that_diverges_stops_in_words(checkpoint, inputs, tmp_path, every, saves, found):
    fields = {"max_steps": 10, "learning_rate": 1.0e30, "logging_steps": every, "save_steps": 1}
    fields |= {"save_strategy": saves}
    with pytest.raises(Refused, match=rf"{found}: training diverged at learning_rate 1e\+30\. Lower it") as refusal:
        phase(checkpoint, inputs, tmp_path / "out", **fields)
    kept = [path.name for path in sealed_checkpoints(tmp_path / "out")]
    assert kept == ["checkpoint-1"] * (saves == "steps")
    assert ("checkpoint-1 stays" in str(refusal.value)) == (saves == "steps")
    assert not (tmp_path / "out" / "training_log.json").exists()


def test_weights_that_are_not_finite_are_never_sealed_or_saved(checkpoint, inputs, tmp_path, monkeypatch):
    """The last step's update spoils them: no loss tells."""

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                list(model.parameters())[-1].data[0] = float("inf")

    begin = BottleneckSFTTrainer.__init__
    spoilt = lambda *args, **given: begin(*args, **given, callbacks=[Spoil()])  # noqa: E731
    monkeypatch.setattr(BottleneckSFTTrainer, "__init__", spoilt)
    for name, saves in (("saved", {"save_steps": 2, "save_strategy": "steps"}), ("unsaved", {"save_strategy": "no"})):
        words = r"after step 4 the weights are not finite \(last loss \d.*diverged at learning_rate 0.01\. Lower it"
        with pytest.raises(Refused, match=words):
            phase(checkpoint, inputs, tmp_path / name, max_steps=4, **saves)
        assert not (tmp_path / name / "training_log.json").exists()
        assert len(list((tmp_path / name).rglob("*.safetensors"))) == (name == "saved")
    assert [path.name for path in sealed_checkpoints(tmp_path / "saved")] == ["checkpoint-2"]


@pytest.mark.parametrize("given, meant", [("true", True), ("false", False), ("no/such/checkpoint", None), ("", None)])
def test_resume_is_true_or_false(tmp_path, given, meant):
    """From the command line, from YAML and in Python."""
    classes = (TrainArguments, BottleneckConfig, ModelConfig)
    line = ["--data", "x", "--traces", "x", "--output_dir", "x", "--use_cpu", "true", "--bf16", "false"]
    (tmp_path / "x.yaml").write_text(json.dumps({"resume_from_checkpoint": given if meant is None else meant}))
    ways = [
        lambda: parse(classes, [*line, "--resume_from_checkpoint", given])[1],
        lambda: parse(classes, [*line, "--config", str(tmp_path / "x.yaml")])[1],
        lambda: BottleneckConfig(**settings(tmp_path, resume_from_checkpoint=given if meant is None else meant)),
    ]
    for way in ways:
        if meant is None:
            with pytest.raises(Refused, match="resume_from_checkpoint"):
                way()
        else:
            assert way().resume_from_checkpoint is meant
    assert parse(classes, line)[1].resume_from_checkpoint is False


@pytest.mark.parametrize("name", ["bottleneck", "distill"])
def test_the_phases_need_traces(tmp_path, name):
    line = ["--data", "x", "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    with pytest.raises(Refused, match="required.*--traces"):
        run_phase(name, [*line, "--model_name_or_path", "x"])


@pytest.mark.parametrize("trainer", [BottleneckSFTTrainer, SelfDistillationTrainer])
def test_rows_without_a_trace_are_refused(checkpoint, tmp_path, trainer):
    data = rows(checkpoint)
    some = data.remove_columns("trace").add_column("trace", [*data["trace"][:-1], None])
    for wrong in (some, rows(checkpoint, trace=False)):
        with pytest.raises(Refused, match="no trace.*abscot baseline"):
            run(checkpoint, tmp_path, trainer, data=wrong)


def test_two_trainers_on_one_configuration(checkpoint, inputs, tmp_path):
    given = {"packing": True, "max_length": 128, "save_total_limit": 1} | LAST
    config = BottleneckConfig(**settings(tmp_path, **given))
    before = {field.name: getattr(config, field.name) for field in fields(config) if field.init}
    counts = []
    for _ in range(2):
        trainer = BottleneckSFTTrainer(str(checkpoint), config, rows(checkpoint))
        trainer.train()
        counts.append((len(trainer.train_dataset), [path.name for path in tmp_path.glob("checkpoint-*")]))
        assert {name: getattr(config, name) for name in before} == before
    assert counts[0] == counts[1] == (counts[0][0], ["checkpoint-7"]) and counts[0][0] < 16
    config = BaselineConfig(**settings(tmp_path, baseline="icot", max_steps=-1, num_train_epochs=1))
    before = dict(vars(config))
    BaselineTrainer(str(checkpoint), config, rows(checkpoint, trace=False))
    assert vars(config) == before
    config = DistillationConfig(**settings(tmp_path / "phase"))
    before = dict(vars(config))
    model = ModelConfig(model_name_or_path=str(checkpoint), dtype="float32")
    train_bottleneck(TrainArguments(**inputs), config, model)
    assert vars(config) == before
