"""Encoding, labels, packing: counted by hand, and against the sum over unpacked rows."""

import pytest
import torch
from transformers import tokenization_utils_base

from abscot_trl.data.toy import chain_arithmetic, toy_tokenizer
from abscot_trl.examples import IGNORE, Collator, Encoder, Segment, answer_ids, cot_columns, pack, prompt_ids
from abscot_trl.vocabulary import AbstractVocabulary

CODEBOOK, BEGIN, END = [100, 101, 102], 90, 91
X, C, Y = [1, 2, 3], [4, 5, 6, 7], [8, 9]


def test_bottleneck_row_by_hand():
    row = Encoder(CODEBOOK, BEGIN, END)(X, C, [2, 0], Y)
    assert row["input_ids"] == [1, 2, 3, 4, 5, 6, 7, 90, 102, 100, 91, 8, 9]
    assert row["labels"] == [IGNORE] * 8 + [102, 100, 91, 8, 9]
    assert row["segment_ids"] == [1] * 3 + [2] * 4 + [3] * 4 + [4] * 2
    assert row["position_ids"] == list(range(13))
    letter = Encoder(CODEBOOK, BEGIN, END, supervise_end=False)(X, C, [2, 0], Y)
    assert letter["labels"] == [IGNORE] * 8 + [102, 100, IGNORE, 8, 9]


def test_discrete_row_by_hand():
    row = Encoder(CODEBOOK, BEGIN, END, channel="discrete")(X, C, [2, 0], Y)
    assert row["input_ids"] == [1, 2, 3, 4, 5, 6, 7, 90, 102, 100, 91, 90, 102, 100, 91, 8, 9]
    assert row["labels"] == [IGNORE] * 8 + [102, 100, 91] + [IGNORE] * 4 + [8, 9]
    assert row["segment_ids"] == [1] * 3 + [2] * 4 + [5] * 4 + [6] * 4 + [4] * 2
    assert row["position_ids"] == [*range(11), 7, 8, 9, 10, 11, 12]


def test_rows_without_cot_or_trace():
    encoder = Encoder(CODEBOOK, BEGIN, END, channel="discrete")
    distillation = encoder(X, None, [1], Y)
    assert distillation["segment_ids"] == [1] * 3 + [3] * 3 + [4] * 2
    assert distillation["labels"] == [IGNORE] * 4 + [101, 91, 8, 9]
    assert encoder(X, None, None, Y)["labels"] == [IGNORE] * 3 + Y
    verbal = encoder(X, C, None, Y)
    assert verbal["labels"] == [IGNORE] * 3 + C + Y
    assert Segment.COT not in verbal["segment_ids"]  # y may read c here
    empty = encoder(X, C, [], Y)
    assert empty["input_ids"].count(BEGIN) == 2 and len(empty["labels"]) == len(empty["input_ids"])


def test_bad_rows_are_refused():
    encoder = Encoder(CODEBOOK, BEGIN, END)
    for trace in ([3], [-1]):
        with pytest.raises(ValueError, match="outside the codebook of 3"):
            encoder(X, C, trace, Y)
    with pytest.raises(ValueError, match="channel"):
        Encoder(CODEBOOK, BEGIN, END, channel="both")
    with pytest.raises(ValueError, match="max_length=5"):
        pack([encoder(X, C, [1], Y)], 5)


def test_packing_loses_nothing_and_wastes_little():
    encoder = Encoder(CODEBOOK, BEGIN, END)
    generator = torch.Generator().manual_seed(0)
    rows = [
        encoder([1] * int(n), [2] * int(2 * n), [0] * int(n % 7), [3, i])
        for i, n in enumerate(torch.randint(1, 40, (300,), generator=generator))
    ]
    packed = pack(rows, 256)
    assert all(len(row["input_ids"]) <= 256 for row in packed)
    documents = []
    for row in packed:
        for number in range(1, max(row["document_ids"]) + 1):
            at = [i for i, d in enumerate(row["document_ids"]) if d == number]
            assert at == list(range(at[0], at[-1] + 1))
            documents.append([row["input_ids"][i] for i in at])
    assert sorted(documents) == sorted(row["input_ids"] for row in rows)
    tokens = sum(len(row["input_ids"]) for row in rows)
    assert tokens / (256 * len(packed)) > 0.95


def test_collator_pads_without_labels():
    encoder = Encoder(CODEBOOK, BEGIN, END)
    batch = Collator(0, 128)([encoder(X, C, [1], Y), encoder(X, None, [1], Y, weight=0.5)])
    assert batch["input_ids"].shape == (2, 128)
    assert batch["attention_mask"].sum(1).tolist() == [12, 8]
    pad = batch["segment_ids"] == Segment.PAD
    assert (batch["labels"][pad] == IGNORE).all() and (batch["document_ids"][pad] == 0).all()
    assert batch["loss_weights"][1].sum() == 4.0


def test_text_to_ids():
    tokenizer = toy_tokenizer()
    vocabulary = AbstractVocabulary(size=8)
    vocabulary.extend(tokenizer)
    example = chain_arithmetic(1, 6, 5, 0)[0]
    x = prompt_ids(example.prompt, tokenizer)
    assert tokenizer.decode(x).endswith("<assistant>") and example.prompt[0]["content"] in tokenizer.decode(x)
    c = cot_columns(example.cot, tokenizer)["cot_ids"]
    assert len(c) == 36 and tokenizer.decode(c)[-1] == "\n"
    assert answer_ids(example.answer, tokenizer)[-1] == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS"):
        answer_ids(example.answer, tokenizer)


def test_long_rows_are_not_warned_of(monkeypatch):
    """Rows longer than the model are counted and left out here; transformers speaks of errors to come."""
    tokenizer, warned = toy_tokenizer(), []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", warned.append)
    tokenizer.model_max_length = 3
    text = "1 + 1 = 2 ; 2 + 2 = 4"
    rows = [answer_ids(text, tokenizer), cot_columns(text, tokenizer)["cot_ids"]]
    rows.append(prompt_ids([{"role": "user", "content": text}], tokenizer))
    assert min(map(len, rows)) > 3 and warned == []


def test_chain_arithmetic_is_right():
    """Each CoT recomputed by Python, the gold being its last value; problems distinct and seeded."""
    examples = chain_arithmetic(500, 6, 5, seed=3)
    for example in examples:
        text = example.prompt[0]["content"]
        for line in example.cot.splitlines():
            left, right = line.rstrip(";").split("=")
            assert eval(left) % 5 == int(right)
        assert eval(text.rstrip("=")) % 5 == int(example.gold)
    assert len({example.id for example in examples}) == 500
    assert examples == chain_arithmetic(500, 6, 5, seed=3) != chain_arithmetic(500, 6, 5, seed=4)
    with pytest.raises(ValueError, match="distinct problems"):
        chain_arithmetic(1000, 2, 2, seed=0)
