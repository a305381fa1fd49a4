"""
Table, figures, codebook and answers of one or more runs, side by side: report.md, and report.html in one file.

    python -m abscot_trl.scripts.report runs/demo/informed runs/demo/paper --output_dir runs/report
"""

import sys

from abscot_trl.errors import Refused
from abscot_trl.phases import exit_with_words, parse
from abscot_trl.report.make import ReportArguments, report


def with_runs(arguments: list[str]) -> list[str]:
    """`RUN ..` before the first field stands for `--runs RUN ..`; refuses both, of which argparse takes the last."""
    arguments = ["--runs", *arguments] if arguments and not arguments[0].startswith("-") else arguments
    if arguments.count("--runs") > 1:
        raise Refused("runs are named in two places; name all of them in one")
    return arguments


if __name__ == "__main__":
    with exit_with_words("report"):
        print(f"\n{report(*parse((ReportArguments,), with_runs(sys.argv[1:])))}, report.html beside it")
