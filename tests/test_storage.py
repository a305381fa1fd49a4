"""What phases read is told apart to the byte; what is kept between kills is cleared only where it is ours."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from abscot_trl.loop import driver
from abscot_trl.storage import input_digests, path_digest


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
