"""
GRPO's generation backend with real vLLM, on CPU or GPUs, each job in a process of its own (`rollout_jobs.py`): `alone`
and `asleep` hold an engine; `beside`, `there` and `sharded` have a server. What they return is checked here, against
transformers.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import rollout_jobs
import torch
from launched import accelerate
from rollout_jobs import BAD, ROOM, TRACE, adapted, prompts, untied
from sampling import ENGINE, ENVIRONMENT, ON_GPU, need_vllm
from transformers import AutoModelForCausalLM, AutoTokenizer

from abscot_trl.serving.server import engine_flags
from abscot_trl.traces.rollout import settle_port
from abscot_trl.traces.server import check_server
from abscot_trl.vocabulary import AbstractVocabulary

pytestmark = pytest.mark.slow


def visible(*numbers: int) -> dict[str, str]:
    """An environment with these of the GPUs that are visible here; nothing where there are none."""
    there = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    return {"CUDA_VISIBLE_DEVICES": ",".join(there.split(",")[n] for n in numbers)} if ON_GPU else {}


def run(folder: Path, job: str, *args, launcher=(), gpus=(0,)) -> dict:
    """`job(*args)` in a process of its own, or in those of a launcher."""
    out, env = folder / f"{job}.json", os.environ | ENVIRONMENT | visible(*gpus)
    command = [sys.executable, *launcher, rollout_jobs.__file__, job, out, *args]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=env, timeout=560)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def serving(checkpoint, folder: Path, gpu: int = 0, takes_weights: bool = False):
    """`vllm serve` on loopback: its url, and a function that waits until it is up."""
    port = free_port()
    flags = engine_flags(ENGINE | {"enable_chunked_prefill": False, "max_num_batched_tokens": 4096})
    flags += ["--logprobs-mode=processed_logprobs", "--host=127.0.0.1", f"--port={port}"]
    url, env = f"http://127.0.0.1:{port}", os.environ | ENVIRONMENT | visible(gpu)
    if takes_weights:
        flags += ["--weight-transfer-config", '{"backend": "nccl"}']
        env |= {"VLLM_SERVER_DEV_MODE": "1"}
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(checkpoint), *flags]

    def wait():
        for _ in range(600):
            try:
                return urlopen(f"{url}/health")
            except URLError:
                assert server.poll() is None, (folder / "server.log").read_text()[-3000:]
                time.sleep(0.5)
        raise TimeoutError((folder / "server.log").read_text()[-3000:])

    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        yield url, wait
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


@pytest.fixture(scope="module")
def found(checkpoint, tmp_path_factory):
    """What both jobs return; the server boots while the first is at work. On one GPU two processes cannot meet."""
    need_vllm()
    folder = tmp_path_factory.mktemp("rollout")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with serving(checkpoint, folder) as (url, wait):
        results = {"alone": run(folder, "alone", checkpoint, folder)}
        wait()
        if torch.cuda.device_count() != 1:
            results["beside"] = run(folder, "beside", checkpoint, folder, url, launcher=torchrun, gpus=(0, 1))
    return results


@pytest.fixture(scope="module")
def beside(found) -> dict:
    if "beside" not in found:
        pytest.skip("needs 2 GPUs, 1 is here")
    return found["beside"]


@pytest.fixture(scope="module")
def asleep(checkpoint, tmp_path_factory):
    need_vllm(gpus=1)
    folder = tmp_path_factory.mktemp("asleep")
    return run(folder, "asleep", checkpoint, folder)


@pytest.fixture(scope="module")
def over_nccl(checkpoint, tmp_path_factory):
    """
    What arrives at servers on the last GPU, from LoRA on the first, and from ZeRO-3 on all but the last (two at most).
    """
    need_vllm(gpus=2)
    folders = [tmp_path_factory.mktemp(job) for job in ("there", "sharded")]
    last, found = torch.cuda.device_count() - 1, []
    trainers = range(min(2, last))
    zero3 = [*accelerate("zero3", len(trainers))]
    with (
        serving(checkpoint, folders[0], last, takes_weights=True) as (first, wait),
        serving(checkpoint, folders[1], last, takes_weights=True) as (second, wait_too),
    ):
        wait()
        found.append(run(folders[0], "there", checkpoint, folders[0], first, free_port()))
        wait_too()
        arguments = [checkpoint, folders[1], second, free_port()]
        found.append(run(folders[1], "sharded", *arguments, launcher=["-m", *zero3], gpus=trainers))
    return *found, folders[1] / "model"


@pytest.fixture(scope="module")
def allowed(checkpoint) -> list[int]:
    """The codebook's ids and, last, the end delimiter's."""
    tokenizer, vocabulary = AutoTokenizer.from_pretrained(checkpoint), AbstractVocabulary.load(checkpoint)
    return [*vocabulary.ids(tokenizer), vocabulary.end_id(tokenizer)]


def check_legal(completions: list[list[int]], allowed: list[int]) -> None:
    """Each is [z; <endabstract>; y], y ended by EOS (1) or cut at its limit."""
    for ids in completions:
        length = ids.index(allowed[-1])
        answer = ids[length + 1 :]
        assert 1 <= length <= TRACE and set(ids[:length]) <= set(allowed[:-1])
        assert 1 <= len(answer) <= ROOM - TRACE - 1 and 1 not in answer[:-1]
        assert answer[-1] == 1 or len(answer) == ROOM - TRACE - 1


def by_hand(model, prompt: list[int], completion: list[int], allowed: list[int], temperature: float = 1.0):
    """Log-probabilities of a completion and the likeliest tokens by one forward, log-softmaxes and plain masks."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double() / temperature
    n = completion.index(allowed[-1]) + 1
    logits[n:, [*allowed, allowed[-1] - 1]] = -torch.inf  # an answer holds no reserved token
    for i in range(n):
        here = allowed[-1:] if i == TRACE else allowed[:-1] if i < 1 else allowed  # m_min is 1
        logits[i, [token for token in range(logits.shape[1]) if token not in here]] = -torch.inf
    logps = torch.log_softmax(logits, dim=-1)
    return logps[range(len(completion)), completion].tolist(), logps.argmax(dim=-1).tolist()


def check_logps(model, rollouts, allowed, temperature: float = 1.0, greedy: bool = False) -> None:
    for prompt, ids, logps, tokens in zip(*rollouts, strict=True):
        expected, likeliest = by_hand(model, prompt, ids, allowed, temperature)
        assert [row[0] for row in logps] == pytest.approx(expected, abs=1e-4)
        assert tokens == [[token] for token in ids] and all(len(row) == 1 for row in logps)
        if greedy:
            assert likeliest == ids


def check_equal(rollouts, others) -> None:
    assert rollouts[:2] == others[:2] and rollouts[3] == others[3]
    for a, b in zip(rollouts[2], others[2], strict=True):
        assert [row[0] for row in a] == pytest.approx([row[0] for row in b], abs=1e-4)


def test_colocate_rollouts_are_legal_and_differ(checkpoint, found, allowed):
    first, second = found["alone"]["calls"]
    for prompt_ids_, ids, _, _ in (first, second):
        assert prompt_ids_ == prompts(checkpoint) and len(ids) == 240
        check_legal(ids, allowed)
        assert len({len(row) for row in ids}) > 5  # forced and free ends, cut and finished answers
        repeats = [ids[i : i + 4] for i in range(0, 240, 4)]
        assert sum(len({tuple(row) for row in rows}) == 4 for rows in repeats) > 55
    assert sum(a == b for a, b in zip(first[1], second[1], strict=True)) < 5


@pytest.mark.parametrize("name, temperature", [("calls", 1.0), ("cool", 0.6)])
def test_logps_equal_transformers(checkpoint, found, allowed, name, temperature):
    """pi_abs on z and its end delimiter, 0 where it was forced, pi on y: all at the temperature, to 1e-4."""
    rollouts = found["alone"]["calls"][0] if name == "calls" else found["alone"][name]
    check_logps(AutoModelForCausalLM.from_pretrained(checkpoint), rollouts, allowed, temperature)


def test_traces_are_those_of_offline_sampling(found, beside, allowed):
    """The second call's, by [`VLLMTraceSampler`] in another engine and by [`ServerTraceSampler`], with its seed."""
    _, ids, logps, _ = found["alone"]["calls"][1]
    for i, (here, there) in enumerate(zip(found["alone"]["offline"], beside["sampler"], strict=True)):
        n = len(here["token_ids"]) + 1
        assert [*here["token_ids"], allowed[-1]] == [*there["token_ids"], allowed[-1]] == ids[i][:n]
        assert here["forced_end"] == there["forced_end"] == (n == TRACE + 1)
        for trace in (here, there):
            assert [*trace["logps"], trace["end_logp"]] == pytest.approx([row[0] for row in logps[i][:n]], abs=1e-4)


def test_rows_are_numbered_over_all_processes(found):
    assert found["alone"]["third"] == found["alone"]["calls"][0][1][160:]


def test_server_gives_two_processes_what_colocate_gives_one(found, beside):
    """Without weight sync: `init_communicator`, which needs NCCL, is the one call patched out."""
    for here, there in zip(found["alone"]["calls"], beside["calls"], strict=True):
        check_equal(here, there)


def test_one_waking_a_generation(found):
    assert found["alone"]["events"] == ["sync", "wake weights", "wake kv_cache", "generate", "generate", "sleep 2"]


def test_bad_settings_are_refused_before_an_engine_boots(found):
    for words, said in zip([*BAD, "an engine boots"], found["alone"]["refused"], strict=True):
        assert re.search(words, said), said
    assert "ends in token [4] and not in <beginabstract> [48]" in found["alone"]["text"]
    assert "remove the images" in found["alone"]["images"]


def test_other_servers_are_refused(beside):
    assert "whose token 45 is '<TOKEN_F>' and not '<endabstract>'" in beside["4"]
    assert "does not take token 57" in beside["16"]
    choice = {"text": "<endabstract>", "logprobs": {"token_logprobs": [-3.2]}}
    response = SimpleNamespace(ok=True, json=lambda: {"choices": [choice]})
    session = SimpleNamespace(post=lambda url, **_: response)
    with pytest.raises(ValueError, match="raw log-probabilities; start it with `--logprobs-mode processed_logprobs`"):
        check_server(SimpleNamespace(base_url="http://x", model="m", session=session), 49, "<endabstract>")


def test_sync_brings_lora_and_token_rows(checkpoint, found, allowed):
    """Greedy rollouts of the engine, booted from the base, equal the adapted model's own after the sync only."""
    synced, model = found["alone"]["synced"], adapted(checkpoint)
    assert sum(a != b for a, b in zip(synced["before"], synced["after"][1], strict=True)) > 200
    check_logps(model, synced["after"], allowed, greedy=True)


def test_sync_leaves_the_training_model_as_it_was(found):
    changes = found["alone"]["synced"]["changes"]
    assert sum("trainable_tokens" in name for name in changes) == 1 and sum("lora_" in name for name in changes) == 16
    for name, change in changes.items():
        assert change == 0.0, name  # W + BA - BA would not be W


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_server_gets_the_merged_weights_under_their_own_names(checkpoint, found, tmp_path, kind):
    """A plain model that loads the pack, head and all, computes what the adapted one does."""
    folder = checkpoint if kind == "tied" else untied(tmp_path / "untied")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert found["alone"][kind]["names"] == [name for name, _ in plain.named_parameters()]
    assert found["alone"][kind]["difference"] < 1e-4


def test_an_unknown_wrapper_is_refused(found):
    assert "modules_to_save.mine.weight is a name of peft's" in found["alone"]["unknown"]


def test_sleep_frees_the_card_and_changes_no_rollout(found, asleep):
    for here, there in zip(found["alone"]["calls"], asleep["calls"], strict=True):
        check_equal(here, there)
    for awake, gone in zip(asleep["free"]["awake"][::2], asleep["free"]["asleep"], strict=False):
        assert gone - awake > ENGINE["kv_cache_memory_bytes"] // 2


def test_waking_brings_the_weights_of_now(checkpoint, asleep, allowed):
    check_logps(adapted(checkpoint), asleep["adapted"], allowed)


def test_nccl_brings_lora_and_token_rows_to_a_server(checkpoint, over_nccl, allowed):
    synced, _, _ = over_nccl
    assert sum(a != b for a, b in zip(synced["before"], synced["after"][1], strict=True)) > 200
    check_logps(adapted(checkpoint), synced["after"], allowed, greedy=True)
    assert len(synced["changes"]) > 16 and not any(synced["changes"].values())


def test_nccl_brings_a_model_under_zero3_to_a_server(checkpoint, over_nccl, allowed):
    """Of one process beside a server on a second GPU; of two with three GPUs."""
    _, found, folder = over_nccl
    assert found["stage"] == 3 and found["processes"] == min(2, torch.cuda.device_count() - 1)
    check_legal(found["seen"], allowed)
    with pytest.raises(AssertionError):  # training has moved it far enough to tell
        check_logps(AutoModelForCausalLM.from_pretrained(checkpoint), found["rollouts"], allowed, greedy=True)
    check_logps(AutoModelForCausalLM.from_pretrained(folder), found["rollouts"], allowed, greedy=True)


def test_tensor_parallel_pair_after_a_sync(checkpoint, beside, allowed):
    given, ids, _, _ = beside["parallel"]
    assert given == prompts(checkpoint)
    check_legal(ids, allowed)
    check_logps(adapted(checkpoint), beside["parallel"], allowed)


def test_grpo_samples_by_vllm_what_it_scores(found, allowed):
    """Three steps of colocate mode, weights synced between them: the trainer's log-probabilities are the engine's."""
    job = found["alone"]
    assert len(job["trained"]) == 24 and len(job["log"]) == 3
    check_legal(job["trained"], allowed)
    for entry in job["log"]:
        assert entry["sampling/sampling_logp_difference/max"] < 1e-3
        assert entry["ratio/mean"] == pytest.approx(1.0, abs=1e-3) and entry["ratio/outside"] == 0.0
    assert job["log"][0]["kl"] == 0.0 and job["log"][2]["kl"] > 1e-3  # the weights did move
    assert [entry["step"] for entry in job["probes"]] == [0, 2, 3]


def test_two_runs_on_one_machine_take_two_ports(monkeypatch):
    """trl's is 29500 as long as nobody listens there, and an engine listens only seconds after it was looked at."""
    ports = set()
    for _ in range(3):
        monkeypatch.delenv("MASTER_PORT", raising=False)
        settle_port()
        ports.add(os.environ["MASTER_PORT"])
    assert len(ports) > 1 and "29500" not in ports
    monkeypatch.setenv("MASTER_PORT", "4711")  # a launcher's, which all its processes share
    settle_port()
    assert os.environ["MASTER_PORT"] == "4711"
