"""
Table, figures, codebook and answers of one or more runs, side by side: report.md, and report.html in one file.

    python -m abscot_trl.scripts.report runs/demo/informed runs/demo/paper --output_dir runs/report
"""

from abscot_trl.cli import run_script

if __name__ == "__main__":
    run_script("report")
