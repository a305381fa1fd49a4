"""Text of others as Markdown that shows it, and tables of it."""

import re


def escaped(text: str) -> str:
    """Text as Markdown that shows it, in one line: what a model or a problem is called can be no markup."""
    text = "".join(character if character.isprintable() else " " for character in text)
    text = re.sub(r"([\\`*\[\]!<>&|#~$@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", text)
    return re.sub(r"(:)(?=//)|((?<=www)\.)", r"\\\g<0>", text, flags=re.IGNORECASE)  # no link of itself


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned so that it reads in a terminal too; columns of numbers to the right."""
    rows = [[escaped(cell) for cell in row] for row in [header, *rows]]
    widths = [max(3, *(min(len(row[column]), 60) for row in rows)) for column in range(len(header))]
    numeric = {i for i in range(len(header)) if all(re.match(r"[-+]?\d|$", row[i]) for row in rows[1:])}

    def line(cells: list[str]) -> str:
        padded = [
            c.rjust(w) if i in numeric else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i in numeric else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])
