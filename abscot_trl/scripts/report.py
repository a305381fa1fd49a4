"""
Table and plots of one or more runs.

    python -m abscot_trl.scripts.report --runs runs/demo/informed runs/demo/paper --output_dir runs/report
"""

from abscot_trl.evaluation.report import ReportArguments, report
from abscot_trl.phases import exit_with_words, parse

if __name__ == "__main__":
    with exit_with_words("report"):
        report(*parse((ReportArguments,)))
