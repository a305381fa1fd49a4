"""Nothing outlives its driver: not its child, not what that launches or forks; and who is told to stop tells the rest.

The processes here import `abscot_trl.processes` alone, so that they start at once.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from abscot_trl import storage
from abscot_trl.cli import accelerate_config_path
from abscot_trl.errors import Refused
from abscot_trl.storage import at_work

ROOT = Path(__file__).resolve().parents[1]
# A launcher, as accelerate's: it starts its child with a plain Popen. The child is a phase: it ties itself, and forks.
PHASE = """
import os, sys, time
from abscot_trl.processes import end_with_launcher
end_with_launcher()
forked = os.fork()
if forked:
    print(os.getpid(), forked, flush=True)
time.sleep(60)
"""
LAUNCHER = f"import subprocess, sys; sys.exit(subprocess.Popen([sys.executable, '-c', {PHASE!r}]).wait())"
DRIVER = f"""
import signal, sys
from abscot_trl.processes import run
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
sys.exit(run([sys.executable, "-c", {LAUNCHER!r}]))
"""


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def wait_until_gone(pids: list[int], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not all(map(gone, pids)):
        time.sleep(0.01)
    return all(map(gone, pids))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux's")
@pytest.mark.parametrize("victim", ["driver", "launcher"])
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_tree_ends_with_its_driver_and_its_launcher(victim, kind):
    command = [sys.executable, "-c", DRIVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT) as driver:
        phase, forked = map(int, driver.stdout.readline().split())
        launcher = int(Path(f"/proc/{phase}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(driver.pid if victim == "driver" else launcher, kind)
        code = driver.wait(60)
    assert wait_until_gone([launcher, phase, forked])
    assert code != 0


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux's")
def test_a_rank_ends_with_torchrun():
    """By hand, without a driver: what torchrun says in the environment is enough."""
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "none"}
    command = [sys.executable, "-c", LAUNCHER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment) as launcher:
        rank, forked = map(int, launcher.stdout.readline().split())
        launcher.kill()
    assert wait_until_gone([rank, forked])


def test_a_child_that_is_told_to_stop_may_tidy_up(tmp_path):
    child = f"""
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
try:
    print("ready", flush=True)
    time.sleep(60)
finally:
    time.sleep(0.2)
    open({str(tmp_path / "tidy")!r}, "w").close()
"""
    driver = DRIVER.replace(repr(LAUNCHER), repr(child))
    with subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.PIPE, cwd=ROOT) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert (tmp_path / "tidy").exists()


def test_a_phase_started_by_hand_outlives_its_shell():
    """`abscot bottleneck .. &`, then the shell's end."""
    shell = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {PHASE!r}])"
    environment = {key: value for key, value in os.environ.items() if key not in ("ABSCOT_DRIVER",)}
    command = [sys.executable, "-c", shell]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment) as process:
        process.wait(60)
        phase, forked = map(int, process.stdout.readline().split())
        assert not wait_until_gone([phase], 0.5)
        os.kill(phase, signal.SIGKILL)
        assert wait_until_gone([phase, forked])  # what it forked ends with it all the same


def test_a_folder_has_one_job_at_a_time_and_a_job_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "GRACE_S", 0.1)
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for held, asked in (("out", "out"), ("there", "link")):
        with at_work(tmp_path / held), at_work(tmp_path / held, beside=True):
            with pytest.raises(Refused, match=f"{held}: another process is still at work"), at_work(tmp_path / asked):
                pass
    with at_work(tmp_path / "out", beside=True):  # the last rank of a job whose first has ended
        with pytest.raises(Refused, match="still at work here"), at_work(tmp_path / "out"):
            pass
    with at_work(tmp_path / "out"):
        pass
    assert not (tmp_path / "out").exists()


def test_a_killed_process_frees_its_folder_within_the_grace(tmp_path):
    code = "import sys, time\nfrom abscot_trl.storage import at_work\nwith at_work(sys.argv[1]):\n"
    code += "    print(1, flush=True)\n    time.sleep(60)\n"
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        process.stdout.readline()
        process.kill()
        with at_work(tmp_path / "out"):
            pass


def test_several_processes_where_accelerate_would_start_one_are_refused(tmp_path):
    config = tmp_path / "two.yaml"
    for kind in ("MULTI_CPU", "NO"):
        config.write_text(f"distributed_type: '{kind}'\nnum_processes: 2\n")
        with pytest.raises(Refused, match=f"two.yaml: num_processes is 2, but accelerate starts one for .* {kind}"):
            accelerate_config_path(str(config))
    config.write_text("distributed_type: MULTI_GPU\nnum_processes: 2\n")
    assert accelerate_config_path(str(config)) == str(config)
