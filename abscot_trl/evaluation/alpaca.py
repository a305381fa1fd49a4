"""
`abscot alpaca`: the outputs of an evaluation on AlpacaEval's prompts, compared by a judge.

The comparison is the package `alpaca_eval`'s own, run as a child process: its prompt and its parser of the judge's
log-probabilities (annotator `weighted_alpaca_eval_gpt4_turbo`) with a model of your choice behind them, and its
length-controlled win rate (arXiv:2404.04475), for which it reads `df_gamed.csv` of the hub dataset
`tatsu-lab/alpaca_eval` (once; offline from the hub's cache).
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from abscot_trl.errors import Refused
from abscot_trl.evaluation.evaluate import OUTPUT_FILE, UNGRADED_FILE
from abscot_trl.evaluation.results import write_results
from abscot_trl.storage import check_folder, read_json, written_whole

ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"
WHERE = "import alpaca_eval, pathlib; print(pathlib.Path(alpaca_eval.__file__).parent)"


@dataclass
class AlpacaArguments:
    """
    Win rates of an evaluation's outputs against reference outputs.

    Args:
        outputs (`str`): the evaluation's folder: `outputs.json` and `ungraded.json`.
        reference_outputs (`str`): the other side, in the same format and order: AlpacaEval 2's are
            `alpaca_eval_gpt4_baseline.json` of the hub dataset `tatsu-lab/alpaca_eval`.
        judge (`str`): `http://host:port` of an OpenAI-compatible server that gives log-probabilities; `OPENAI_API_KEY`
            of the environment is sent to it.
        judge_model (`str`): the model that it serves.
        output_dir (`str`): where `results.json`, `leaderboard.csv` and `annotations.json` go. Verdicts are kept in
            `<output_dir>.judge`; the same command goes on from them.
        python (`str`): an interpreter that has `alpaca_eval` (`pip install alpaca_eval`); ours when left out.
        requests (`int`): how many at once.
    """

    outputs: str = field(metadata={"help": "Folder of the evaluation (outputs.json)."})
    reference_outputs: str = field(metadata={"help": "Reference outputs (.json)."})
    judge: str = field(metadata={"help": "http://host:port of an OpenAI-compatible server."})
    judge_model: str = field(metadata={"help": "The model it serves."})
    output_dir: str = field(metadata={"help": "Where results.json goes."})
    python: str = field(default=sys.executable, metadata={"help": "An interpreter that has alpaca_eval."})
    requests: int = field(default=16, metadata={"help": "Requests at once."})

    def __post_init__(self):
        if self.requests < 1:
            raise Refused(f"requests must be at least 1, got {self.requests}")
        if not self.judge.startswith(("http://", "https://")):
            raise Refused(f"judge: {self.judge!r} is no http://host:port")


def _read(path: Path, remedy: str) -> list[dict]:
    """Outputs in AlpacaEval's format."""
    if not path.is_file():
        raise Refused(f"{path} is missing; {remedy}")
    try:
        outputs = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path} is no JSON ({error}); {remedy}") from error
    keys = ("instruction", "output")
    if not outputs or not isinstance(outputs, list):
        raise Refused(f"{path} holds no list of outputs; {remedy}")
    for number, entry in enumerate(outputs, 1):
        if not (isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in keys)):
            raise Refused(f"{path}: entry {number} has no text as instruction or as output; {remedy}")
    return outputs


def check_outputs(outputs: list[dict], reference: list[dict], path: str) -> None:
    """
    Raises:
        Refused: the two sides do not answer the same instructions in the same order.
    """
    if len(outputs) != len(reference):
        raise Refused(f"{path} holds {len(reference)} outputs, the evaluation {len(outputs)}; evaluate all of them")
    for number, (mine, other) in enumerate(zip(outputs, reference, strict=True), 1):
        if mine["instruction"] != other["instruction"].strip():
            raise Refused(f"{path}: entry {number} has another instruction; the sides must be parallel")


def annotator(package: Path, args: AlpacaArguments) -> dict:
    """The package's annotator with the judge's model."""
    (config,) = yaml.safe_load((package / "evaluators_configs" / ANNOTATOR / "configs.yaml").read_text()).values()
    config["prompt_template"] = str(package / "evaluators_configs" / config["prompt_template"])
    config["completions_kwargs"] |= {"model_name": args.judge_model, "requires_chatml": True, "price_per_token": 0}
    config["completions_kwargs"]["num_procs"] = args.requests
    return {"judge": config}


def run_alpaca_eval(args: AlpacaArguments, name: str) -> Path:
    """
    Returns:
        `Path`: the folder with the package's `leaderboard.csv` and `annotations.json`.

    Raises:
        Refused: the package is not there, or failed.
    """
    there = shutil.which(args.python)
    found = there and subprocess.run([args.python, "-c", WHERE], capture_output=True, text=True)
    if not found or found.returncode:
        raise Refused(
            f"{args.python} has no alpaca_eval; run `pip install alpaca_eval`, here or in an environment of its own "
            "whose interpreter `python` names"
        )
    work = Path(f"{args.output_dir}.judge")
    config = yaml.safe_dump(annotator(Path(found.stdout.strip()), args))
    settings = work / "judge" / "configs.yaml"  # the package keeps the verdicts beside it
    if not settings.is_file() and any(path.is_file() for path in work.rglob("*")):
        raise Refused(f"{work} is there but not of our making ({settings} is missing); move it away")
    settings.parent.mkdir(parents=True, exist_ok=True)
    if settings.is_file() and settings.read_text() != config:
        raise Refused(f"{work} was begun with another judge; go back to it or remove the folder")
    settings.write_text(config)
    fields = {
        "model_outputs": Path(args.outputs, OUTPUT_FILE).absolute(),
        "reference_outputs": Path(args.reference_outputs).absolute(),
        "annotators_config": settings.parent.absolute(),
        "output_path": work.absolute(),
        "name": name,
        "precomputed_leaderboard": None,
        "metric_kwargs": {"save_weights_dir": None},  # else it writes into its own installation
    }
    command = [
        args.python,
        "-m",
        "alpaca_eval.main",
        "evaluate",
        *(f"--{key}={value}" for key, value in fields.items()),
    ]
    endpoint = {"OPENAI_API_BASE": f"{args.judge.rstrip('/')}/v1", "OPENAI_API_KEY": "none"}
    code = subprocess.run(
        command, env=endpoint | os.environ | {"OPENAI_API_BASE": endpoint["OPENAI_API_BASE"]}
    ).returncode
    if code:
        raise Refused(f"alpaca_eval failed with exit code {code}, see above; the same command goes on from here")
    return work


def interval(rate: float, error: float) -> list[float]:
    """The normal 95 % interval from a standard error, in points."""
    return [max(0.0, rate - 1.96 * error), min(100.0, rate + 1.96 * error)]


def alpaca(args: AlpacaArguments) -> list[dict]:
    """
    `abscot alpaca`: ask the judge, write `results.json`; `accuracy` there is the length-controlled win rate.

    Raises:
        Refused: files that are missing or not parallel, or a judge that failed.
    """
    check_folder(args.output_dir)
    remedy, ungraded = "evaluate AlpacaEval's prompts first", Path(args.outputs, UNGRADED_FILE)
    outputs = _read(Path(args.outputs, OUTPUT_FILE), remedy)
    if not ungraded.is_file():
        raise Refused(f"{ungraded} is missing; {remedy}")
    row = read_json(ungraded, remedy, "model", "task", "mode", "swap", "decoding")
    remedy = "give reference outputs in AlpacaEval's format"
    check_outputs(outputs, _read(Path(args.reference_outputs), remedy), args.reference_outputs)
    with written_whole(args.output_dir) as folder:
        work = run_alpaca_eval(args, row["model"])
        with open(work / "leaderboard.csv", newline="") as file:
            figures = next(line for line in csv.DictReader(file) if line[""] == row["model"])
        rates = {key: float(figures[key]) for key in ("win_rate", "standard_error", "lc_standard_error")}
        rate = float(figures["length_controlled_winrate"])
        row |= {"n": int(float(figures["n_total"])), "metric": "lc_win_rate", "judge": args.judge_model}
        row |= {"accuracy": rate, "ci95": interval(rate, rates["lc_standard_error"]), "win_rate": rates["win_rate"]}
        row["win_rate_ci95"] = interval(rates["win_rate"], rates["standard_error"])
        for name in ("leaderboard.csv", "annotations.json"):
            (folder / name).write_bytes((work / name).read_bytes())
        write_results(folder / "results.json", [row])
    return [row]
