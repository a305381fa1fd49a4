"""
Make the traces of a phase, initial or on policy.

    python -m abscot_trl.scripts.traces --model runs/qwen3-4b/init --data runs/qwen3-4b/data \
        --output_dir runs/qwen3-4b/traces --method content
"""

from abscot_trl.cli import run_script

if __name__ == "__main__":
    run_script("traces")
