"""
One baseline: SFT without or with CoT, with a cut CoT, with pause tokens, or with stepwise internalisation.

    accelerate launch --config_file accelerate_configs/single.yaml -m abscot_trl.scripts.baseline \
        --config recipes/qwen3-4b/bottleneck.lora.yaml --config recipes/baselines/baseline.icot.yaml \
        --model_name_or_path runs/qwen3-4b/init --data runs/qwen3-4b/data --output_dir runs/qwen3-4b/icot
"""

from abscot_trl.cli import run_script

if __name__ == "__main__":
    run_script("baseline")
