"""What `abscot plan` can say of GRPO: its update and scoring; nobody knows here how fast rollouts are drawn."""

import numpy as np

from abscot_trl.loop.duration import Card, batch_seconds
from abscot_trl.loop.memory import Shape, saved_bytes, trained_parameters, training_disk
from abscot_trl.training.steps import accumulation_of
from abscot_trl.vocabulary import AbstractVocabulary


def rollout_lengths(recipe: dict, lengths: dict[str, np.ndarray], vocabulary: AbstractVocabulary) -> dict[str, float]:
    """
    Mean tokens of prompt, trace (with its end) and answer of a rollout, if they are as those of the warm-up's rows,
    whose `lengths` are given (trace: with both delimiters), and cut where the recipe cuts them.
    """
    prompt = np.minimum(lengths["prompt"], recipe.get("max_prompt_tokens", 2048)) + 1  # <beginabstract>
    room = recipe.get("max_completion_length", 512) - vocabulary.m_max - 1
    cut = {"prompt": prompt, "trace": lengths["trace"] - 1, "answer": np.minimum(lengths["answer"], room)}
    return {name: float(values.mean()) for name, values in cut.items()}


def scorings(recipe: dict, gpus: int) -> int:
    """How often a rollout is read to be scored: by the reference, and by the policy where trl needs its own."""
    iterations, accumulation = recipe.get("num_iterations", 1), accumulation_of(recipe, gpus)
    served = recipe.get("steps_per_generation") or accumulation
    if recipe.get("generation_batch_size"):
        served = recipe["generation_batch_size"] // (recipe.get("per_device_train_batch_size", 8) * gpus)
    apart = bool(recipe.get("use_vllm")) and recipe.get("vllm_importance_sampling_correction", True)
    return (recipe.get("beta", 0.04) != 0) + (apart or accumulation % (served * iterations) != 0)


def grpo_line(
    recipe: dict,
    lengths: dict[str, np.ndarray],
    vocabulary: AbstractVocabulary,
    shape: Shape,
    card: Card,
    gpus: int,
    zero: int,
    launcher: dict,
) -> tuple[dict, str]:
    """
    Steps, tokens that are trained, parameters, disk and, of scoring and update, hours of a stage of GRPO; and in words
    what is drawn a step and what is not reckoned. Without `max_steps` what depends on steps is left out.
    """
    mean, at_once = rollout_lengths(recipe, lengths, vocabulary), recipe.get("per_device_train_batch_size", 8)
    accumulation, iterations = accumulation_of(recipe, gpus), recipe.get("num_iterations", 1)
    completions, row, steps = accumulation * at_once * gpus, sum(mean.values()), recipe.get("max_steps", -1)
    trained = trained_parameters(shape, recipe, vocabulary.size)
    line = {
        "trained": trained,
        "disk": training_disk(shape, recipe, trained, launcher),
        "stays": saved_bytes(recipe, launcher)[0] * trained,
    }
    drawn = completions * (mean["trace"] + mean["answer"]) / iterations
    words = f"a step draws {completions / iterations:,.0f} completions, about {drawn / 1000:,.0f} thousand tokens "
    words += f"(trace {mean['trace']:.0f}, answer {mean['answer']:.0f} each, as the warm-up's rows; at most "
    words += f"{recipe.get('max_completion_length', 512)})"
    missing = "memory, rollouts (their speed is not known here), rewards and padding are not reckoned"
    if steps > 0:
        line |= {"steps": steps, "tokens": steps * completions * row}
    else:
        missing += "; without max_steps neither are its steps, which follow from the prompts that are left"
    if card.peak:
        update, scoring = (
            accumulation * batch_seconds(shape, recipe, at_once * row, row, card, zero, forward)
            for forward in (False, True)
        )
        scoring *= scorings(recipe, gpus) / iterations
        words += f"; by the phases' arithmetic {update:.2g} s of update, {scoring:.2g} s of scoring"
        if steps > 0:
            line["hours"] = steps * (update + scoring) / 3600
            missing = "hours are of these two; " + missing
    return line, f"{words}; {missing}"
