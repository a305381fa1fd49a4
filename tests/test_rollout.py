"""
GRPO's generation backend with real vLLM on CPU, each job in a process of its own: `alone` holds an engine, `beside`
two processes and a server. What they return is checked here, against transformers.
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
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
from conftest import tiny_model
from datasets import Dataset
from peft import get_peft_model
from test_vllm import CPU
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

from abscot_trl.checkpoint import extend_model, save_checkpoint
from abscot_trl.data.toy import chain_arithmetic, toy_tokenizer
from abscot_trl.examples import prompt_ids
from abscot_trl.traces.server import check_server
from abscot_trl.training.adapters import lora_config
from abscot_trl.vocabulary import AbstractVocabulary

TRACE, ROOM = 6, 16  # m_max of the checkpoint, and max_completion_length
ENGINE = {"dtype": "float32", "enforce_eager": True, "block_size": 32, "enable_chunked_prefill": False}
FIELDS = {"gpu_memory_utilization": 0.2, "max_model_length": 256, "max_completion_length": ROOM}
BAD = {
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 20},
    "min_p": {"min_p": 0.1},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "structured_outputs_regex": {"structured_outputs_regex": "a*"},
    "logprobs": {"logprobs": 5},
    "generation_kwargs": {"generation_kwargs": {"frequency_penalty": 0.5}},
    "max_completion_length 7 leaves no room for an answer.*use 8 at least": {"max_completion_length": 7},
    "tensor_parallel_size 3 does not divide the 2 heads.*use one of 1, 2": {"tensor_parallel_size": 3},
    "0 <= m_min <= m_max.*m_min=7, m_max=6": {"m_min": 7},
}


def prompts(checkpoint, distinct: int = 60) -> list[list[int]]:
    """Every prompt four times, as GRPO gives them, with the begin delimiter."""
    tokenizer, vocabulary = AutoTokenizer.from_pretrained(checkpoint), AbstractVocabulary.load(checkpoint)
    rows = [e for steps in (2, 4, 8) for e in chain_arithmetic(distinct // 3, steps, 5, seed=0)]
    return [[*prompt_ids(r.prompt, tokenizer), vocabulary.begin_id(tokenizer)] for r in rows for _ in range(4)]


def adapted(checkpoint):
    """LoRA and token rows on the checkpoint, every adapter parameter noisy."""
    tokenizer, vocabulary = AutoTokenizer.from_pretrained(checkpoint), AbstractVocabulary.load(checkpoint)
    arguments = ModelConfig(
        model_name_or_path=str(checkpoint),
        use_peft=True,
        lora_r=4,
        lora_dropout=0.0,
        lora_target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    )
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    torch.manual_seed(1)
    model = get_peft_model(base, lora_config(arguments, vocabulary.all_ids(tokenizer))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def untied(folder: Path) -> Path:
    """As the fixture `checkpoint`, with a head of its own."""
    folder.mkdir()
    tokenizer, vocabulary = toy_tokenizer(), AbstractVocabulary(size=8, m_min=1, m_max=TRACE)
    model = tiny_model(vocabulary=40, tied=False)
    vocabulary.extend(tokenizer)
    extend_model(model, vocabulary.all_ids(tokenizer))
    save_checkpoint(model, tokenizer, vocabulary, folder)
    return folder


def backend(checkpoint, model=None, **fields):
    """The class under test, with the engine settings that CPU needs and TRL does not pass."""
    import vllm
    from accelerate import Accelerator
    from trl.generation import vllm_generation
    from vllm.model_executor.layers import utils

    from abscot_trl.traces.rollout import AbstractVLLMGeneration

    vllm_generation.LLM = partial(vllm.LLM, **ENGINE)
    # Linear weights that were packed for CPU at loading cannot be loaded again.
    utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: setattr(
        layer, "cpu_linear", torch.nn.functional.linear
    )
    model = model or AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return AbstractVLLMGeneration(model, Accelerator(cpu=True), tokenizer, **FIELDS | fields)


def boots(**_):
    raise RuntimeError("an engine boots")


def refusal(function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing was refused"


def offline(checkpoint, given: list[list[int]], **call) -> list[dict]:
    """The same rows by [`VLLMTraceSampler`], whose engine is another."""
    from abscot_trl.traces.vllm import VLLMTraceSampler

    engine = ENGINE | {"distributed_executor_backend": "uni", "gpu_memory_utilization": 0.2, "max_model_len": 256}
    sampler = VLLMTraceSampler(str(checkpoint), **engine)
    return [asdict(trace) for trace in sampler.sample([prompt[:-1] for prompt in given], **call)]


def sleeping(generation, given: list[list[int]]) -> list[str]:
    """What happens in one `generate` with sleep mode on (CPU engines have none: sleep and waking are noted only)."""
    events, llm = [], generation.llm
    generate, load = llm.generate, generation.sync_weights
    llm.wake_up = lambda tags: events.append(f"wake {tags[0]}")
    llm.sleep = lambda level: events.append(f"sleep {level}")
    llm.generate = lambda *args, **kwargs: events.append("generate") or generate(*args, **kwargs)
    generation.sync_weights = lambda: events.append("sync") or load()
    generation.enable_sleep_mode = generation._llm_weights_sleeping = True
    generation.generate(given, None, 4)
    del llm.wake_up, llm.sleep, llm.generate, generation.sync_weights
    generation.enable_sleep_mode = False
    return events


def synced(generation, model, given: list[list[int]]) -> dict:
    """Greedy rollouts before and after a sync with `model`, and by how much the sync changed `model` itself."""
    generation.temperature = 0.0
    before = generation.generate(given, None, 4)[1]
    parameters = {name: parameter.clone() for name, parameter in model.named_parameters()}
    generation.model = model
    generation.sync_weights()
    changes = {name: (p - parameters[name]).abs().max().item() for name, p in model.named_parameters()}
    after = generation.generate(given, None, 4)
    generation.temperature = 1.0
    return {"before": before, "after": after, "changes": changes}


def packed(generation, checkpoint) -> dict:
    """
    The adapted weights as a server gets them, by vLLM's own packing (the NCCL broadcast between is left out): their
    names, and how far from the adapted model a plain one is that has loaded them.
    """
    from vllm.distributed.weight_transfer.packed_tensor import pack_tensors, unpack_tensor

    generation.model, generation.mode = adapted(checkpoint), "server"
    pack = pack_tensors(generation._iter_named_params(), lambda item: item[1], 2**30)
    generation.mode = "colocate"
    weights = dict(unpack_tensor(pack.packed_tensor, pack.names, pack.shapes, pack.dtypes, pack.tensor_sizes))
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    plain.load_state_dict(weights, strict=not plain.config.tie_word_embeddings)
    ids = torch.arange(50)[None]
    with torch.no_grad():
        difference = plain(ids).logits - generation.model(ids).logits
    return {"names": list(weights), "difference": difference.abs().max().item()}


def unknown(generation, checkpoint) -> str:
    """A peft wrapper whose name TRL does not take off."""
    from peft import LoraConfig

    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"])
    generation.model = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), config, adapter_name="mine")
    return refusal(generation.sync_weights)


def trained(checkpoint, folder: Path) -> list[list[int]]:
    """Completions that TRL's own GRPO trainer saw in two steps."""
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import grpo_trainer

    from abscot_trl.traces.rollout import AbstractVLLMGeneration

    grpo_trainer.VLLMGeneration, seen = AbstractVLLMGeneration, []

    def reward(completion_ids, **_):
        seen.extend(completion_ids)
        return [float(sum(ids) % 5) for ids in completion_ids]

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    fields = {"use_vllm": True, "vllm_max_model_length": 256, "vllm_gpu_memory_utilization": 0.2}
    fields |= {"per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 2, "max_completion_length": ROOM}
    args = GRPOConfig(str(folder), use_cpu=True, bf16=False, report_to="none", save_strategy="no", **fields)
    data = Dataset.from_dict({"prompt": tokenizer.batch_decode(prompts(checkpoint, 9))})
    GRPOTrainer(str(checkpoint), reward, args, train_dataset=data, processing_class=tokenizer).train()
    return seen


def alone(checkpoint: str, folder: str) -> dict:
    """Everything that one process can do."""
    import vllm

    from abscot_trl.traces.vllm import row_seed

    given, found = prompts(checkpoint), {}
    engine, vllm.LLM = vllm.LLM, boots
    found["refused"] = [refusal(backend, checkpoint, **fields) for fields in [*BAD.values(), {}]]
    vllm.LLM = engine
    generation = backend(checkpoint, seed=3)
    found["calls"] = [generation.generate(given, None, 4) for _ in range(2)]
    generation.calls, one = 0, generation.accelerator
    generation.accelerator = SimpleNamespace(process_index=2)
    found["third"] = generation.generate(given[160:], None, 4)[1]
    generation.accelerator = one
    for name, row in {"text": given[0][:-1], "images": given[0]}.items():
        images = [["an image"]] if name == "images" else None
        found[name] = refusal(generation.generate, [row], images, 1)
    found["events"] = sleeping(generation, given[:4])
    generation.temperature = 0.6
    found["cool"] = generation.generate(given, None, 4)
    found["synced"] = synced(generation, adapted(checkpoint), given)
    found["tied"] = packed(generation, checkpoint)
    found["untied"] = packed(generation, untied(Path(folder) / "untied"))
    found["unknown"] = unknown(generation, checkpoint)
    # An engine that goes takes vLLM's process groups with it: those of others come last.
    found["offline"] = offline(checkpoint, given, m_max=TRACE, m_min=1, seed=row_seed(3, 1))
    found["trained"] = trained(checkpoint, Path(folder) / "grpo")
    return found


def beside(checkpoint: str, folder: str, url: str) -> dict | None:
    """Two processes, of 120 prompts each: on a server, then as one tensor-parallel engine of an adapted model."""
    from accelerate import PartialState
    from accelerate.utils import gather_object
    from trl.generation.vllm_client import VLLMClient

    from abscot_trl.traces.server import ServerTraceSampler
    from abscot_trl.traces.vllm import row_seed

    VLLMClient.init_communicator = lambda self, device: None
    given, found, rank = prompts(checkpoint), {}, PartialState(cpu=True).process_index
    mine = given[rank * 120 : (rank + 1) * 120]

    def rollouts(generation) -> list[list]:
        return [gather_object(part) for part in generation.generate(mine, None, 4)]

    generation = backend(checkpoint, mode="server", server_base_url=url, seed=3)
    found["calls"] = [rollouts(generation) for _ in range(2)]
    parallel = backend(checkpoint, adapted(checkpoint), tensor_parallel_size=2, seed=3)
    parallel.sync_weights()
    found["parallel"] = rollouts(parallel)
    if rank == 0:
        prefixes = [prompt[:-1] for prompt in given]
        sampler = ServerTraceSampler(url, checkpoint)
        found["sampler"] = [asdict(t) for t in sampler.sample(prefixes, m_max=TRACE, m_min=1, seed=row_seed(3, 1))]
        for size in (4, 16):
            other, tokenizer = AbstractVocabulary(size), toy_tokenizer()
            other.extend(tokenizer)
            tokenizer.save_pretrained(Path(folder) / str(size))
            AutoModelForCausalLM.from_pretrained(checkpoint).config.save_pretrained(Path(folder) / str(size))
            found[str(size)] = refusal(ServerTraceSampler, url, str(Path(folder) / str(size)), other)
        return found


SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_rollout
found = getattr(test_rollout, sys.argv[2])(*sys.argv[4:])
if found:
    json.dump(found, open(sys.argv[3], "w"))
"""


def run(folder: Path, job: str, *args, launcher=()) -> dict:
    """`job(*args)` in a process of its own, or in those of a launcher."""
    script, out = folder / "script.py", folder / f"{job}.json"
    script.write_text(SCRIPT)
    command = [sys.executable, *launcher, script, Path(__file__).parent, job, out, *args]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=os.environ | CPU)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@contextmanager
def serving(checkpoint, folder: Path):
    """`vllm serve` on loopback: its url, and a function that waits until it is up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = "--dtype float32 --enforce-eager --block-size 32 --no-enable-chunked-prefill --max-num-batched-tokens 4096"
    flags += f" --max-model-len 256 --gpu-memory-utilization 0.2 --host 127.0.0.1 --port {port}"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(checkpoint), *flags.split()]
    command += ["--logprobs-mode", "processed_logprobs"]
    url, env = f"http://127.0.0.1:{port}", os.environ | CPU | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}

    def wait():
        for _ in range(240):
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
        server.wait(30)


@pytest.fixture(scope="module")
def found(checkpoint, tmp_path_factory):
    """What both jobs return; the server boots while the first is at work."""
    if not (find_spec("vllm") and torch.version.cuda is None):
        pytest.skip("needs the CPU build of vLLM")
    folder = tmp_path_factory.mktemp("rollout")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with serving(checkpoint, folder) as (url, wait):
        results = {"alone": run(folder, "alone", checkpoint, folder)}
        wait()
        results["beside"] = run(folder, "beside", checkpoint, folder, url, launcher=torchrun)
    return results


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
    for i in range(completion.index(allowed[-1]) + 1):
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


def test_traces_are_those_of_offline_sampling(found, allowed):
    """The second call's, by [`VLLMTraceSampler`] in another engine and by [`ServerTraceSampler`], with its seed."""
    _, ids, logps, _ = found["alone"]["calls"][1]
    for i, (here, there) in enumerate(zip(found["alone"]["offline"], found["beside"]["sampler"], strict=True)):
        n = len(here["token_ids"]) + 1
        assert [*here["token_ids"], allowed[-1]] == [*there["token_ids"], allowed[-1]] == ids[i][:n]
        assert here["forced_end"] == there["forced_end"] == (n == TRACE + 1)
        for trace in (here, there):
            assert [*trace["logps"], trace["end_logp"]] == pytest.approx([row[0] for row in logps[i][:n]], abs=1e-4)


def test_rows_are_numbered_over_all_processes(found):
    assert found["alone"]["third"] == found["alone"]["calls"][0][1][160:]


def test_server_gives_two_processes_what_colocate_gives_one(found):
    """Without weight sync: `init_communicator`, which needs NCCL, is the one call patched out."""
    for here, there in zip(found["alone"]["calls"], found["beside"]["calls"], strict=True):
        check_equal(here, there)


def test_one_waking_a_generation(found):
    assert found["alone"]["events"] == ["sync", "wake weights", "wake kv_cache", "generate", "generate", "sleep 2"]


def test_bad_settings_are_refused_before_an_engine_boots(found):
    for words, said in zip([*BAD, "an engine boots"], found["alone"]["refused"], strict=True):
        assert re.search(words, said), said
    assert "ends in token [4] and not in <beginabstract> [48]" in found["alone"]["text"]
    assert "remove the images" in found["alone"]["images"]


def test_other_servers_are_refused(found):
    assert "whose token 45 is '<TOKEN_F>' and not '<endabstract>'" in found["beside"]["4"]
    assert "does not take token 57" in found["beside"]["16"]
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


def test_tensor_parallel_pair_after_a_sync(checkpoint, found, allowed):
    _, ids, _, _ = found["beside"]["parallel"]
    assert found["beside"]["parallel"][0] == prompts(checkpoint)
    check_legal(ids, allowed)
    check_logps(adapted(checkpoint), found["beside"]["parallel"], allowed)


def test_grpo_trainer_takes_it(found, allowed):
    """trl's own trainer, two steps of 8 completions, with the class put in the place of its backend."""
    assert len(found["alone"]["trained"]) == 16
    check_legal(found["alone"]["trained"], allowed)
