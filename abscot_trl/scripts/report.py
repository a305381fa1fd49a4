"""
Table, figures, codebook and answers of one or more runs, side by side: report.md, and report.html in one file.

    python -m abscot_trl.scripts.report runs/demo/informed runs/demo/paper --output_dir runs/report
"""

import sys
from itertools import takewhile

from abscot_trl.evaluation.report import ReportArguments, report
from abscot_trl.phases import exit_with_words, parse


def with_runs(arguments: list[str]) -> list[str]:
    """`RUN ..` before the first field stands for `--runs RUN ..`."""
    runs = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    return ["--runs", *arguments] if runs else arguments


if __name__ == "__main__":
    with exit_with_words("report"):
        print(f"\n{report(*parse((ReportArguments,), with_runs(sys.argv[1:])))}, report.html beside it")
