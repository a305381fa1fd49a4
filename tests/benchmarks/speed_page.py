"""
The tables and the picture of recipes/SPEED.md, from the figures in `results/`.

    python tests/benchmarks/speed_page.py          # `make speed-page`

A table stands between `<!-- NAME -->` and `<!-- end -->`; the rest of the page is written by hand.
"""

import json
import re
from pathlib import Path

from figures import RESULTS

PAGE = Path(__file__).resolve().parents[2] / "recipes" / "SPEED.md"
STEPS = {  # case of bench_train.py: in words
    "lora-4b-seed": "LoRA, the earlier way",
    "lora-4b-checkpointing": "LoRA, layers computed again",
    "lora-4b-liger": "LoRA, layers computed again, Liger's kernels in place of compiled layers",
    "lora-4b": "LoRA",
    "full-4b-bf16": "full, bf16 weights, 8 rows a step",
    "full-4b-float32": "full, float32 weights, layers computed again, 8 rows a step",
    "smol-packed": "SmolLM2-135M, full, float32 weights, packed, 4 rows a step",
    "smol-bare": "the same in a bare loop",
    "smol-single": "the same, one problem a step",
}


def figures() -> dict[str, dict]:
    """All rows by name."""
    return {row["name"]: row for file in sorted(RESULTS.glob("*.json")) for row in json.loads(file.read_text())}


def table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def steps(found: dict[str, dict]) -> str:
    rows = []
    for case, words in STEPS.items():
        if f"{case}-step" in found:
            step, memory, tokens = (found[f"{case}-{what}"]["value"] for what in ("step", "memory", "tokens"))
            flops = {"lora-4b": "lora-4b-8192-tflops", "lora-4b-checkpointing": "lora-4b-8192-tflops-checkpointing"}
            flops |= {"full-4b-bf16": "full-4b-8192-tflops", "full-4b-float32": "full-4b-8192-tflops-float32"}
            tflops = f"{found[flops[case]]['value']:.0f}" if flops.get(case) in found else ""
            rows.append([words, f"{step:.3f}", f"{tokens:,.0f}", f"{memory:.1f}", tflops])
    return table(["a step at 8192 tokens a row", "s", "tokens/s", "peak GiB", "model TFLOP/s"], rows)


def ratios(found: dict[str, dict]) -> str:
    names = [name for name, row in found.items() if row["baseline"] and "agree" not in name and "kill" not in name]
    rows = [
        [f"`{name}`", f"{found[name]['value']:.3g}", found[name]["unit"], found[name]["baseline"]] for name in names
    ]
    return table(["figure", "value", "unit", "against"], rows)


def attention(found: dict[str, dict]) -> str:
    rows = [(name, row) for name, row in found.items() if name.startswith("attention-")]
    cells = [[name.removeprefix("attention-"), f"{r['forward']:.2f}", f"{r['backward']:.2f}"] for name, r in rows]
    return table(["kernel, by tokens a row", "forward ms", "backward ms"], cells)


def launchers(found: dict[str, dict]) -> str:
    rows = []
    for name, row in found.items():
        if name.startswith("agree: "):
            cells = [name.removeprefix("agree: "), f"{row['value']:.1e}", f"{row['largest']:.1e}"]
            rows.append([*cells, f"{row['rates_differ']:.0e}"])
    return table(["2 GPUs", "first loss differs", "largest of 8 steps", "learning rates differ"], rows)


def picture(found: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for case in ("lora-4b-seed", "lora-4b-checkpointing", "lora-4b"):
        memory, tokens = found[f"{case}-memory"]["value"], found[f"{case}-tokens"]["value"]
        left.plot(memory, tokens, "o")
        words = STEPS[case].removeprefix("LoRA, ").replace("LoRA", "nothing computed again")
        left.annotate(
            words,
            (memory, tokens),
            xytext=(-15 if memory < 20 else 0, 8),
            textcoords="offset points",
            ha="left" if memory < 20 else "center",
        )
    left.set(xlabel="peak GiB", ylabel="tokens/s", xlim=(0, 60), ylim=(0, 20000))
    left.set_title("LoRA of Qwen3-4B's shape, rows of 8192")
    lengths = sorted(int(m[1]) for name in found if (m := re.fullmatch(r"masked-over-causal-(\d+)", name)))
    right.plot(lengths, [found[f"masked-over-causal-{n}"]["value"] for n in lengths], "o-")
    right.axhline(1, color="grey", linewidth=0.8)
    right.set(xscale="log", xlabel="tokens a row", ylabel="masked step / causal step", ylim=(0.9, 1.3))
    right.set_xticks(lengths, lengths)
    right.set_title("against cuDNN's causal attention")
    right.minorticks_off()
    figure.savefig(path, dpi=110)


def filled(page: str, found: dict[str, dict]) -> str:
    """The page with its tables made anew."""
    for make in (steps, ratios, attention, launchers):
        block = f"<!-- {make.__name__} -->\n{make(found)}\n<!-- end -->"
        page, count = re.subn(rf"<!-- {make.__name__} -->\n.*?<!-- end -->", lambda _, b=block: b, page, flags=re.S)
        assert count == 1, make.__name__
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(), figures()))
    picture(figures(), PAGE.with_name("speed.png"))
