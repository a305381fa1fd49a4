"""
Chain arithmetic: a task whose answer needs its steps, small enough for a laptop.

    prompt  3+4-1+2=          k additions and subtractions mod n, left to right
    cot     3+4=2; / 2-1=1; / 1+2=3;    one line a step
    answer  \\boxed{3}
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from abscot_trl.errors import Refused
from abscot_trl.examples import Example

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<eos>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def chain_arithmetic(n: int, steps: int, modulus: int, seed: int) -> list[Example]:
    """`n` distinct problems of `steps` operations mod `modulus`, uniform over starts, operations and operands."""
    limit = modulus * (2 * modulus) ** steps
    if n > limit // 2:
        raise Refused(f"{n} distinct problems of {steps} steps mod {modulus} asked for, {limit} exist; ask for fewer")
    rng = np.random.default_rng(seed)
    problems: dict[str, Example] = {}
    while len(problems) < n:
        value = int(rng.integers(modulus))
        prompt, lines = str(value), []
        for sign, operand in zip(rng.integers(2, size=steps), rng.integers(modulus, size=steps), strict=True):
            result = int((value + operand if sign else value - operand) % modulus)
            step = f"{'+' if sign else '-'}{operand}"
            prompt += step
            lines.append(f"{value}{step}={result};")
            value = result
        prompt += "="
        problems.setdefault(
            prompt,
            Example(
                prompt=[{"role": "user", "content": prompt}],
                cot="\n".join(lines),
                answer=f"\\boxed{{{value}}}",
                gold=str(value),
                id=prompt,
                source=f"chain{steps}mod{modulus}",
            ),
        )
    return list(problems.values())


def write_problems(path: Path, rows: list[Example]) -> str:
    """The rows as problems that `abscot data` and `evaluate` read; returns the path."""
    path.write_text("".join(json.dumps({**asdict(row), "prompt": row.prompt[0]["content"]}) + "\n" for row in rows))
    return str(path)


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer for the task: a character a token, but `+4`, `-1` and `\\boxed{` are one token each."""
    special = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
    operations = [sign + digit for sign in "+-" for digit in "0123456789"]
    words = [*"0123456789=;}", "\n", "\\boxed{", *operations]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[+-][0-9]|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
