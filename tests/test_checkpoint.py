"""The vocabulary in a tokenizer, and what `abscot init` writes."""

import json
import re
import subprocess
import sys
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint, tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from abscot_trl.checkpoint import InitArguments, init_checkpoint, initial_rows, verify_checkpoint
from abscot_trl.data.prepare import tokenizer_digest
from abscot_trl.data.toy import toy_tokenizer
from abscot_trl.errors import Refused
from abscot_trl.examples import prompt_ids
from abscot_trl.storage import written_whole
from abscot_trl.traces.hf import HFTraceSampler
from abscot_trl.vocabulary import AbstractVocabulary


def base(folder, vocabulary: int, tied: bool = True):
    """A base model on disk; the toy tokenizer has 40 tokens."""
    tiny_model(vocabulary=vocabulary, tied=tied).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return str(folder)


SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "eos_token_id": 1}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 512, "bos_token_id": None, "pad_token_id": 0}


def glm_with_experts():
    """Its weights hold buffers."""
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    }
    return Glm4MoeForCausalLM(Glm4MoeConfig(**SIZES, num_key_value_heads=1, head_dim=32, **experts))


def gpt_neox():
    """Its head is `lm_head` in the model and `embed_out` in its files."""
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))


def test_names_and_ids():
    vocabulary = AbstractVocabulary()
    assert vocabulary.tokens[0] == "<TOKEN_A>" and vocabulary.tokens[25:28] == [
        "<TOKEN_Z>",
        "<TOKEN_AA>",
        "<TOKEN_AB>",
    ]
    assert vocabulary.tokens[-1] == "<TOKEN_BL>" and len(set(vocabulary.tokens)) == 64
    assert AbstractVocabulary(size=703).tokens[-1] == "<TOKEN_AAA>"
    tokenizer = toy_tokenizer()
    size = len(tokenizer)
    assert vocabulary.extend(tokenizer) == 66 and len(tokenizer) == size + 66
    ids = [*vocabulary.ids(tokenizer), vocabulary.begin_id(tokenizer), vocabulary.end_id(tokenizer)]
    assert sorted(ids) == list(range(size, size + 66))
    text = f"{vocabulary.begin}<TOKEN_BL><TOKEN_A>{vocabulary.end}7"
    encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoded[:4] == [ids[64], ids[63], ids[0], ids[65]]
    assert tokenizer.decode(encoded) == text and tokenizer.decode(encoded, skip_special_tokens=True) == "7"


QWEN = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
WHITESPACE = (
    "\n  {% if true %}\n  x\n {% endif %}\n\n lit {{ messages[0].content }}\n   \n\n"  # literal text at both ends
)
MACRO = "{% macro m() %}{{ enable_thinking }}|{% endmacro %}{% for x in messages %}{{ m() }}{% endfor %}\n"
USER = {"role": "user", "content": "7+4-2="}
CHATS = {
    "one": [USER],
    "system": [{"role": "system", "content": "1+1="}, USER],
    "turns": [USER, {"role": "assistant", "content": "9"}, {"role": "user", "content": "3+3="}],
}


@pytest.mark.parametrize("template", [toy_tokenizer().chat_template, QWEN, QWEN + "\n", WHITESPACE, MACRO])
@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
def test_chat_template_ends_in_begin_and_is_the_base_models_otherwise(template, messages):
    vocabulary, base_tokenizer, tokenizer = AbstractVocabulary(size=4), toy_tokenizer(), toy_tokenizer()
    base_tokenizer.chat_template = tokenizer.chat_template = template
    vocabulary.extend(tokenizer)
    for prompt, thinking in product((True, False), ({}, {"enable_thinking": True}, {"enable_thinking": False})):
        settings = {"tokenize": False, "add_generation_prompt": prompt}
        before = base_tokenizer.apply_chat_template(messages, **settings, **thinking)
        assert tokenizer.apply_chat_template(messages, **settings, **thinking, abstract=False) == before
        unthinking = base_tokenizer.apply_chat_template(messages, **settings, enable_thinking=False)
        end = vocabulary.begin if prompt else ""
        assert tokenizer.apply_chat_template(messages, **settings, **thinking) == unthinking + end
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt_ids(messages, tokenizer) == prompt_ids(messages, base_tokenizer)
    assert ids == [*prompt_ids(messages, tokenizer), vocabulary.begin_id(tokenizer)]


def test_several_chat_templates_are_refused():
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    with pytest.raises(ValueError, match=r"has 2 chat templates \(default, tool_use\)"):
        AbstractVocabulary().extend(tokenizer)
    assert "<TOKEN_A>" not in tokenizer.get_vocab()


@pytest.mark.slow
def test_the_model_card_runs_without_this_package(checkpoint, tmp_path):
    """Its first snippet, as it stands, in the checkpoint's folder: the trace and the answer of our own sampler."""
    card = (checkpoint / "README.md").read_text()
    snippet = re.search("```python\n(.*?)```", card, re.DOTALL)[1]
    (tmp_path / "snippet.py").write_text(f"{snippet}\nimport sys\nassert 'abscot_trl' not in sys.modules\n")
    command = [sys.executable, tmp_path / "snippet.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=checkpoint)
    assert done.returncode == 0, done.stderr
    shown, said = done.stdout.split("\n", 1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    vocabulary = AbstractVocabulary.load(checkpoint)
    sampler, prefix = HFTraceSampler(model, tokenizer, vocabulary), prompt_ids([USER], tokenizer)
    assert repr(USER["content"])[1:-1] in snippet
    [trace] = sampler.sample([prefix], vocabulary.m_max, vocabulary.m_min, temperature=0.0)
    assert shown == tokenizer.decode([*trace.token_ids, sampler.end])
    [answer] = sampler.answer([[*prefix, sampler.begin, *trace.token_ids, sampler.end]], max_new_tokens=256)
    assert said == tokenizer.decode(answer.token_ids, skip_special_tokens=True) + "\n"


def test_data_prepared_for_a_checkpoint_fits_its_descendants(tmp_path):
    out = init_checkpoint(InitArguments(base(tmp_path / "base", 64), str(tmp_path / "out"), codebook_size=8, m_max=9))
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokenizer.save_pretrained(tmp_path / "descendant")
    assert tokenizer_digest(tokenizer) == tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path / "descendant"))


@pytest.mark.parametrize("limits", [{"m_min": 5, "m_max": 4}, {"m_min": -1}, {"m_max": 0}, {"size": 0}])
def test_bad_limits(limits):
    with pytest.raises(ValueError, match="m_min|at least one"):
        AbstractVocabulary(**limits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [40, 64, 200])
def test_init_grows_never_shrinks_and_keeps_the_tie(tmp_path, rows, tied, capsys):
    source = base(tmp_path / "base", rows, tied)
    out = init_checkpoint(InitArguments(source, str(tmp_path / "out"), codebook_size=16, m_max=9, m_min=2))
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (source, out))
    old, new = before.get_input_embeddings().weight, after.get_input_embeddings().weight
    assert len(new) == max(rows, 40 + 18)
    assert torch.equal(new[:40], old[:40])
    assert torch.equal(new[58:], old[58:])
    head = after.get_output_embeddings().weight
    assert (head.data_ptr() == new.data_ptr()) == tied
    if not tied:
        assert torch.equal(head[:40], before.get_output_embeddings().weight[:40])
        fresh = head[40:58]
        assert fresh.norm(dim=1).min() > 0 and not torch.equal(fresh, new[40:58])
    assert AbstractVocabulary.load(out) == AbstractVocabulary(16, 2, 9)
    assert after.config.vocab_size == len(new)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert toy_tokenizer().chat_template in tokenizer.chat_template and len(tokenizer) == 58
    said, size = capsys.readouterr().out, sum(file.stat().st_size for file in out.iterdir())
    assert f"{source} with 18 more tokens: 16 of the codebook" in said and "a trace holds 2 to 9 codebook" in said
    assert f". {size / 1024:.0f} KiB on disk.\nnext: abscot data --tokenizer {out}" in said


def test_initialisations():
    rows = torch.randn(500, 32) * 3 + 1
    fresh = {name: initial_rows(rows, 64, name, torch.Generator().manual_seed(0)) for name in ("mean+noise", "normal")}
    assert (fresh["mean+noise"].mean(0) - rows.mean(0)).abs().max() < 0.3
    assert torch.allclose(fresh["mean+noise"].std(0).mean() / rows.std(0).mean(), torch.tensor(0.1), atol=0.01)
    assert torch.allclose(fresh["normal"].norm(dim=1), rows.norm(dim=1).mean())
    assert len(torch.unique(fresh["mean+noise"], dim=0)) == 64
    assert not initial_rows(rows, 3, "zeros", torch.Generator()).any()
    with pytest.raises(ValueError, match="initialisation"):
        initial_rows(rows, 3, "ones", torch.Generator())


def test_bad_bases_are_refused_and_leave_nothing(tmp_path):
    source = base(tmp_path / "base", 64)
    first = init_checkpoint(InitArguments(source, str(tmp_path / "once"), codebook_size=8))
    with pytest.raises(ValueError, match=r"already holds '<TOKEN_A>' \(10 of 10"):
        init_checkpoint(InitArguments(str(first), str(tmp_path / "twice"), codebook_size=8))
    with pytest.raises(Refused, match="once"):
        init_checkpoint(InitArguments(source, str(first), codebook_size=8))
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    tiny_model().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="no chat template"):
        init_checkpoint(InitArguments(str(tmp_path / "plain"), str(tmp_path / "twice")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "once", "plain"]


def test_checkpoints_that_do_not_agree(checkpoint, tmp_path):
    with pytest.raises(Refused, match="abstract_vocabulary.json is missing.*abscot init"):
        verify_checkpoint(base(tmp_path / "base", 64))
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    for text in ("{", "[" * 100_000, '{"size": ' + "9" * 5000 + "}", '{"size": "8", "m_min": 0, "m_max": 6}'):
        (broken / "abstract_vocabulary.json").write_text(text)
        with pytest.raises(Refused, match="damaged.* run `abscot init` again"):
            AbstractVocabulary.load(broken)
    AbstractVocabulary(size=9).save(broken)
    with pytest.raises(ValueError, match="has no '<TOKEN_I>'"):
        verify_checkpoint(broken)
    AbstractVocabulary(size=8).save(broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    expected = AutoModelForCausalLM.from_pretrained(checkpoint).get_input_embeddings().weight[40:50] + 1
    with pytest.raises(ValueError):
        verify_checkpoint(broken, expected)


@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("qwen3", False), ("llama", True), ("granite", True)])
def test_what_weights_hold_is_checked_without_loading_them(tmp_path, family, tied, monkeypatch):
    make_checkpoint(tmp_path / "model", family, tied)
    path, file = tmp_path / "model", tmp_path / "model" / "model.safetensors"
    expected = AutoModelForCausalLM.from_pretrained(path).get_input_embeddings().weight[40:50].detach()
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    assert verify_checkpoint(path, expected).size == 8
    with pytest.raises(Refused, match="rows on disk differ"):
        verify_checkpoint(path, expected + 1)
    whole, rows = load_file(file), "model.embed_tokens.weight"
    assert ("lm_head.weight" in whole) != tied
    wrong = {
        "weights hold .* numbers, a model of its config.json": {k: v for k, v in whole.items() if "mlp" not in k},
        "49 embedding rows do not reach token id 49": whole | {rows: whole[rows][:49].clone()},
        "weights hold no model.embed_tokens": {k: v for k, v in whole.items() if k != rows},
    }
    if tied:  # ZeRO-2 writes the head beside the embedding
        save_file(whole | {"lm_head.weight": whole[rows].clone()}, file, metadata={"format": "pt"})
        assert verify_checkpoint(path, expected).size == 8
        wrong["tie_word_embeddings is True, the weights say otherwise"] = whole | {"lm_head.weight": whole[rows] + 1}
    else:
        save_file(whole | {"lm_head.weight": whole[rows].clone()}, file, metadata={"format": "pt"})
        assert verify_checkpoint(path, expected).size == 8  # untied, though equal
        short = {k: v for k, v in whole.items() if k != "lm_head.weight"}
        wrong["tie_word_embeddings is False, the weights say otherwise"] = short
    for words, tensors in wrong.items():
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(Refused, match=words):
            verify_checkpoint(path)


@pytest.mark.parametrize("make", [glm_with_experts, gpt_neox])
def test_weights_that_files_name_otherwise_and_saved_buffers_are_counted(tmp_path, make):
    make().save_pretrained(tmp_path / "base")
    toy_tokenizer().save_pretrained(tmp_path / "base")
    out = init_checkpoint(InitArguments(str(tmp_path / "base"), str(tmp_path / "out"), codebook_size=8, m_max=9))
    AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).save_pretrained(out, max_shard_size="40KB")
    (out / "model.safetensors").unlink(missing_ok=True)
    assert len(list(out.glob("model-*.safetensors"))) > 1 and verify_checkpoint(out).size == 8


def test_written_whole(tmp_path):
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "out") as folder:
        (folder / "file").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with written_whole(tmp_path / "out") as folder:
        (folder / "file").write_text("whole")
    assert (tmp_path / "out" / "file").read_text() == "whole"
