"""
Extend a base model by the codebook.

    python -m abscot_trl.scripts.init --base_model Qwen/Qwen3-4B --output_dir runs/qwen3-4b/init
"""

from abscot_trl.cli import run_script

if __name__ == "__main__":
    run_script("init")
