"""
The build that `make install` takes, `gpu` or `cpu`, by the machine's NVIDIA driver; run before anything is downloaded.

    python3 requirements/driver.py [gpu | cpu]      # a build that is named is taken unseen

Prints the build; what it found goes to stderr. Exits with 1, and says what can be done, where the driver is too old.
"""

import re
import shutil
import subprocess
import sys

NEEDED = 580  # the oldest driver of CUDA 13
OLD = """NVIDIA driver {found} is too old: driver {needed} or newer is needed, for
torch 2.13 and vLLM 0.31, which are pinned, are builds of CUDA 13. Nothing was downloaded. One of these helps:
  - install driver {needed} or newer;
  - on a data centre GPU keep the driver and install NVIDIA's forward compatibility package, cuda-compat-13-0, put its
    folder first in LD_LIBRARY_PATH, and run: make install BUILD=gpu
  - take this machine's CPU alone: make install BUILD=cpu
There is no set for CUDA 12 here. PyTorch and vLLM publish builds of CUDA 12.9 for many versions outside the package
registry (their installation pages say where): in an environment of your own, and untested with this package."""
BROKEN = """nvidia-smi is there but fails ({said}), so nobody knows the NVIDIA driver; {needed} or newer is needed.
Nothing was downloaded. Mend the driver, or name the build: make install BUILD=gpu, or BUILD=cpu without GPUs."""


def cpu(why):
    sys.stderr.write("make install: " + why + ", so the CPU build is taken\n")
    return "cpu"


def build():
    """`gpu` or `cpu`."""
    if not shutil.which("nvidia-smi"):
        return cpu("no nvidia-smi here")
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = done.stdout.strip()
    if "No devices" in said:
        return cpu("nvidia-smi finds no GPU")
    version = re.match(r"(\d+)\.[\d.]+$", said.splitlines()[0].strip() if said else "")
    if done.returncode or not version:
        sys.exit("make install: " + BROKEN.format(said=" ".join(said.split())[:200] or "no output", needed=NEEDED))
    if int(version.group(1)) < NEEDED:
        sys.exit("make install: " + OLD.format(found=version.group(), needed=NEEDED))
    return "gpu"


if __name__ == "__main__":
    named = sys.argv[1] if len(sys.argv) > 1 else build()
    if named not in ("gpu", "cpu"):
        sys.exit("make install: BUILD is gpu or cpu, not " + repr(named))
    sys.stdout.write(named + "\n")
