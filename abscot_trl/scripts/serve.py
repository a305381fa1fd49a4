"""
Serve a trained checkpoint by OpenAI's chat API; the trace comes as `reasoning_content`.

    python -m abscot_trl.scripts.serve --model runs/qwen3-4b/informed/model --port 8000
"""

from abscot_trl.cli import run_script

if __name__ == "__main__":
    run_script("serve")
