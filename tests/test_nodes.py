"""Several machines: here two names of one. (Their processes, over gloo, and a rank that is killed: test_kill.py.)"""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml
from warmups import NODES

from abscot_trl.errors import Refused
from abscot_trl.loop import launch as launching
from abscot_trl.loop.arguments import DriverOptions
from abscot_trl.loop.launch import check_nodes, launch
from abscot_trl.loop.stages import Stage
from abscot_trl.processes import DRIVER, run_elsewhere
from abscot_trl.storage import at_work, look_again, write_whole
from abscot_trl.traces.make import TracesArguments, make_traces
from abscot_trl.training.resume import MARK, last_checkpoint

ROOT = Path(__file__).resolve().parents[1]


def accelerate_config(path: Path, port: int, **more) -> str:
    config = {"distributed_type": "MULTI_GPU", "num_processes": 2, "compute_environment": "LOCAL_MACHINE"}
    config |= {"mixed_precision": "no", "num_machines": 1, "machine_rank": 0, "main_process_port": port}
    path.write_text(yaml.safe_dump(config | more))
    return str(path)


def recorded(monkeypatch, *answers) -> list:
    """What the nodes would run; `answers` are called in turn, with the commands."""
    ran = []

    def run(commands):
        ran.append(commands)
        return answers[len(ran) - 1](commands) if len(ran) <= len(answers) else None

    monkeypatch.setattr(launching, "run_elsewhere", run)
    return ran


def test_each_node_is_told_who_it_is(tmp_path, monkeypatch):
    ran = recorded(monkeypatch)
    config = accelerate_config(
        tmp_path / "a.yaml", 0, distributed_type="DEEPSPEED", deepspeed_config={"zero_stage": 3}
    )
    launcher = "srun --nodes=1 --nodelist={node}"
    options = DriverOptions(accelerate_config=config, nodes=["n1", "n2"], launcher=launcher)
    stage = Stage("round1/bottleneck", "bottleneck", {"output_dir": str(tmp_path / "out")})
    launch(stage, tmp_path / "out.yaml", options)
    for rank, command in enumerate(ran[0]):
        path = str(tmp_path / f"out.node{rank}.yaml")
        assert command[:3] == ["srun", "--nodes=1", f"--nodelist=n{rank + 1}"]
        phase = ["bottleneck", "--accelerate_config", path, "--config", str(tmp_path / "out.yaml")]
        assert command[3:] == [sys.executable, "-m", "abscot_trl.cli", *phase]
        written = yaml.safe_load(Path(path).read_text())
        assert written == yaml.safe_load(Path(config).read_text()) | {
            "num_machines": 2,
            "machine_rank": rank,
            "main_process_ip": "n1",
            "main_process_port": 29500,
            "deepspeed_config": {"zero_stage": 3, "deepspeed_multinode_launcher": "standard"},
        }
    recorded(monkeypatch, lambda _: (1, 7))
    with pytest.raises(Refused, match="round1/bottleneck failed on node n2 with exit code 7; mend its recipe and run"):
        launch(stage, tmp_path / "out.yaml", options)


def shard_of(command: list[str]) -> str | None:
    return command[command.index("--shard") + 1] if "--shard" in command else None


@pytest.mark.parametrize("method", ["content", "policy"])
def test_nodes_share_the_traces(toy, tmp_path, monkeypatch, method):
    """
    Each makes its shard. Nodes that did not see the parts of the others leave the joining to the first; a node that
    came when the others had joined is no failure.
    """
    settings = {"model": toy["model"], "data": toy["data"], "output_dir": str(tmp_path / "traces"), "method": method}
    settings |= {"part_tokens": 400, "dtype": "float32"}
    config = tmp_path / "traces.yaml"
    config.write_text(yaml.safe_dump(settings))
    stage = Stage("round1/traces", "traces", settings)
    options = DriverOptions(accelerate_config=accelerate_config(tmp_path / "a.yaml", 0), **NODES)
    whole = tmp_path / "whole"
    make_traces(TracesArguments(**settings | {"output_dir": str(whole)}))

    def make(commands):
        for command in commands:
            assert command[0] == "env" and command[-1 if shard_of(command) is None else -3] == str(config)
            make_traces(TracesArguments(**settings, shard=shard_of(command)))

    def blind(commands):
        with monkeypatch.context() as patched:
            patched.setattr("abscot_trl.traces.make._join", lambda *_: {})
            make(commands)

    def late(commands):
        make(commands)
        return 1, 1

    for last in (make, late, blind):
        ran = recorded(monkeypatch, last, *[make] * (last is blind))
        launch(stage, config, options)
        shards = [[shard_of(command) for command in commands] for commands in ran]
        assert shards == [["1/2", "2/2"]] + [[None]] * (last is blind)
        assert (tmp_path / "traces/traces.jsonl").read_bytes() == (whole / "traces.jsonl").read_bytes()
        (tmp_path / "traces").rename(tmp_path / f"traces-{last.__name__}")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"launcher": None}, "go together"),
        ({"nodes": None}, "go together"),
        ({"nodes": []}, "go together"),
        ({"nodes": ["a", "a"]}, "each once"),
        ({"launcher": "srun"}, "{node}"),
        ({"nodes": ["a", ""]}, "go together"),
        ({"nodes": ["a,b"]}, "names of machines, each once"),
        ({"nodes": ["n[1-2]"]}, "'n.1-2.'. and launcher"),
        ({"launcher": "env '{node}"}, "is no command .No closing quotation"),
        ({"launcher": "nowhere {node}"}, "is no command .'nowhere' is not installed here"),
        ({"launcher": "a\0b {node}"}, "is no command"),
        ({"launch": "inline"}, "nodes need launch: accelerate"),
        ({"nodes": ["a", "b", "c"]}, "num_processes 2 counts the processes of all nodes, and is no multiple of 3"),
        ({"accelerate_config": None}, "and an accelerate_config such as ddp"),
        ({"nodes": None, "launcher": None, "accelerate_config": "zero3_multinode"}, "is for 2 machines: name them in"),
    ],
)
def test_nodes_that_cannot_be_are_refused(tmp_path, fields, words):
    options = {"accelerate_config": accelerate_config(tmp_path / "a.yaml", 0)} | NODES
    with pytest.raises(Refused, match=words):
        check_nodes(DriverOptions(**options | fields))


def waiting(folder: Path) -> list[str]:
    """A command on another machine: it is tied to no process number of this one, and tidies up when told to end."""
    code = f"""
import os, signal, sys, time
assert {DRIVER!r} not in os.environ
signal.signal(signal.SIGTERM, lambda *_: sys.exit(open({str(folder / "told")!r}, "w").close()))
open({str(folder / "ready")!r}, "w").close()
time.sleep(60)
"""
    return [sys.executable, "-c", code]


def test_when_one_fails_the_others_are_told_to_end(tmp_path):
    failing = f"while [ ! -e {tmp_path / 'ready'} ]; do sleep 0.01; done; exit 3"
    assert run_elsewhere([waiting(tmp_path), ["sh", "-c", failing]]) == (1, 3)
    assert (tmp_path / "told").exists()
    assert run_elsewhere([["true"], ["sh", "-c", "sleep 0.3"]]) is None


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux's")
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_the_other_machines_are_told_when_the_driver_dies(tmp_path, kind):
    code = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
    code += f"from abscot_trl.processes import run_elsewhere; run_elsewhere([{waiting(tmp_path)!r}, ['sleep', '60']])"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as driver:
        while not (tmp_path / "ready").exists():
            assert driver.poll() is None
            time.sleep(0.01)
        driver.send_signal(kind)
        driver.wait(60)
    end = time.monotonic() + 60
    while not (tmp_path / "told").exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_disk_without_locks_is_said_so(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(Refused, match="the disk has no locks .Function not implemented.; mount it with them"):
        with at_work(tmp_path / "out"):
            pass


def test_processes_of_two_machines_with_one_number_write_side_by_side(tmp_path, monkeypatch):
    """Containers count from 1: the temporary file of one was that of the other."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    replace, seen = Path.replace, []

    def slow(self, target):
        seen.append(self.name)
        if len(seen) == 1:
            write_whole(tmp_path / "file", "b")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", slow)
    write_whole(tmp_path / "file", "a")
    assert len({*seen}) == 2 and (tmp_path / "file").read_text() == "a"
    assert look_again(tmp_path / "file") and not look_again(tmp_path / "other") and not look_again(tmp_path / "no/no")


def test_all_go_on_from_the_checkpoint_that_the_first_process_sees(tmp_path):
    """A process of another machine that sees an older state, or another disk."""
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "sealed.json").write_text("{}")

    def rank(main: bool, said: float) -> Namespace:
        """Of two: what the other one adds is `said`."""
        return Namespace(is_main_process=main, device="cpu", reduce=lambda mine, reduction: mine + torch.tensor(said))

    with pytest.raises(Refused, match="is not on a disk that all machines share: .* does not see"):
        last_checkpoint(tmp_path, rank(False, 4.0))
    (tmp_path / MARK).touch()
    assert last_checkpoint(tmp_path, rank(True, 0.0)) == str(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "sealed.json").unlink()
    assert last_checkpoint(tmp_path, rank(False, 4.0)) == str(tmp_path / "checkpoint-4")
    assert last_checkpoint(tmp_path, rank(False, 0.0)) is None
