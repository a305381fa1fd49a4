"""
lm_eval and lighteval themselves on a local task: their answers are those of `abscot evaluate` after every swap, and
what they cannot have is refused. lighteval is no part of the pinned set, with which it does not start
(evaluation/README.md): LIGHTEVAL_PYTHON names the python of an environment that has it.
"""

import json
import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name

import pyarrow.parquet as pq
import pytest
import yaml
from sampling import ENGINE, ENVIRONMENT, need_vllm
from transformers import AutoTokenizer

from abscot_trl.data.problems import load_problems
from abscot_trl.data.toy import chain_arithmetic, write_problems
from abscot_trl.errors import Refused
from abscot_trl.evaluation.arguments import EvaluateArguments, HarnessArguments
from abscot_trl.evaluation.evaluate import evaluate
from abscot_trl.examples import prompt_ids
from abscot_trl.traces.hf import HFTraceSampler
from abscot_trl.vocabulary import AbstractVocabulary

SWAPS = ["own", "random", "shuffled", "other", "none", "cut:2"]
GRADE = """
from abscot_trl.evaluation.grading import score

def grade(doc, results):
    return {"exact_match": score(results[0], doc["gold"], doc["source"])}
"""
LIGHTEVAL = """
from lighteval.metrics.metrics import Metrics
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc

def prompt(row, name=None):
    return Doc(task_name=name, query=row["prompt"], choices=[row["gold"]], gold_index=0)

TASKS_TABLE = [
    LightevalTaskConfig(
        "chain", prompt, "{folder}", "default", [Metrics.exact_match], hf_avail_splits=["test"],
        evaluation_splits=["test"], generation_size=10, stop_sequence=[";"],
    )
]
"""
ROOT = Path(__file__).resolve().parents[1]


def answers_of(folder, swap: str) -> list[dict]:
    answers = map(json.loads, (Path(folder) / "answers.jsonl").read_text().splitlines())
    return [answer for answer in answers if answer["swap"] == swap]


@pytest.fixture(scope="module")
def evaluated(checkpoint, tmp_path_factory):
    """40 problems, half of them with the model's own answer as gold; `abscot evaluate` of them with every swap."""
    folder = tmp_path_factory.mktemp("harness")
    problems = chain_arithmetic(40, 4, 5, seed=0)
    arguments = EvaluateArguments(
        model=str(checkpoint),
        problems=write_problems(folder / "problems.jsonl", problems),
        output_dir=str(folder / "first"),
        swaps=["own"],
        instruction=False,
        max_new_tokens=10,
    )
    evaluate(arguments)
    said = [answer["response"] for answer in answers_of(folder / "first", "own")]
    golds = [text if i % 2 and text else p.gold for i, (p, text) in enumerate(zip(problems, said, strict=True))]
    write_problems(folder / "problems.jsonl", [replace(p, gold=g) for p, g in zip(problems, golds, strict=True)])
    arguments = replace(arguments, swaps=SWAPS, output_dir=str(folder / "out"))
    return arguments, {row["swap"]: row for row in evaluate(arguments)}


@pytest.fixture
def lm_eval():
    return pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'lm_eval>=0.4.13'")


@pytest.fixture
def run(lm_eval, checkpoint, evaluated, tmp_path):
    """lm_eval in this process on a task over the problems' file; the task's fields, then lm_eval's."""

    from lm_eval.tasks import TaskManager

    def run(model: dict, task: dict | None = None, **options) -> dict:
        data = {"data_files": {"test": evaluated[0].problems}, "cache_dir": str(tmp_path / "cache")}
        fields = {"task": "chain", "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        fields |= {"output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{gold}}"}
        fields["metric_list"] = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
        fields["generation_kwargs"] = {"until": [], "max_gen_toks": 10, "do_sample": False}
        (tmp_path / "tasks").mkdir(exist_ok=True)
        (tmp_path / "tasks" / "grade.py").write_text(GRADE)
        text = yaml.safe_dump(fields | (task or {})) + "process_results: !function grade.grade\n" * (not task)
        (tmp_path / "tasks" / "chain.yaml").write_text(text)
        manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
        resolve_name("abscot_trl.evaluation.harness_lm_eval")  # registers the model
        options = {"apply_chat_template": True, "bootstrap_iters": 0} | options
        arguments = {"pretrained": str(checkpoint), **model}
        return lm_eval.simple_evaluate("abscot", arguments, ["chain"], task_manager=manager, **options)

    return run


def responses(results: dict) -> list[str]:
    samples = sorted(results["samples"]["chain"], key=lambda sample: sample["doc_id"])
    return [response for sample in samples for response in sample["resps"][0]]


def tasks(results: dict) -> dict:
    return results["config"]["abscot"]["tasks"]["chain"]


@pytest.mark.parametrize("swap", SWAPS)
def test_answers_and_accuracy_are_those_of_evaluate(swap, evaluated, run):
    arguments, rows = evaluated
    results = run({"swap": swap})
    wanted = [answer["response"] for answer in answers_of(arguments.output_dir, swap)]
    assert responses(results) == wanted and len(set(wanted)) > 10
    assert 100 * results["results"]["chain"]["exact_match,none"] == pytest.approx(rows[swap]["accuracy"])
    assert tasks(results) == {"answers": 40} | {
        name: pytest.approx(rows[swap][name]) for name in ("trace_tokens", "answer_tokens", "truncated", "swapped")
    }
    assert results["config"]["abscot"]["swap"] == swap
    # what the swap is to do, and that the model reads its trace
    assert (rows[swap]["accuracy"] >= 40) == (swap == "own") and (swap == "own" or rows[swap]["changed"] > 0.3)


def test_samples_are_those_of_evaluate(evaluated, run, tmp_path):
    """Sampled traces and answers, three a problem: the same draws."""
    arguments, _ = evaluated
    sampling = {"trace_temperature": 1.0, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "seed": 3, "samples": 3}
    arguments = replace(arguments, output_dir=str(tmp_path / "out"), swaps=["own", "other"], limit=10, **sampling)
    evaluate(arguments)
    drawn = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "max_gen_toks": 10, "until": []}
    task = {"repeats": 3, "generation_kwargs": drawn}
    for swap in ("own", "other"):
        wanted = [answer["response"] for answer in answers_of(arguments.output_dir, swap)]
        assert responses(run({"swap": swap, "trace_temperature": 1.0, "seed": 3}, task, limit=10)) == wanted
    assert len(set(wanted)) > 25


def test_until_and_the_longest_answer(evaluated, run):
    """Cut before the first of several texts; by the task's limit, or by the model's where the task has none."""
    own = [answer["response"] for answer in answers_of(evaluated[0].output_dir, "own")]
    stops = {"generation_kwargs": {"until": [";", "+9", "no such text", ""], "max_gen_toks": 10, "do_sample": False}}
    results = run({}, stops)
    wanted = [text.split(";")[0].split("+9")[0] for text in own]
    assert responses(results) == wanted != own
    tokenizer = AutoTokenizer.from_pretrained(evaluated[0].model)
    tokens = [len(tokenizer(text)["input_ids"]) for text in wanted]
    assert tasks(results)["answer_tokens"] == pytest.approx(sum(tokens) / 40)
    assert 0 < tasks(results)["truncated"] < 40
    short = run({"max_gen_toks": 4}, {"generation_kwargs": {"until": [], "temperature": 0.0, "num_beams": 1}})
    assert tasks(short)["answer_tokens"] <= 4
    assert all(text.startswith(start) for text, start in zip(own, responses(short), strict=True))
    assert responses(run({}, gen_kwargs="max_gen_toks=4")) == responses(short)


def test_prompts_are_those_of_evaluate(evaluated, run, checkpoint, monkeypatch, tmp_path):
    """Token by token: with and without --apply_chat_template, with an instruction, with examples as turns."""
    given, sample = [], HFTraceSampler.sample
    monkeypatch.setattr(
        HFTraceSampler,
        "sample",
        lambda self, prefixes, *a, **k: given.append(prefixes) or sample(self, prefixes, *a, **k),
    )
    arguments, tokenizer = evaluated[0], AutoTokenizer.from_pretrained(checkpoint)
    for i, instruction in enumerate((False, True)):
        evaluate(replace(arguments, instruction=instruction, swaps=["own"], output_dir=str(tmp_path / str(i))))
    run({})
    run({}, apply_chat_template=False)
    run({"instruction": "maths"})
    plain, instructed, *found = given
    assert found == [plain, plain, instructed] and plain != instructed
    given.clear()
    data = {"fewshot_split": "test", "fewshot_config": {"sampler": "first_n"}, "num_fewshot": 2}
    run({}, data, limit=5, system_instruction="1+1")
    first, second, third, fourth, *_ = load_problems(arguments.problems)
    turns = [(p.prompt[0]["content"], p.gold) for p in (second, third)]
    chat = [{"role": "system", "content": "1+1"}]
    for question, answer in turns:
        chat += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    assert given[0][0] == prompt_ids([*chat, *first.prompt], tokenizer) and len(given[0]) == 5


def test_refusals(run, checkpoint, tmp_path):
    from lm_eval.api.registry import get_model

    choice = {
        "output_type": "multiple_choice",
        "doc_to_choice": ["1", "2"],
        "doc_to_target": 0,
        "generation_kwargs": None,
    }
    choice["metric_list"] = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    for wrong, task, options, words in (
        ({"swaps": "own"}, {}, {}, "'swaps' is unknown; there are backend, .*pretrained, swap, instruction"),
        ({"swap": "mine"}, {}, {}, "'mine' is not one of own, random"),
        ({"instruction": "sums"}, {}, {}, "instruction 'sums' is not one of none, maths, gpqa, hotpotqa"),
        ({"pretrained": str(tmp_path)}, {}, {}, "not an extended checkpoint"),
        ({}, choice, {}, "no log-likelihoods: .* sum over all traces.*generate_until"),
        ({}, {"gen_prefix": "\\boxed{"}, {}, "gen_prefix would stand before the trace"),
        ({}, {}, {"gen_kwargs": "repetition_penalty=1.3"}, "gen_kwargs: repetition_penalty cannot be honoured"),
        ({}, {"repeats": 2}, {}, "several answers a problem at temperature 0 are one and the same"),
        ({}, {}, {"gen_kwargs": "max_gen_toks=600"}, "chain: a prompt of .* 8 for a trace and 600 .* 512 positions"),
        ({}, {}, {"use_cache": str(tmp_path / "cache.db")}, "use_cache: .* does not know which swap"),
    ):
        with pytest.raises(Refused, match=words):
            run(wrong, task, limit=4, **options)
    with pytest.raises(Refused, match="pretrained=FOLDER is missing"):
        HarnessArguments.of({"swap": "own"})
    with pytest.raises(Refused, match="leave 'tools' out"):
        get_model("abscot")(pretrained=str(checkpoint)).chat_template("tools")


def test_the_entry_point_is_the_model(lm_eval):
    from lm_eval.api.registry import get_model

    group = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lm_eval.models"]
    assert resolve_name(group["abscot"]) is get_model("abscot")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["hf", "vllm"])
def test_the_command(backend, evaluated, run, checkpoint, tmp_path):
    """lm_eval's own command line, in another process; its files hold the answers and the tokens."""
    if backend == "vllm":
        need_vllm()
    run({}, limit=1)  # writes the task
    model = {"pretrained": str(checkpoint), "swap": "other", "backend": backend}
    model |= {"engine": ENGINE} if backend == "vllm" else {}
    command = [sys.executable, "-m", "abscot_trl.evaluation.harness_lm_eval", "--model", "abscot", "--tasks", "chain"]
    command += ["--model_args", json.dumps(model), "--include_path", str(tmp_path / "tasks"), "--apply_chat_template"]
    command += ["--log_samples", "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "chain, swap other: 40 answers, on average" in done.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    arguments, rows = evaluated
    assert responses({"samples": {"chain": found}}) == [
        a["response"] for a in answers_of(arguments.output_dir, "other")
    ]
    assert tasks(json.loads(results.read_text()))["trace_tokens"] == pytest.approx(rows["other"]["trace_tokens"])


@pytest.mark.slow
@pytest.mark.parametrize("swap", ["own", "random", "other"])
def test_lighteval(swap, evaluated, checkpoint, tmp_path):
    """`lighteval custom`: the same answers, cut at the task's stop; traces in the details, tokens in the results."""
    python = os.environ.get("LIGHTEVAL_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import lighteval.__main__"], capture_output=True).returncode:
        pytest.skip("needs lighteval in an environment of its own: LIGHTEVAL_PYTHON (evaluation/README.md)")
    arguments, rows = evaluated
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text(Path(arguments.problems).read_text())
    (tmp_path / "tasks.py").write_text(LIGHTEVAL.replace("{folder}", str(tmp_path / "data")))
    model = ROOT / "abscot_trl" / "evaluation" / "harness_lighteval.py"
    command = [python, "-m", "lighteval", "custom", f"pretrained={checkpoint},swap={swap}", model, "chain|0"]
    command += ["--custom-tasks", tmp_path / "tasks.py", "--output-dir", tmp_path / "out", "--save-details"]
    places = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=os.environ | places, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(results.read_text())
    (details,) = (tmp_path / "out").rglob("details_*.parquet")
    found = {row["doc"]["query"]: row["model_response"] for row in pq.read_table(details).to_pylist()}
    wanted = answers_of(arguments.output_dir, swap)
    names = AbstractVocabulary.load(checkpoint).tokens
    for answer in wanted:
        response = found[answer["problem"]]
        assert response["text"] == [answer["response"].split(";")[0]]
        assert response["reasonings"] == ["".join(names[i] for i in answer["trace"])]
    right = [a["gold"] == a["response"].split(";")[0] for a in wanted]
    assert results["results"]["chain|0"]["em"] == pytest.approx(sum(right) / 40)
    ours = results["config_general"]["model_config"]["abscot"]
    assert ours["swap"] == swap and ours["tasks"]["chain|0"]["answers"] == 40
    for name in ("trace_tokens", "swapped"):
        assert ours["tasks"]["chain|0"][name] == pytest.approx(rows[swap][name])
