"""How many optimiser steps a phase takes: transformers' Trainer, counted beforehand."""

import math

from abscot_trl.errors import Refused

GAUGE_ROWS = 64
FEW = 50  # steps of a phase; fewer are said aloud
ROWS_A_PROBE = 50  # and reading the gauges once takes 2 % of an epoch at most


def check_recipe(recipe: dict) -> None:
    """
    What can be told from a recipe's fields alone, before a phase begins.

    Raises:
        Refused: its batch sizes say nothing, or one thing twice; or its gauges or its rehearsal cannot be.
    """
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if recipe.get(name, 1) < 1:
            raise Refused(f"{name} must be at least 1, got {recipe[name]}")
    if recipe.get("global_batch_size") is not None and recipe.get("gradient_accumulation_steps", 1) != 1:
        raise Refused("global_batch_size sets gradient_accumulation_steps; leave one of the two out")
    gauge_rows, gauge_steps = recipe.get("gauge_rows", GAUGE_ROWS), recipe.get("gauge_steps", 1)
    if gauge_rows < 0 or gauge_rows == 1 or gauge_steps < 1:
        raise Refused(
            f"gauge_rows {gauge_rows} and gauge_steps {gauge_steps}: at least 2 rows, or 0 for no gauges, and 1 step "
            "are needed"
        )
    if recipe.get("rehearsal", 0.0) < 0:
        raise Refused(f"rehearsal is a loss weight and cannot be negative, got {recipe['rehearsal']}")


def accumulation_of(recipe: dict, processes: int) -> int:
    """
    Micro-batches of an optimiser step on each process.

    Raises:
        Refused: the processes cannot share `global_batch_size`.
    """
    whole, rows = recipe.get("global_batch_size"), recipe.get("per_device_train_batch_size", 8)
    if whole is None:
        return recipe.get("gradient_accumulation_steps", 1)
    if whole < 1 or whole % (rows * processes):
        raise Refused(
            f"global_batch_size {whole} is no multiple of per_device_train_batch_size {rows} x {processes} processes "
            f"= {rows * processes}"
        )
    return whole // (rows * processes)


def probes(rows: int, recipe: dict) -> list[int]:
    """Which of a phase's `rows` are held out for its gauges: `gauge_rows`, spread evenly, or none of too few."""
    wanted = recipe.get("gauge_rows", GAUGE_ROWS)
    return [i * rows // wanted for i in range(wanted)] if rows >= ROWS_A_PROBE * wanted else []


def steps_of(rows: int, recipe: dict, processes: int) -> int:
    """Optimiser steps of `rows` training rows: transformers' Trainer, whole batches over all processes."""
    if recipe.get("max_steps", -1) > 0:
        return recipe["max_steps"]
    batches = math.ceil(rows / (recipe.get("per_device_train_batch_size", 8) * processes))
    return math.ceil(recipe.get("num_train_epochs", 3) * math.ceil(batches / accumulation_of(recipe, processes)))


def few_steps(steps: int, recipe: dict, processes: int) -> str:
    """That a phase has few `steps`, and what makes more; nothing where it has enough, or as many as it asks for."""
    if steps >= FEW or recipe.get("max_steps", -1) > 0:
        return ""
    batch, epochs = recipe.get("global_batch_size"), recipe.get("num_train_epochs", 3)
    size = f"a global_batch_size under {batch}" if batch else "a smaller batch"
    size += " (on fewer GPUs)" * (processes > 1)
    return f"which are few: more rows, {size} or num_train_epochs over {epochs} make more"
