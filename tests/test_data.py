"""Preparation: what is kept, what is refused, and that nothing goes missing between."""

import json
from pathlib import Path

import datasets
import pytest
from tiny import row, write_jsonl
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerFast

from abscot_trl.data.prepare import DataArguments, load_prepared, prepare, tokenizer_digest
from abscot_trl.data.rows import cut_cot
from abscot_trl.data.toy import CHAT_TEMPLATE, toy_tokenizer
from abscot_trl.errors import Refused
from abscot_trl.examples import cot_columns
from abscot_trl.vocabulary import AbstractVocabulary

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# Lengths by the toy tokenizer: prompt <user> + characters + <assistant>; cot + newline; answer + <eos>.
ROWS = [
    row("<think>12345</think>6", id="short"),  # 5, 6, 2
    row("<think>0123456789</think>6", id="long cot"),  # 5, 11, 2
    row("<think>1</think>6", id="tiny cot"),  # 5, 2, 2
    row("<think>12345</think>1234567", id="long answer"),  # 5, 6, 8
    row("<think>12345</think>6", earlier=[("user", "1234567890")], id="long prompt"),  # 12, 6, 2
    row("<think>12345</think>6", dataset_source="chat", id="other source"),
    row("6", id="no thought"),
    row("<think></think>6", id="empty thought"),
    {"messages": None, "id": "broken"},
]


def arguments(tmp_path, tokenizer_folder, rows=ROWS, **kwargs):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    return DataArguments(
        data=path, tokenizer=tokenizer_folder, output_dir=str(tmp_path / "out"), shuffle_buffer=0, **kwargs
    )


def assert_adds_up(counts):
    assert counts["rows_read"] == counts["rows_kept"] + sum(counts["rejected"].values()) + sum(
        counts["filtered"].values()
    )


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory):
    """A BPE over bytes as real checkpoints have: tokens that end inside a character or hold a newline and more."""
    folder = tmp_path_factory.mktemp("byte_level")
    tokenizer = Tokenizer(models.BPE())
    # No regex: merges run over spaces and newlines, so that where a text ends changes the tokens before it.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([cot for cot in LONG_COTS for _ in range(3)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", chat_template=CHAT_TEMPLATE)
    vocabulary = AbstractVocabulary(size=8, m_max=6)
    vocabulary.extend(fast)
    fast.save_pretrained(folder)
    vocabulary.save(folder)
    return str(folder)


LONG_COTS = [
    "\n\n".join(f"Step {i} : √{i} ≤ {i * i} .\n  So x{i} ≈ {i / 7:.3f} , 数{i}🙂 ." for i in range(k, k + 12))
    for k in range(6)
]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_prepare_counts_every_row(tmp_path, tokenizer_folder, num_proc):
    args = arguments(
        tmp_path,
        tokenizer_folder,
        sources=["sums"],
        max_prompt_tokens=11,
        max_cot_tokens=10,
        min_cot_tokens=3,
        max_answer_tokens=7,
        num_proc=num_proc,
    )
    counts = prepare(args)
    assert counts["rows_read"] == 9 and counts["rows_kept"] == 1 and counts["cut"] == 0
    assert counts["rejected"] == {"no_think": 1, "empty_think": 1, "malformed": 1}
    assert counts["filtered"] == {
        "source": 1,
        "prompt_too_long": 1,
        "cot_too_long": 1,
        "cot_too_short": 1,
        "answer_too_long": 1,
    }
    assert counts["sources"] == {"sums": 1}
    lengths = {name: values["max"] for name, values in counts["lengths"].items()}
    assert lengths == {"prompt": 5, "cot": 6, "answer": 2, "total": 5 + 6 + 2 + 8}
    assert counts["settings"]["max_prompt_tokens"] == 11
    data, read_back = load_prepared(args.output_dir)
    assert read_back == counts
    tokenizer = toy_tokenizer()
    (kept,) = data
    assert (kept["id"], kept["source"], kept["gold"]) == ("short", "sums", None)
    assert json.loads(kept["prompt"]) == [{"role": "user", "content": "12="}]
    decoded = {name: tokenizer.decode(kept[f"{name}_ids"]) for name in ("prompt", "cot", "answer")}
    assert {name: text.replace(" ", "") for name, text in decoded.items()} == {
        "prompt": "<user>12=<assistant>",
        "cot": "12345\n",
        "answer": "6<eos>",
    }


@pytest.mark.parametrize(
    ("overlong", "cot"), [("cut_cot_head", "6789"), ("cut_cot_middle", "0129"), ("cut_cot_tail", "0123")]
)
def test_only_the_cot_is_cut_to_fit_beside_the_trace(tmp_path, tokenizer_folder, overlong, cot):
    # 5 of the prompt, 2 of the answer and 8 of the trace leave 5 of 20 tokens
    counts = prepare(arguments(tmp_path, tokenizer_folder, max_total_tokens=20, overlong=overlong))
    data, _ = load_prepared(tmp_path / "out")
    kept = {r["id"]: r for r in data}
    assert set(kept) == {"short", "long cot", "tiny cot", "other source"}
    assert len(kept["long cot"]["cot_ids"]) == 5
    assert kept["long cot"]["cot"].replace(" ", "").replace("\n", "") == cot
    assert counts["lengths"]["total"]["max"] == 20
    assert counts["filtered"]["total_too_long"] == 2 and counts["cut"] == 3
    assert_adds_up(counts)


def test_total_leaves_room_for_the_trace(tmp_path, tokenizer_folder):
    counts = prepare(arguments(tmp_path, tokenizer_folder, rows=ROWS[:2], max_total_tokens=5 + 6 + 2 + 8))
    assert counts["rows_kept"] == 1 and counts["filtered"] == {"total_too_long": 1}


@pytest.mark.parametrize("overlong", ["cut_cot_head", "cut_cot_middle", "cut_cot_tail"])
def test_text_and_ids_of_a_cut_cot_agree(tmp_path, byte_level_folder, overlong):
    tokenizer = AutoTokenizer.from_pretrained(byte_level_folder)
    rows = [row(f"<think>{cot}</think>6", id=str(i)) for i, cot in enumerate(LONG_COTS)]
    for limit in range(4, 60):
        folder = tmp_path / str(limit)
        folder.mkdir()
        counts = prepare(arguments(folder, byte_level_folder, rows=rows, max_cot_tokens=limit, overlong=overlong))
        data, _ = load_prepared(folder / "out")
        assert counts["lengths"]["cot"]["max"] <= limit
        assert_adds_up(counts)
        for kept in data:
            text = kept["cot"].rstrip() + "\n"
            assert kept["cot_ids"] == tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            columns = cot_columns(kept["cot"], tokenizer)
            assert {name: kept[name] for name in columns} == columns
            assert kept["step_ends"][-1] == len(kept["cot_ids"]) - 1
            assert limit - 8 < len(kept["cot_ids"]) <= limit  # not cut by more than the fit asks for
            whole = LONG_COTS[int(kept["id"])]
            if overlong == "cut_cot_head":
                assert whole.endswith(kept["cot"])
            if overlong == "cut_cot_tail":
                assert whole.startswith(kept["cot"])


def test_a_cut_cot_is_no_shorter_than_allowed(tmp_path, tokenizer_folder):
    lengths = {"min_cot_tokens": 5, "max_cot_tokens": 5, "overlong": "cut_cot_tail"}
    counts = prepare(arguments(tmp_path, tokenizer_folder, rows=ROWS[:3], **lengths))
    assert counts["lengths"]["cot"] == {"mean": 5, "median": 5, "p90": 5, "max": 5} and counts["cut"] == 2
    assert counts["filtered"] == {"cot_too_short": 1}


def test_a_cut_that_leaves_no_text_drops_the_row(tmp_path, tokenizer_folder):
    # one token is the newline's alone
    with pytest.raises(ValueError, match='"filtered": {"cot_too_long": 3}'):
        prepare(arguments(tmp_path, tokenizer_folder, rows=ROWS[:3], max_cot_tokens=1, overlong="cut_cot_tail"))


def test_cut_cot():
    ids = list(range(10))
    assert cut_cot(ids, 3, "cut_cot_head") == [7, 8, 9]
    assert cut_cot(ids, 3, "cut_cot_middle") == [0, 1, 9]
    assert cut_cot(ids, 1, "cut_cot_middle") == [0]
    assert cut_cot(ids, 3, "cut_cot_tail") == [0, 1, 2]


def test_a_limit_stops_early(tmp_path, tokenizer_folder):
    rows = [r for i in range(300) for r in (row(id=f"{i}"), row("none"))]
    counts = prepare(arguments(tmp_path, tokenizer_folder, rows=rows, limit=50))
    assert (counts["rows_kept"], counts["rows_read"], counts["rejected"]) == (50, 99, {"no_think": 49})
    data, _ = load_prepared(tmp_path / "out")
    assert data["id"][:] == [str(i) for i in range(50)]


def test_nothing_kept_says_why_and_leaves_nothing(tmp_path, tokenizer_folder):
    args = arguments(tmp_path, tokenizer_folder, max_prompt_tokens=1)
    with pytest.raises(ValueError, match='no row of .*rows.jsonl is kept: .*"rows_read": 9.*"prompt_too_long": 6'):
        prepare(args)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
    rows = [{"question": f"{i}?", "cot": "c", "answer": "1", "gold": "1"} for i in range(3)]
    with pytest.raises(Refused, match='"malformed": 3.*; of the first: .*lacks prompt'):
        prepare(arguments(tmp_path, tokenizer_folder, rows=rows, data_format="problems"))


def test_output_is_never_overwritten_nor_half_written(tmp_path, tokenizer_folder):
    args = arguments(tmp_path, tokenizer_folder)
    prepare(args)
    before = (tmp_path / "out" / "counts.json").read_text()
    with pytest.raises(Refused, match="out exists already"):
        prepare(args)
    assert (tmp_path / "out" / "counts.json").read_text() == before
    broken = DataArguments(str(tmp_path / "broken.jsonl"), tokenizer_folder, str(tmp_path / "other"))
    Path(broken.data[0]).write_text(json.dumps(row()) + "\n{")
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 2"):
        prepare(broken)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.jsonl", "out", "rows.jsonl"]


def test_a_second_preparation_reuses_nothing(tmp_path, tokenizer_folder):
    first = prepare(arguments(tmp_path, tokenizer_folder, rows=ROWS[:1]))
    (tmp_path / "out").rename(tmp_path / "first")
    second = prepare(arguments(tmp_path, tokenizer_folder, rows=ROWS[1:3]))
    assert (first["rows_kept"], second["rows_kept"]) == (1, 2)
    assert [len(load_prepared(tmp_path / name)[0]) for name in ("first", "out")] == [1, 2]


def test_prompts_the_chat_template_refuses_are_counted(tmp_path, tokenizer_folder):
    tokenizer, vocabulary = toy_tokenizer(), AbstractVocabulary(size=8, m_max=6)
    vocabulary.extend(tokenizer)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + tokenizer.chat_template
    )
    tokenizer.save_pretrained(tmp_path / "strict")
    vocabulary.save(tmp_path / "strict")
    rows = [row(earlier=[("system", "1"), ("user", "1")]), row()]
    counts = prepare(arguments(tmp_path, str(tmp_path / "strict"), rows=rows))
    assert counts["rows_kept"] == 1 and counts["filtered"] == {"chat_template": 1}


def test_problems_without_a_solution_are_not_trained_on(tmp_path, tokenizer_folder):
    rows = [
        {"id": "g", "prompt": "1+1=", "cot": "1+1=2", "answer": "\\boxed{2}", "gold": "2"},
        {"problem": "1+2=", "answer": "3"},
        {"nothing": 1},
    ]
    counts = prepare(arguments(tmp_path, tokenizer_folder, rows=rows, data_format="problems"))
    assert counts["rejected"] == {"empty_think": 1, "malformed": 1}
    data, _ = load_prepared(tmp_path / "out")
    assert data["gold"][:] == ["2"] and len(data[0]["answer_ids"]) == 4


def test_ids_are_never_empty_and_repeats_are_counted(tmp_path, tokenizer_folder):
    rows = [
        row("none", id=None),
        row(id=None),
        row(id="", dataset_source=None),
        row(id="a"),
        row(id="a"),
        row(id="a"),
        row("none", id="a"),
    ]
    counts = prepare(arguments(tmp_path, tokenizer_folder, rows=rows))
    data, _ = load_prepared(tmp_path / "out")
    assert data["id"][:] == ["sums-2", "row-3", "a", "a", "a"]
    assert counts["duplicate_ids"] == 2


@pytest.mark.parametrize("data_format", ["dolci", "problems"])
def test_text_that_is_no_unicode_is_malformed(tmp_path, tokenizer_folder, data_format):
    if data_format == "dolci":
        rows = [
            row(earlier=[("user", "1\ud800")]),
            row("<think>1\ud800</think>2"),
            row("<think>1</think>2\udfff"),
            row(id="\ud800"),
            row(dataset_source="\ud800"),
            row(id="whole", note="\ud800"),
        ]
    else:
        whole = {"prompt": "1", "cot": "2", "answer": "3", "gold": "3", "id": "whole", "source": "s"}
        rows = [whole | {name: "\ud800"} for name in whole] + [whole]
    counts = prepare(arguments(tmp_path, tokenizer_folder, rows=rows, data_format=data_format))
    assert counts["rejected"] == {"malformed": len(rows) - 1}
    assert load_prepared(tmp_path / "out")[0]["id"][:] == ["whole"]


@pytest.mark.parametrize("token", ["<eos>", "<unk>", "<assistant>", "<TOKEN_C>", "<beginabstract>", "<endabstract>"])
def test_prompts_that_quote_a_control_token_are_dropped(tmp_path, tokenizer_folder, token):
    rows = [
        row(id="plain"),
        row(earlier=[("user", f"12{token}3")]),
        row(earlier=[("system", token), ("user", "12")]),
        row(earlier=[("user", "1"), ("assistant", token), ("user", "2")]),
        row(earlier=[("user", "1"), (f"tool{token}", "1"), ("user", "2")]),
        row(earlier=[("user", token[1:] + token[:-1].lower())], id="no token"),
    ]
    counts = prepare(arguments(tmp_path, tokenizer_folder, rows=rows))
    assert counts["filtered"] == {"special_token_in_prompt": 4}
    assert load_prepared(tmp_path / "out")[0]["id"][:] == ["plain", "no token"]
    assert_adds_up(counts)


def test_prepared_data_knows_its_tokenizer(tmp_path, tokenizer_folder):
    counts = prepare(arguments(tmp_path, tokenizer_folder))
    same = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert counts["tokenizer"] == tokenizer_digest(same) and len(counts["tokenizer"]) == 64
    assert load_prepared(tmp_path / "out", same)[1] == counts

    templated, extended = (AutoTokenizer.from_pretrained(tokenizer_folder) for _ in range(2))
    templated.chat_template += " "
    extended.add_tokens(["more"])
    for other in (templated, extended):
        with pytest.raises(ValueError, match="prepare the data again with this checkpoint's tokenizer") as error:
            load_prepared(tmp_path / "out", other)
        assert str(tmp_path / "out") in str(error.value) and tokenizer_folder in str(error.value)


def changed_normalizer(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def changed_pre_tokenizer(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()


def changed_added_token(tokenizer):
    tokenizer.backend_tokenizer.add_tokens([AddedToken("<TOKEN_A>", lstrip=True)])


def changed_eos(tokenizer):
    tokenizer.eos_token = "<unk>"


@pytest.mark.parametrize(
    "change", [changed_normalizer, changed_pre_tokenizer, changed_added_token, changed_eos], ids=lambda f: f.__name__
)
def test_whatever_changes_ids_is_another_tokenizer(tmp_path, tokenizer_folder, change):
    prepare(arguments(tmp_path, tokenizer_folder))
    other = AutoTokenizer.from_pretrained(tokenizer_folder)
    change(other)
    with pytest.raises(Refused, match="was not prepared with the tokenizer"):
        load_prepared(tmp_path / "out", other)


def test_what_changes_no_ids_is_the_same_tokenizer(tmp_path, tokenizer_folder, byte_level_folder):
    """Padding and truncation are left in a tokenizer by who used it last; saved and loaded again it is the same."""
    for folder in (tokenizer_folder, byte_level_folder):
        used = AutoTokenizer.from_pretrained(folder)
        digest = tokenizer_digest(used)
        used.pad_token = used.eos_token
        used(["1", "2 3"], padding=True, truncation=True, max_length=1, split_special_tokens=True)
        used.save_pretrained(tmp_path / "again")
        assert digest == tokenizer_digest(used) == tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path / "again"))


def test_prepared_data_is_validated_once_a_process(tmp_path, tokenizer_folder, monkeypatch):
    """Data that have changed since are validated again."""
    prepare(arguments(tmp_path, tokenizer_folder))
    validated, validate = [], datasets.table.Table.validate
    monkeypatch.setattr(datasets.table.Table, "validate", lambda *a, **kw: validated.append(a) or validate(*a, **kw))
    first, again = (load_prepared(tmp_path / "out")[0] for _ in range(2))
    assert first[:] == again[:] and len(validated) == 1
    (file,) = (tmp_path / "out").glob("*.arrow")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Refused, match="is damaged"):
        load_prepared(tmp_path / "out")
    file.write_bytes(whole)
    assert load_prepared(tmp_path / "out")[0][:] == first[:]


def test_data_of_an_earlier_version_is_refused(tmp_path, tokenizer_folder):
    prepare(arguments(tmp_path, tokenizer_folder))
    data, counts = load_prepared(tmp_path / "out")
    data.remove_columns(["step_ends", "step_lengths"]).save_to_disk(tmp_path / "old")
    (tmp_path / "old" / "counts.json").write_text(json.dumps(counts))
    with pytest.raises(Refused, match="old lacks step_ends, step_lengths.*prepare the data again"):
        load_prepared(tmp_path / "old")


@pytest.mark.parametrize("files", [{".notes": "mine"}, {".git/config": "mine"}, {"settings.json": "{}", "a": "mine"}])
def test_a_folder_named_as_the_parts_that_is_not_ours_stays(tmp_path, tokenizer_folder, files):
    parts = tmp_path / "out.parts"
    for name, text in files.items():
        (parts / name).parent.mkdir(parents=True, exist_ok=True)
        (parts / name).write_text(text)
    with pytest.raises(Refused, match="out.parts"):
        prepare(arguments(tmp_path, tokenizer_folder))
    assert {str(p.relative_to(parts)): p.read_text() for p in parts.rglob("*") if p.is_file()} == files


@pytest.mark.slow
@real_data
def test_prepare_real_rows(tmp_path, tokenizer_folder):
    counts = prepare(
        DataArguments(
            data=str(DATA / "think_sft_sample.parquet"),
            tokenizer=tokenizer_folder,
            output_dir=str(tmp_path / "out"),
            max_total_tokens=4096,
        )
    )
    assert counts["rows_read"] == 651
    assert counts["rejected"] == {"empty_think": 24, "no_think": 15, "unclosed_think": 14, "empty_answer": 10}
    assert counts["lengths"]["total"]["max"] <= 4096
    assert_adds_up(counts)
    assert sum(counts["sources"].values()) == counts["rows_kept"] == len(load_prepared(tmp_path / "out")[0]) > 100


def test_bad_arguments(tmp_path, tokenizer_folder):
    with pytest.raises(ValueError, match="overlong must be one of drop, .*got 'cut'"):
        arguments(tmp_path, tokenizer_folder, overlong="cut")
    limits = ("prompt", "max"), ("cot", "max"), ("cot", "min"), ("answer", "max"), ("total", "max")
    for name in ("limit", "num_proc", *(f"{end}_{part}_tokens" for part, end in limits)):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            arguments(tmp_path, tokenizer_folder, **{name: 0})
    for name in ("shuffle_buffer", "seed"):
        with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
            DataArguments("a.jsonl", "t", "o", **{name: -1})
    with pytest.raises(Refused, match="run `abscot init` first"):
        prepare(arguments(tmp_path, str(tmp_path)))
    with pytest.raises(Refused, match="is not prepared data .*run `abscot data` first"):
        load_prepared(tmp_path)
    (args,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses(
        ["--data", "a.jsonl", "b.jsonl", "--tokenizer", "t", "--output_dir", "o", "--limit", "5", "--sources", "s"]
    )
    assert (args.data, args.limit, args.sources) == (["a.jsonl", "b.jsonl"], 5, ["s"])
