"""AlpacaEval: the outputs' format, and the package itself against a judge on loopback."""

import json
import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest

from abscot_trl.errors import Refused
from abscot_trl.evaluation import alpaca as module
from abscot_trl.evaluation.alpaca import AlpacaArguments, alpaca
from abscot_trl.evaluation.arguments import EvaluateArguments
from abscot_trl.evaluation.evaluate import evaluate
from abscot_trl.evaluation.results import read_results

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
PYTHON = os.environ.get("ALPACA_EVAL_PYTHON", sys.executable)


class Judge(BaseHTTPRequestHandler):
    """OpenAI's chat endpoint: the log-probabilities say that an output is better by the number in it."""

    asked: list[dict] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Judge.asked.append(body)
        text = body["messages"][-1]["content"]
        first, second = (float(number) for number in re.findall(r"worth (\S+) \.", text))
        # The package shows the two sides in either order, as m and M.
        logps = {"m": -np.log1p(np.exp(second - first)), "M": -np.log1p(np.exp(first - second))}
        top = [{"token": token, "logprob": float(logp), "bytes": None} for token, logp in logps.items()]
        best = max(top, key=lambda entry: entry["logprob"])
        choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": best["token"]}}
        choice["logprobs"] = {"content": [best | {"top_logprobs": top}]}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "usage": usage}
        content = json.dumps(reply | {"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def judge():
    Judge.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def sides(tmp_path):
    """An evaluation's folder and reference outputs; what each output is worth to the judge stands in it."""
    rng = np.random.default_rng(0)
    worth = rng.normal([[0.5, 0.0]] * 60, 1.0)
    folder = tmp_path / "evaluated"
    folder.mkdir()
    decoding = {"backend": "hf", "trace_temperature": 0.0, "temperature": 0.0, "top_p": 1.0, "top_k": 0}
    row = {"model": "mine", "task": "alpacaeval", "mode": "abstract", "swap": "own", "n": 60, "samples": 1}
    row |= {"trace_tokens": 2.0, "answer_tokens": 3.0, "tokens": 5.0, "truncated": 0}
    (folder / "ungraded.json").write_text(json.dumps(row | {"decoding": decoding | {"max_new_tokens": 9, "seed": 0}}))
    for number, path in enumerate((folder / "outputs.json", tmp_path / "reference.json")):
        fields = {"generator": ["mine", "other"][number], "dataset": "koala"}
        filler = [" word" * int(n) for n in rng.integers(1, 30, size=60)]
        outputs = [
            {"instruction": f"Say {i}.", "output": f"worth {worth[i, number]:.6f} .{filler[i]}"} | fields
            for i in range(60)
        ]
        path.write_text(json.dumps(outputs))
    return folder, tmp_path / "reference.json", worth


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    """A hub cache with a made-up `df_gamed.csv`, which the length-controlled win rate is regularised by."""
    repo = tmp_path / "hub" / "datasets--tatsu-lab--alpaca_eval"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    rng = np.random.default_rng(1)
    difficulty = rng.normal(size=60)
    lines = ["model,preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline"]
    for name, shift in (("terse", 1.0), ("wordy", -1.0)):
        lines += [
            f"{name},{rng.random():.4f},{i},{shift * rng.random():.4f},{difficulty[i]:.4f},False" for i in range(60)
        ]
    (snapshot / "df_gamed.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_the_package_against_a_judge_on_loopback(sides, judge, offline_hub, tmp_path):
    """The win rate is the mean of the judge's probabilities; a second call asks nothing again."""
    if subprocess.run([PYTHON, "-c", "import alpaca_eval"], capture_output=True).returncode:
        pytest.skip(
            "alpaca_eval is not installed (extra `alpaca`); ALPACA_EVAL_PYTHON may name an interpreter with it"
        )
    folder, reference, worth = sides
    fields = {"outputs": str(folder), "reference_outputs": str(reference), "judge": judge, "judge_model": "a-judge"}
    (row,) = alpaca(AlpacaArguments(**fields, output_dir=str(tmp_path / "judged"), python=PYTHON))
    assert read_results(tmp_path / "judged") == [row]
    assert len(Judge.asked) == 60 and {body["model"] for body in Judge.asked} == {"a-judge"}
    won = 100 / (1 + np.exp(worth[:, 1] - worth[:, 0]))
    assert row["win_rate"] == pytest.approx(won.mean(), abs=1e-3)
    error = won.std(ddof=1) / 60**0.5
    assert row["win_rate_ci95"] == pytest.approx([won.mean() - 1.96 * error, won.mean() + 1.96 * error], abs=1e-2)
    assert (row["n"], row["metric"], row["model"], row["judge"]) == (60, "lc_win_rate", "mine", "a-judge")
    assert row["ci95"][0] < row["accuracy"] < row["ci95"][1] and abs(row["accuracy"] - row["win_rate"]) < 20
    (tmp_path / "judged").rename(tmp_path / "moved")
    alpaca(AlpacaArguments(**fields, output_dir=str(tmp_path / "judged"), python=PYTHON))
    assert len(Judge.asked) == 60
    (again,) = read_results(tmp_path / "judged")
    assert again["accuracy"] == pytest.approx(row["accuracy"], abs=1e-4) and again["n"] == 60
    with pytest.raises(ValueError, match="begun with another judge"):
        other = fields | {"judge_model": "b-judge", "output_dir": str(tmp_path / "judged")}
        (tmp_path / "judged").rename(tmp_path / "again")
        alpaca(AlpacaArguments(**other, python=PYTHON))


def test_a_judge_s_folder_that_is_not_ours_stays(sides, tmp_path, monkeypatch):
    """The package would write its own leaderboard.csv there."""
    folder, reference, _ = sides
    mine = tmp_path / "judged.judge" / "leaderboard.csv"
    mine.parent.mkdir()
    mine.write_text("mine")
    monkeypatch.setattr(module, "annotator", lambda *_: {})
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stdout="package"))
    fields = {"outputs": str(folder), "judge": "http://x", "judge_model": "m", "output_dir": str(tmp_path / "judged")}
    with pytest.raises(Refused, match="judged.judge is there but not of our making"):
        alpaca(AlpacaArguments(reference_outputs=str(reference), **fields, python=sys.executable))
    assert [path.name for path in mine.parent.iterdir()] == [mine.name] and mine.read_text() == "mine"


def test_sides_that_do_not_match_are_refused(sides, tmp_path):
    folder, reference, _ = sides
    fields = {"outputs": str(folder), "judge": "http://x", "judge_model": "m", "output_dir": str(tmp_path / "judged")}
    outputs = json.loads(reference.read_text())
    reference.write_text(json.dumps(outputs[:-1]))
    with pytest.raises(ValueError, match="holds 59 outputs, the evaluation 60"):
        alpaca(AlpacaArguments(reference_outputs=str(reference), **fields))
    reference.write_text(json.dumps([outputs[1], outputs[0], *outputs[2:]]))
    with pytest.raises(ValueError, match="entry 1 has another instruction"):
        alpaca(AlpacaArguments(reference_outputs=str(reference), **fields))
    with pytest.raises(Refused, match="outputs.json is missing; evaluate"):
        alpaca(AlpacaArguments(reference_outputs=str(reference), **fields | {"outputs": str(tmp_path)}))
    for damaged, words in {
        "[1]": "entry 1 has no text", "{}": "no list of outputs", "[": "is no JSON", "[" * 100_000: "is no JSON",
    }.items():  # fmt: skip
        reference.write_text(damaged)
        with pytest.raises(ValueError, match=f"{reference}.*{words}.*give reference outputs"):
            alpaca(AlpacaArguments(reference_outputs=str(reference), **fields))
    for wrong in ({"judge": "localhost"}, {"requests": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AlpacaArguments(reference_outputs=str(reference), **fields | wrong)
    reference.write_text(json.dumps(outputs))
    for python in ("/usr/bin/false", "/no/python"):
        with pytest.raises(Refused, match="has no alpaca_eval; run `pip install alpaca_eval`"):
            alpaca(AlpacaArguments(reference_outputs=str(reference), **fields, python=python))
    assert not (tmp_path / "judged").exists()


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the real rows are not at {DATA}")
def test_outputs_in_alpaca_evals_format(checkpoint, tmp_path):
    """Its prompts are asked as they are, answered, and written beside their datasets; nothing is graded."""
    rows = [json.loads(line) for line in (DATA / "instructions_332.jsonl").read_text().splitlines()][:4]
    short = [row | {"instruction": "1+2="} for row in rows]  # the toy tokenizer has no words
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps(short))
    fields = {"model": str(checkpoint), "problems": str(path), "output_dir": str(tmp_path / "out"), "name": "mine"}
    arguments = EvaluateArguments(**fields, swaps=["own"], max_new_tokens=8)
    assert evaluate(arguments) == []
    outputs = json.loads((tmp_path / "out" / "outputs.json").read_text())
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [list(output) for output in outputs] == [["instruction", "output", "generator", "dataset"]] * 4
    assert [(o["instruction"], o["dataset"], o["generator"]) for o in outputs] == [
        ("1+2=", row["dataset"], "mine") for row in rows
    ]
    assert [o["output"] for o in outputs] == [a["response"] for a in answers]
    assert {(a["score"], a["gold"], a["answer"]) for a in answers} == {(None, None, None)}
    row = json.loads((tmp_path / "out" / "ungraded.json").read_text())
    assert row["n"] == 4 and "accuracy" not in row and not (tmp_path / "out" / "results.json").exists()
    with pytest.raises(ValueError, match="one answer a prompt; choose one mode"):
        evaluate(EvaluateArguments(**fields | {"output_dir": str(tmp_path / "x")}, max_new_tokens=8))
