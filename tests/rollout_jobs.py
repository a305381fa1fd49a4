"""
What tests/test_rollout.py has done in processes of its own: `alone` holds vLLM's engine, `asleep` one that sleeps;
`beside` is two processes and a server, `there` and `sharded` bring weights to a server on another GPU.

    python tests/rollout_jobs.py alone found.json CHECKPOINT FOLDER
"""

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import sampling
import torch
from datasets import Dataset
from peft import get_peft_model
from sampling import ON_GPU
from tiny import make_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

from abscot_trl.data.toy import chain_arithmetic, toy_tokenizer
from abscot_trl.examples import prompt_ids
from abscot_trl.training.adapters import lora_config
from abscot_trl.vocabulary import AbstractVocabulary

TRACE, ROOM = 6, 16  # m_max of the checkpoint, and max_completion_length
PASSED = ("distributed_executor_backend", "gpu_memory_utilization", "max_model_len")  # by TRL
ENGINE = {name: value for name, value in sampling.ENGINE.items() if name not in PASSED}
ENGINE |= {"enable_chunked_prefill": False}
SHARE = sampling.ENGINE["gpu_memory_utilization"]
FIELDS = {"gpu_memory_utilization": SHARE, "max_model_length": 256, "max_completion_length": ROOM}
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
    make_checkpoint(folder, tied=False)
    return folder


def backend(checkpoint, model=None, **fields):
    """The class under test, with the engine settings that the machine needs and TRL does not pass."""
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
    accelerator, tokenizer = Accelerator(cpu=not ON_GPU), AutoTokenizer.from_pretrained(checkpoint)
    model = (model or AutoModelForCausalLM.from_pretrained(checkpoint)).to(accelerator.device)
    return AbstractVLLMGeneration(model, accelerator, tokenizer, **FIELDS | fields)


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

    sampler = VLLMTraceSampler(str(checkpoint), **sampling.ENGINE | ENGINE)
    return [asdict(trace) for trace in sampler.sample([prompt[:-1] for prompt in given], **call)]


def sleeping(generation, given: list[list[int]]) -> list[str]:
    """What happens in one `generate` with sleep mode on; sleep and waking are noted only (a CPU engine has none)."""
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
    generation.temperature, model = 0.0, model.to(generation.accelerator.device)
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

    generation.model, generation.mode = adapted(checkpoint).to(generation.accelerator.device), "server"
    pack = pack_tensors(generation._iter_named_params(), lambda item: item[1], 2**30)
    generation.mode = "colocate"
    weights = dict(unpack_tensor(pack.packed_tensor, pack.names, pack.shapes, pack.dtypes, pack.tensor_sizes))
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    plain.load_state_dict(weights, strict=not plain.config.tie_word_embeddings)
    ids = torch.arange(50)[None]
    with torch.no_grad():
        difference = plain(ids).logits - generation.model.cpu()(ids).logits
    return {"names": list(weights), "difference": difference.abs().max().item()}


def unknown(generation, checkpoint) -> str:
    """A peft wrapper whose name TRL does not take off."""
    from peft import LoraConfig

    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"])
    generation.model = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), config, adapter_name="mine")
    return refusal(generation.sync_weights)


def trained(checkpoint, folder: Path, **fields):
    """This package's GRPO trainer after three steps, its weights moved far each time, and what it saw."""
    from abscot_trl.training.grpo import AbstractGRPOTrainer
    from abscot_trl.training.grpo_config import AbstractGRPOConfig

    seen = []

    def reward(completion_ids, **_):
        seen.extend(completion_ids)
        return [float(sum(ids) % 5) for ids in completion_ids]

    fields |= {"use_vllm": True, "vllm_max_model_length": 256, "vllm_gpu_memory_utilization": SHARE}
    fields |= {"per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 3, "max_completion_length": ROOM}
    fields |= {"use_cpu": not ON_GPU, "bf16": False, "save_strategy": "no", "logging_steps": 1, "probe_steps": 2}
    args = AbstractGRPOConfig(str(folder), learning_rate=fields.pop("learning_rate", 3e-3), **fields)
    rows = [e for steps in (2, 4, 8) for e in chain_arithmetic(3, steps, 5, seed=0)]
    names = ("prompt", "gold", "source")
    data = Dataset.from_dict({name: [getattr(e, name) for e in rows] for name in names})
    trainer = AbstractGRPOTrainer(str(checkpoint), [reward], args, data, probes=data)
    trainer.train()
    return trainer, seen


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
    fields = {"vllm_enable_sleep_mode": ON_GPU, "temperature": 0.7, "trace_temperature": 1.2}
    trainer, found["trained"] = trained(checkpoint, Path(folder) / "grpo", **fields)
    found["log"] = [entry for entry in trainer.state.log_history if "loss" in entry]
    found["probes"] = [entry for entry in trainer.state.log_history if "probe/own" in entry]
    return found


def asleep(checkpoint: str, folder: str) -> dict:
    """An engine without weights and cache between rollouts: these, and the GPU's free bytes in and after each."""
    generation, free = backend(checkpoint, seed=3, enable_sleep_mode=True), {"awake": [], "asleep": []}
    generate, given, found = generation.llm.generate, prompts(checkpoint), {"free": free}

    def noted(*args, **kwargs):
        free["awake"].append(torch.cuda.mem_get_info()[0])
        return generate(*args, **kwargs)

    generation.llm.generate = noted
    found["calls"] = []
    for _ in range(2):
        found["calls"].append(generation.generate(given, None, 4))
        free["asleep"].append(torch.cuda.mem_get_info()[0])
    generation.model = adapted(checkpoint).to(generation.accelerator.device)
    found["adapted"] = generation.generate(given, None, 4)  # without a call of `sync_weights`
    return found


def there(checkpoint: str, folder: str, url: str, port: str) -> dict:
    """As `alone`'s sync of LoRA and token rows, but over NCCL to a server."""
    generation = backend(checkpoint, mode="server", server_base_url=url, group_port=int(port), seed=3)
    return synced(generation, adapted(checkpoint), prompts(checkpoint))


def sharded(checkpoint: str, folder: str, url: str, port: str) -> dict | None:
    """A model trained under ZeRO-3 and saved, and greedy rollouts by a server that its weights went to over NCCL."""
    from accelerate.utils import gather_object

    fields = {"vllm_mode": "server", "vllm_server_base_url": url, "vllm_group_port": int(port), "learning_rate": 0.01}
    trainer, seen = trained(checkpoint, Path(folder) / "grpo", **fields)
    generation, rank = trainer.vllm_generation, trainer.accelerator.process_index
    generation.temperature = 0.0
    generation.sync_weights()
    rollouts = [gather_object(part) for part in generation.generate(prompts(checkpoint)[rank * 100 :][:100], None, 4)]
    trainer.save_model(str(Path(folder) / "model"))
    plugin, processes = trainer.accelerator.state.deepspeed_plugin, trainer.accelerator.num_processes
    found = {"stage": plugin.zero_stage if plugin else None, "processes": processes}
    return found | {"seen": seen, "rollouts": rollouts} if rank == 0 else None


def beside(checkpoint: str, folder: str, url: str) -> dict | None:
    """
    Two processes, of 120 prompts each: on a server, then as one tensor-parallel engine of an adapted model.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object
    from trl.generation.vllm_client import VLLMClient

    from abscot_trl.traces.server import ServerTraceSampler
    from abscot_trl.traces.vllm import row_seed

    VLLMClient.init_communicator = lambda self, device: None
    given, found, rank = prompts(checkpoint), {}, PartialState(cpu=not ON_GPU).process_index
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


if __name__ == "__main__":
    job, output, *arguments = sys.argv[1:]
    found = {job.__name__: job for job in (alone, asleep, beside, there, sharded)}[job](*arguments)
    if found:
        Path(output).write_text(json.dumps(found))
