"""What phases read is told apart to the byte; what is kept between kills is cleared only where it is ours."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from safetensors.torch import save_file

from abscot_trl.errors import Refused
from abscot_trl.loop import driver
from abscot_trl.phases import PHASES
from abscot_trl.storage import (
    Parts,
    at_work,
    check_folder,
    input_digests,
    path_digest,
    read_json,
    write_whole,
    written_whole,
)


def test_every_line_of_a_large_file_counts(tmp_path):
    """Traces of which one line changes, wherever it stands; a copy is the same input."""
    lines = [json.dumps({"row": i, "trace": [i % 8] * 20}) + "\n" for i in range(100_000)]
    folder = tmp_path / "traces"
    folder.mkdir()
    file, digests = folder / "traces.jsonl", []
    for changed in (None, 30_100, 70_100):
        text = [*lines]
        if changed is not None:
            text[changed] = text[changed].replace(f"[{changed % 8}", f"[{(changed + 1) % 8}")
        file.write_text("".join(text))
        assert file.stat().st_size > 2**22
        digests.append((path_digest(folder), path_digest(file)))
    assert len({one for one, _ in digests}) == len({other for _, other in digests}) == 3
    shutil.copytree(folder, tmp_path / "copy")
    assert path_digest(tmp_path / "copy") == path_digest(folder)


def test_other_rows_of_new_tokens_are_another_model(tmp_path):
    """`abscot init` with another seed: 66 rows in the midst of weights that are the same everywhere else."""
    weights, digests = {"a": torch.zeros(20_000, 512), "z": torch.zeros(20_000, 512)}, set()
    for value in (1.0, 2.0):
        weights["a"][10_100:10_166] = value
        save_file(weights, tmp_path / "model.safetensors")
        digests.add(path_digest(tmp_path))
    assert len(digests) == 2


@pytest.mark.parametrize("key", ["data", "problems"])
def test_files_in_folders_of_a_folder_are_inputs_too(tmp_path, key):
    """`abscot data` and `evaluate` read all files below a folder; a model's folder is its own files."""
    nested = tmp_path / "level1" / "rows.jsonl"
    nested.parent.mkdir()
    nested.write_text("1")
    before = input_digests({key: str(tmp_path), "model": str(tmp_path)})
    nested.write_text("2")
    after = input_digests({key: str(tmp_path), "model": str(tmp_path)})
    assert before[key] != after[key] and before["model"] == after["model"]


@pytest.mark.parametrize(
    ("then", "now", "same"),
    [
        (None, {}, True),
        ({"tensor_parallel_size": 1}, {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.5}, True),
        ({"data_parallel_size": 8, "dtype": "bfloat16"}, {"dtype": "bfloat16", "max_num_seqs": 16}, True),
        (None, {"block_size": 32, "swap_space": 8, "cpu_offload_gb": 4, "enforce_eager": True}, True),
        (None, {"max_model_len": 2048}, False),
        ({"dtype": "bfloat16"}, {"dtype": "float16"}, False),
        ({"tensor_parallel_size": 2}, {"quantization": "fp8"}, False),
        (None, {"kv_cache_dtype": "fp8"}, False),
        (None, {"an_argument_nobody_knows": 1}, False),
    ],
)
def test_an_engine_s_devices_and_memory_do_not_matter_what_it_computes_does(then, now, same):
    then, now = ({"settings": {"seed": 0, "engine": engine}, "inputs": {}} for engine in (then, now))
    words = driver._differences(then, now)
    assert words == "" if same else words.startswith("engine: ")
    where = {"server": "http://127.0.0.1:1", "batch_tokens": 5}
    assert driver._differences(then, {**now, "settings": now["settings"] | where}) == words
    assert "seed: 0 -> 1" in driver._differences(then, {**now, "settings": now["settings"] | {"seed": 1}})


NO_FOLDERS = {
    "n" * 300: "no name of a folder",
    "n" * 240: "no name of a folder",  # what stands beside it has longer names
    "a\x00b": "no name of a folder",
    "\ud800": "no name of a folder",
    "loop": "no name of a folder",
    "loop/x": "no name of a folder",
    "dangling": "dangling is a file, not a folder",
    "file": "file is a file, not a folder",
    "file/x": "file is a file, not a folder",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a file, a link to nothing and one to itself."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("dangling").symlink_to("none/such")
    Path("loop").symlink_to("loop")


@pytest.mark.parametrize("path", NO_FOLDERS, ids=range(len(NO_FOLDERS)))
def test_what_can_be_no_folder(path, here):
    """Also where a phase asks only for its lock."""
    with pytest.raises(Refused, match=NO_FOLDERS[path]):
        check_folder(path)
    with pytest.raises(Refused, match=NO_FOLDERS[path]), at_work(path):
        pass
    assert sorted(map(str, Path().iterdir())) == ["dangling", "file", "loop"]


def test_what_can_be_a_folder(here):
    for path in (".", "", "new", "new/deep/er", "n" * 220, Path.cwd()):
        check_folder(path)


@pytest.mark.parametrize("name", [name for name, phase in PHASES.items() if phase.folder])
def test_every_phase_looks_at_its_folder_first(name, here):
    """Called from Python too, and before any input is read: there are none."""
    phase, given = PHASES[name], []
    for cls in phase.classes:
        needed = [one for one in dataclasses.fields(cls) if one.init and one.default is dataclasses.MISSING]
        needed = [one for one in needed if one.default_factory is dataclasses.MISSING]
        values = {one.name: ["none"] if "list" in str(one.type) else "http://none" for one in needed}
        more = {phase.folder: "n" * 300, "use_cpu": True, "bf16": False, "names": ["base"]}
        given.append(cls(**values | {key: more[key] for key in more.keys() & cls.__dataclass_fields__.keys()}))
    with pytest.raises(Refused, match="no name of a folder"):
        resolve_name(phase.function)(*given)


@pytest.mark.parametrize("link", ["loop", "dangling"])
def test_a_link_is_not_written_over(link, here):
    with pytest.raises(Refused, match="is there already"), written_whole(link):
        pass
    with pytest.raises(Refused, match="is there already"):
        Parts(link, {})
    assert Path(link).is_symlink()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe{", "decode"),
        (b"[" * 100_000, "recursion"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "digits"),
        (b"[]", "a list, not an object"),
        (b'{"seed": 1}', "lacks name, settings"),
        (b'{"name": 1, "settings": [1]}', r"settings: \[1\] is no dict"),
        (b'{"name": 1, "settings": "' + b"x" * 9999 + b'"}', "is no dict"),
    ],
)
def test_a_damaged_file_of_ours_is_one_short_line(tmp_path, content, words):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(Refused, match=rf"x\.json is damaged .*{words}.*; mend it") as refused:
        read_json(tmp_path / "x.json", "mend it", "name", settings=dict)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("line", ["[" * 100_000, "[]", '{"n": ' + "9" * 5000 + "}"], ids=["deep", "list", "long"])
def test_a_damaged_part_is_named(tmp_path, line):
    parts = Parts(tmp_path / "out", {})
    parts.path(0).write_text(line)
    with pytest.raises(Refused, match="000000.jsonl is damaged .* remove it"):
        list(parts.records([0]))


def test_a_difference_of_settings_is_said_in_short(tmp_path):
    Parts(tmp_path / "out", {"prompt": "x" * 9999})
    with pytest.raises(Refused, match="begun with other settings") as refused:
        Parts(tmp_path / "out", {"prompt": "y" * 9999})
    assert len(str(refused.value)) < 1000


def test_a_folder_or_a_pipe_in_the_place_of_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "losses.csv").mkdir()
    with pytest.raises(Refused, match="pipe.json is damaged .it is no file.; mend it"):
        read_json(tmp_path / "pipe.json", "mend it")
    with pytest.raises(Refused, match="losses.csv is a folder, where a file is to be written"):
        write_whole(tmp_path / "losses.csv", "x")


@pytest.mark.parametrize("record", [{}, {"score": "1"}, {"score": [1]}])
def test_a_record_of_other_fields_is_damage(tmp_path, record):
    parts = Parts(tmp_path / "out", {})
    parts.write(0, [{"score": 1.0}, record])
    with pytest.raises(Refused, match="000000.jsonl is damaged .score is missing, or no float"):
        list(parts.records([0], kinds={"score": float}))


def test_parts_that_are_being_removed_stay_ours(tmp_path, monkeypatch):
    """Killed before any of the removals: the settings are there as long as anything else is."""
    unlink, left = os.unlink, 0

    def killed(*args, **kwargs):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        unlink(*args, **kwargs)

    for moment in range(5):
        parts = Parts(tmp_path / str(moment), {})
        for number in range(3):
            parts.write(number, [])
        with parts.joining():
            left = moment
            monkeypatch.setattr(os, "unlink", killed)
            with pytest.raises(KeyboardInterrupt):
                parts.remove()
            monkeypatch.undo()
        names = {path.name for path in parts.folder.iterdir()}
        assert len(names) == 5 - moment and "settings.json" in names
        Parts(tmp_path / str(moment), {}).remove()
        assert not parts.folder.exists()
