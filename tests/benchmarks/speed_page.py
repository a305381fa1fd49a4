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
    "flash-lora-4b-checkpointing": "the same, flash-attn-4",
    "lora-4b-every-2": "LoRA, every second layer computed again",
    "lora-4b-liger": "LoRA, layers computed again, Liger's kernels in place of compiled layers",
    "lora-4b": "LoRA",
    "flash-lora-4b": "LoRA, flash-attn-4",
    "full-4b-bf16": "full, bf16 weights, 8 rows a step",
    "flash-full-4b-bf16": "the same, flash-attn-4",
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


def cards(row: dict) -> str:
    return row["card"].replace("NVIDIA ", "").replace(" 80GB HBM3", "")


def steps(found: dict[str, dict]) -> str:
    rows = []
    for case, words in STEPS.items():
        if f"{case}-step" in found:
            step, memory, tokens = (found[f"{case}-{what}"]["value"] for what in ("step", "memory", "tokens"))
            flops = [r["value"] for r in found.values() if r.get("case") == case and "TFLOP/s (6N)" in r["unit"]]
            tflops = f"{flops[0]:.0f}" if flops else ""
            rows.append([words, f"{step:.3f}", f"{tokens:,.0f}", f"{memory:.1f}", tflops])
    return table(["a step at 8192 tokens a row", "s", "tokens/s", "peak GiB", "model TFLOP/s"], rows)


def ratios(found: dict[str, dict]) -> str:
    apart = ("agree", "kill", "vllm", "plan")
    rows = [
        [f"`{name}`", f"{row['value']:.3g}", row["unit"], row["baseline"], cards(row)]
        for name, row in found.items()
        if row["baseline"] and not name.startswith(apart)
    ]
    return table(["figure", "value", "unit", "against", "card"], rows)


def sampling(found: dict[str, dict]) -> str:
    rows = []
    for name, row in found.items():
        if name.startswith("vllm-"):
            spread = f" ({row['low']:.1f} .. {row['high']:.1f})" if "low" in row else ""
            rows.append([f"`{name}`", f"{row['value']:.4g}{spread}", row["unit"], row["baseline"], cards(row)])
    return table(["figure", "value", "unit", "beside", "card"], rows)


def planned(found: dict[str, dict]) -> str:
    rows = []
    for name, row in found.items():
        if name.startswith("plan: "):
            gib, seconds = row["predicted"]
            cells = [name.removeprefix("plan: "), f"{gib:.2f} GiB, {seconds:.3f} s", row["baseline"][10:]]
            rows.append([*cells, f"{row['value']:.3f}", f"{row['seconds']:.2f}", cards(row)])
    return table(["step", "predicted", "measured", "memory, predicted/measured", "seconds", "card"], rows)


def attention(found: dict[str, dict]) -> str:
    rows = [(name, row) for name, row in found.items() if name.startswith("attention-")]
    cells = [[name.removeprefix("attention-"), f"{r['forward']:.2f}", f"{r['backward']:.2f}"] for name, r in rows]
    return table(["kernel, by tokens a row", "forward ms", "backward ms"], cells)


def launchers(found: dict[str, dict]) -> str:
    rows = []
    for name, row in found.items():
        if name.startswith("agree: "):
            cells = [name.removeprefix("agree: "), f"{row['value']:.1e}", f"{row['largest']:.1e}"]
            gauges = f"{row['gauges_differ']:.0e}" if row.get("gauges_differ") is not None else ""
            rows.append([*cells, f"{row['rates_differ']:.0e}", gauges, cards(row)])
    header = [
        "2 GPUs",
        "first loss differs",
        "largest of 8 steps",
        "learning rates differ",
        "gauges differ",
        "machine",
    ]
    return table(header, rows)


def picture(found: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    marks = {"lora-4b-seed": "s", "lora-4b-checkpointing": "o", "lora-4b-every-2": "^", "lora-4b": "D"}
    for case, mark in marks.items():
        for kernels, color in (("", "tab:blue"), ("flash-", "tab:orange")):
            if f"{kernels}{case}-tokens" in found:
                memory, tokens = (found[f"{kernels}{case}-{what}"]["value"] for what in ("memory", "tokens"))
                words = STEPS[case].removeprefix("LoRA, ").replace("LoRA", "nothing computed again")
                words = "the same, flash-attn-4" if kernels else words
                left.plot(memory, tokens, mark, color="grey" if "seed" in case else color, label=words)
    left.legend(fontsize=7, loc="upper left")
    left.set(xlabel="peak GiB", ylabel="tokens/s", xlim=(0, 60), ylim=(0, 30000))
    left.set_title("LoRA of Qwen3-4B's shape, rows of 8192")
    for ending, color, words in (("-triton", "tab:blue", "torch's kernels"), ("", "tab:orange", "flash-attn-4")):
        case = "flash" if not ending else "masked"
        pairs = {int(m[1]): row["value"] for name, row in found.items() if row.get("case", "").startswith(case)
                 and (m := re.fullmatch(rf"masked-over-causal-(\d+){ending}", name))}  # fmt: skip
        right.plot(sorted(pairs), [pairs[n] for n in sorted(pairs)], "o-", color=color, label=words)
    right.legend(fontsize=7)
    lengths = (2048, 8192, 32768)
    right.axhline(1, color="grey", linewidth=0.8)
    right.set(xscale="log", xlabel="tokens a row", ylabel="masked step / causal step", ylim=(0.6, 1.3))
    right.set_xticks(lengths, lengths)
    right.set_title("against cuDNN's causal attention")
    right.minorticks_off()
    figure.savefig(path, dpi=110)


def filled(page: str, found: dict[str, dict]) -> str:
    """The page with its tables made anew."""
    for make in (steps, ratios, attention, sampling, launchers, planned):
        block = f"<!-- {make.__name__} -->\n{make(found)}\n<!-- end -->"
        page, count = re.subn(rf"<!-- {make.__name__} -->\n.*?<!-- end -->", lambda _, b=block: b, page, flags=re.S)
        assert count == 1, make.__name__
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(), figures()))
    picture(figures(), PAGE.with_name("speed.png"))
