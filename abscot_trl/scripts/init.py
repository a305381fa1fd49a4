"""
Extend a base model by the codebook.

    python -m abscot_trl.scripts.init --base_model Qwen/Qwen3-4B --output_dir runs/qwen3-4b/init
"""

from abscot_trl.phases import main

if __name__ == "__main__":
    main("init")
