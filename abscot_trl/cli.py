"""`abscot <phase> ...`: the phases as one command; a front on `python -m abscot_trl.scripts.<phase>`."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import yaml

from abscot_trl.errors import Refused
from abscot_trl.processes import DRIVER

PHASES = {
    "init": "extend a base model by the codebook",
    "data": "prepare rows: parse, tokenise, filter, count",
    "traces": "make the traces of a phase, initial or on policy",
    "bottleneck": "phase A: bottlenecked SFT under the block mask (eq. 3)",
    "distill": "phase B: self-distillation (eq. 4)",
    "baseline": "what a warm-up is compared with: SFT without or with CoT, pause tokens, ..",
    "concise": "the base model's own shortest right answers, as rows to train on",
    "merge": "merge an adapter into its checkpoint",
    "evaluate": "score a model in verbal, direct and abstract mode, with every swap of the trace",
    "sweep": "one evaluation of the base and of every model of a warm-up's rounds",
    "alpaca": "a judge compares an evaluation's outputs on AlpacaEval's prompts with reference outputs",
    "serve": "OpenAI's chat API for a trained checkpoint, the trace as reasoning_content",
    "report": "figures, codebook and answers of one or more runs side by side: report.md, report.html",
    "plan": "what a warm-up will take: steps, tokens, memory, disk, hours",
    "warmup": "the policy iteration: all of the above, T rounds",
    "baselines": "train and evaluate the baselines on a warm-up's rows, for as many steps",
    "demo": "the whole on a toy task, minutes on a laptop",
}
TRAINING = ("bottleneck", "distill", "baseline")


def accelerate_config_path(name: str) -> str:
    """
    A file as given, or `accelerate_configs/<name>.yaml` of this repository.

    Raises:
        Refused: neither is there; the message lists the names;
            several processes are asked for where accelerate would start one without a word.
    """
    folder = Path(__file__).resolve().parent.parent / "accelerate_configs"
    for path in (Path(name), folder / f"{name}.yaml"):
        if path.is_file():
            _check_processes(path)
            return str(path)
    names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise Refused(f"accelerate_config {name!r} is neither a file nor one of {names}")


def _check_processes(path: Path) -> None:
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refused(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict) or config.get("mpirun_config"):
        return
    kind, processes = config.get("distributed_type"), config.get("num_processes")
    if isinstance(processes, int) and processes > 1 and kind in ("NO", "MULTI_CPU"):
        raise Refused(
            f"{path}: num_processes is {processes}, but accelerate starts one for distributed_type {kind}; write "
            "distributed_type: MULTI_GPU, which starts them on a machine without GPUs too"
        )


def main() -> None:
    """Entry point of the console script; exits 0 only on success."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, PHASES))
        lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in PHASES.items())
        print(  # noqa: T201
            "usage: abscot <phase> --config FILE.yaml [--field value ..] [--accelerate_config NAME]\n\n"
            f"{lines}\n\nabscot <phase> --help lists a phase's fields; --accelerate_config (bottleneck, distill, "
            "baseline,\nbaselines, warmup) is a file or the name of one in accelerate_configs/"
        )
        sys.exit(0 if arguments else 2)
    phase, *rest = arguments
    if phase not in PHASES:
        sys.exit(f"abscot: no phase {phase!r}; one of {', '.join(PHASES)}")
    if phase in TRAINING and "--accelerate_config" in rest[:-1]:
        at = rest.index("--accelerate_config")
        try:
            config = accelerate_config_path(rest[at + 1])
        except Refused as error:
            sys.exit(f"abscot {phase}: {error}")
        from accelerate.commands.launch import main as launch

        os.environ.setdefault(DRIVER, str(os.getpid()))  # so that what is launched ends with this process
        sys.argv = ["accelerate", "--config_file", config, "-m", f"abscot_trl.scripts.{phase}"]
        sys.argv += rest[:at] + rest[at + 2 :]
        try:
            launch()
        except subprocess.CalledProcessError as error:  # the phase has said why
            sys.exit(error.returncode)
        return
    sys.argv = [f"abscot {phase}", *rest]
    runpy.run_module(f"abscot_trl.scripts.{phase}", run_name="__main__")


if __name__ == "__main__":
    main()
