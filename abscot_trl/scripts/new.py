"""
The recipe folder of a model of your own: what init, data, plan and warmup run as it stands.

    python -m abscot_trl.scripts.new --model Qwen/Qwen3-4B --data allenai/Dolci-Think-SFT-7B --data_format dolci \
        --hardware 1x80gb --output_dir recipes/mine
"""

from abscot_trl.cli import run_script

if __name__ == "__main__":
    run_script("new")
