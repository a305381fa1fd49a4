"""
Phase A: bottlenecked SFT under the block mask (eq. 3).

    accelerate launch --config_file accelerate_configs/single.yaml -m abscot_trl.scripts.bottleneck \
        --config recipes/qwen3-4b/bottleneck.lora.yaml --model_name_or_path runs/qwen3-4b/init \
        --data runs/qwen3-4b/data --traces runs/qwen3-4b/traces --output_dir runs/qwen3-4b/bottleneck
"""

from abscot_trl.cli import run_script

if __name__ == "__main__":
    run_script("bottleneck")
