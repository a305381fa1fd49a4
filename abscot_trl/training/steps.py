"""How many optimiser steps a phase takes: transformers' Trainer, counted beforehand."""

import math


def accumulation_of(recipe: dict, processes: int) -> int:
    """Micro-batches of an optimiser step on each process."""
    whole = recipe.get("global_batch_size")
    at_once = recipe.get("per_device_train_batch_size", 8) * processes
    return max(whole // at_once, 1) if whole else recipe.get("gradient_accumulation_steps", 1)


def steps_of(rows: int, recipe: dict, processes: int) -> int:
    """Optimiser steps of `rows` training rows: transformers' Trainer, whole batches over all processes."""
    if recipe.get("max_steps", -1) > 0:
        return recipe["max_steps"]
    batches = math.ceil(rows / (recipe.get("per_device_train_batch_size", 8) * processes))
    return math.ceil(recipe.get("num_train_epochs", 3) * math.ceil(batches / accumulation_of(recipe, processes)))
