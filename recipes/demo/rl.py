"""
`make rl-demo`: GRPO from the demo's informed model, from its paper's, and cold; each evaluated before and after.

    python recipes/demo/rl.py                     # after `make demo`; two minutes on two cores
"""

import argparse
from pathlib import Path

from abscot_trl.evaluation.results import read_results, write_results
from abscot_trl.phases import run_phase
from abscot_trl.report.tables import results_table
from abscot_trl.training.resume import LOG_FILE

RECIPES = Path(__file__).parent
STARTS = {"informed": "informed/round1/distill", "paper": "paper/round1/distill", "cold": "init"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="the demo's folder")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/rl-demo"))
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    args = parser.parse_args()
    results = []
    for name in args.starts:
        start, output = args.demo / STARTS[name], args.output_dir / name
        steps = {"before": start, "after": output / "train"}
        for when, model in steps.items():
            if when == "after" and not (model / LOG_FILE).is_file():
                given = ["--model_name_or_path", str(start), "--prompts", str(args.demo / "train.jsonl")]
                given += ["--output_dir", str(model)]
                run_phase("grpo", ["--config", str(RECIPES / "grpo.yaml"), *given])
            results_file = output / when / "results.json"
            given = ["--model", str(model), "--name", f"{name}, {when}", "--output_dir", str(output / when)]
            if not results_file.is_file():
                run_phase("evaluate", ["--config", str(args.demo / "evaluate.yaml"), "--modes", "abstract", *given])
            results += read_results(results_file)
    write_results(args.output_dir / "results.json", results)
    print(results_table(results))  # noqa: T201


if __name__ == "__main__":
    main()
