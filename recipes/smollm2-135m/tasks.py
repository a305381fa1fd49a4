"""
Rows with a verbal chain of thought, one step a line, and held-out problems of three families:

    gsm-symbolic   word problems of reasoning-gym with their own CoT. Held out: numbers, and whole templates
    facts          follow 3 to 5 relations through 12 to 20 shuffled facts. Held out: problems, and 6 or 7 relations
    states         what is in a box after 9 to 12 exchanges. Held out: problems, and 13 or 14 exchanges

    python recipes/smollm2-135m/tasks.py gsm-symbolic --rows 420000 --test 1000 --seed 0 \
        --output_dir runs/smollm2-135m/gsm-symbolic/rows

writes train.jsonl, test.jsonl and templates.jsonl or longer.jsonl, as `abscot data` and `abscot evaluate` read them.
"""

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from random import Random
from statistics import fmean
from typing import NamedTuple

from tqdm import tqdm

from abscot_trl.errors import Refused
from abscot_trl.storage import check_folder, written_whole

TEMPLATES = 10  # held out of gsm-symbolic's training
RESERVED = 0.1  # share of problems that only the test may hold
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
ASKS = " Give the result as your final answer. Do not include units."  # reasoning-gym's; GSM8K has none
NAMES = (
    "Adam Alan Alice Anna Ben Bill Bob Brian Carl Chris Clara Daniel David Emma Eric Eva Frank Fred George "
    "Grace Helen Henry Ian Jack James Jane Joe John Julia Kate Kevin Laura Leo Linda Lisa Mark Martin Nick "
    "Nina Oliver Oscar Paul Peter Rachel Robert Rose Sam Tom "
).split()
RELATIONS = (
    *("best friend", "business partner", "dance teacher", "family doctor"),
    *("former boss", "math teacher", "next-door neighbor", "tennis coach"),
)
BOXES, THINGS = "ABCDE", ("coin", "key", "ring", "ball", "stone")


class Problem(NamedTuple):
    """`key`: problems that share it count as one between training and test; `choices`: answers to guess among."""

    prompt: str
    cot: str
    gold: str
    source: str
    key: str
    choices: int | None = None


def gsm_symbolic(seed: int, held_out: bool) -> Iterator[Problem]:
    """
    Problems of all templates but `TEMPLATES` of them, or of these alone. Two with the same numbers count as one.

    Left out: template 46, whose CoT does not end in its answer, and problems that print numbers like 0.66666666666.
    """
    from reasoning_gym import create_dataset
    from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import tasks_ok

    sound, size = [template for template in tasks_ok if template != 46], 20_000
    second = {*Random(f"{seed} templates").sample(sound, TEMPLATES)}
    templates = second if held_out else {*sound} - second
    for part in count():  # an item's seed is the data set's and its number
        dataset = create_dataset("gsm_symbolic", size=size, seed=(1000 * seed + part) * size)
        for i in (i for i, template in enumerate(dataset.task_indices) if template in templates):
            item, template = dataset[i], dataset.task_indices[i]
            prompt, gold = item["question"].removesuffix(ASKS), item["answer"]
            lines = [line.strip() for line in item["metadata"]["answer_cot"].splitlines()]
            cot = "\n".join(line for line in lines if line and not line.startswith("####"))
            if not re.search(r"\d\.\d{4}", prompt + cot):
                yield Problem(prompt, cot, gold, f"gsm-symbolic/{template}", f"{template} {NUMBER.findall(prompt)}")


def facts(seed: int, held_out: bool) -> Iterator[Problem]:
    """Two relations, each a circle of the same 6 to 10 people: both lead on from everybody. No way comes back."""
    rng = Random(f"{seed} facts {held_out}")
    while True:
        of, hops, way = _relations(rng.randint(6, 7) if held_out else rng.randint(3, 5), rng)
        told = [f"{name}'s {relation} is {other}." for relation in of for name, other in of[relation].items()]
        rng.shuffle(told)
        asked = "".join(f"the {relation} of " for relation in reversed(hops))
        prompt = f"{' '.join(told)} Who is {asked}{way[0]}?"
        steps = zip(hops, way[:-1], way[1:], strict=True)
        cot = "\n".join(f"The {relation} of {name} is {other}." for relation, name, other in steps)
        yield Problem(prompt, cot, way[-1], f"facts/{len(hops)}", prompt, len(told) // 2 - 1)


def _relations(length: int, rng: Random) -> tuple[dict[str, dict[str, str]], list[str], list[str]]:
    """By relation who is whose; `length` relations to follow; the people on that way, nobody twice."""
    while True:
        people, of = rng.sample(NAMES, rng.randint(6, 10)), {}
        for relation in rng.sample(RELATIONS, 2):
            circle = rng.sample(people, len(people))
            of[relation] = dict(zip(circle, [*circle[1:], circle[0]], strict=True))
        hops, way = [rng.choice([*of]) for _ in range(length)], people[:1]
        for relation in hops:
            way.append(of[relation][way[-1]])
        if len({*way}) == len(way):
            return of, hops, way


def states(seed: int, held_out: bool) -> Iterator[Problem]:
    """Five things in five boxes; an exchange names two boxes or two things, so that all must be kept in mind."""
    rng = Random(f"{seed} states {held_out}")
    while True:
        held = rng.sample(THINGS, len(BOXES))
        sentences, lines = [f"Box {box} holds the {thing}." for box, thing in zip(BOXES, held, strict=True)], []
        for _ in range(rng.randint(13, 14) if held_out else rng.randint(9, 12)):
            if rng.random() < 0.5:
                one, other = sorted(rng.sample(range(len(BOXES)), 2))
                sentences.append(f"Swap what boxes {BOXES[one]} and {BOXES[other]} hold.")
            else:
                one, other = rng.sample(range(len(BOXES)), 2)
                sentences.append(f"Swap the {held[one]} and the {held[other]}.")
            held[one], held[other] = held[other], held[one]
            lines.append(", ".join(f"{box} {thing}" for box, thing in zip(BOXES, held, strict=True)))
        asked = rng.randrange(len(BOXES))
        prompt = f"{' '.join(sentences)} What does box {BOXES[asked]} hold now?"
        yield Problem(prompt, "\n".join(lines), held[asked], f"states/{len(lines)}", prompt, len(THINGS))


# What makes the problems, and the name of its second test.
FAMILIES: dict[str, tuple[Callable[[int, bool], Iterator[Problem]], str]] = {
    "gsm-symbolic": (gsm_symbolic, "templates"),
    "facts": (facts, "longer"),
    "states": (states, "longer"),
}


def split(family: str, rows: int, test: int, seed: int) -> dict[str, list[Problem]]:
    """
    Distinct problems for `train`, `test` and the second test.

    A digest of a problem's key says which side it may be on, so that a test does not depend on `rows`.

    Raises:
        Refused: the family has fewer problems than asked for.
    """
    make, second = FAMILIES[family]
    splits = {"train": [], "test": [], second: []}
    wanted = {"train": rows, "test": test, second: test}
    for names in (("train", "test"), (second,)):
        seen, since = set(), 0
        for problem in tqdm(make(seed, second in names), desc=" and ".join(names), unit=" problems", mininterval=1):
            reserved = Random(f"{seed} {problem.key}").random() < RESERVED
            name = second if second in names else "test" if reserved else "train"
            fresh = problem.prompt not in seen and len(splits[name]) < wanted[name]
            since = 0 if fresh else since + 1
            if fresh:
                seen.add(problem.prompt)
                splits[name].append(problem)
            if all(len(splits[name]) == wanted[name] for name in names):
                break
            if since == 100_000:
                short = {name: len(splits[name]) for name in names}
                raise Refused(f"{family} has too few distinct problems: {short} of {wanted}; ask for fewer")
    return splits


def describe(splits: dict[str, list[Problem]]) -> dict:
    """
    Of each split its size and the accuracy of guesses: at random among the answers that a prompt names (`chance`,
    where it does), the most frequent answer in training, and the most frequent of the same template or length.
    """
    told = {}
    golds, by_source = Counter(problem.gold for problem in splits["train"]), defaultdict(Counter)
    for problem in splits["train"]:
        by_source[problem.source][problem.gold] += 1
    majority = golds.most_common(1)[0][0]
    for name, problems in splits.items():
        guesses = {"majority": [problem.gold == majority for problem in problems]}
        if all(problem.source in by_source for problem in problems):
            best = {source: counts.most_common(1)[0][0] for source, counts in by_source.items()}
            guesses["majority_of_its_kind"] = [problem.gold == best[problem.source] for problem in problems]
        if problems[0].choices:
            guesses["chance"] = [1 / problem.choices for problem in problems]
        told[name] = {"rows": len(problems), "steps": round(fmean(p.cot.count("\n") + 1 for p in problems), 2)}
        told[name] |= {guess: round(100 * fmean(rights), 1) for guess, rights in guesses.items()}
    return told | {"majority answer": majority}


def write(splits: dict[str, list[Problem]], family: str, output_dir: str) -> None:
    """
    A file a split.

    Raises:
        Refused: the folder is there already.
    """
    with written_whole(output_dir) as folder:
        for name, problems in splits.items():
            with open(folder / f"{name}.jsonl", "w") as file:
                for number, problem in enumerate(problems):
                    row = {"id": f"{family}-{name}-{number:06}", "source": problem.source, "prompt": problem.prompt}
                    row |= {"cot": problem.cot, "answer": f"\\boxed{{{problem.gold}}}", "gold": problem.gold}
                    file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--rows", type=int, default=420_000, help="of train.jsonl")
    parser.add_argument("--test", type=int, default=1000, help="problems of each of the two tests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", required=True, help="must not exist yet")
    args = parser.parse_args()
    if min(args.rows, args.test) < 1 or args.seed < 0:
        parser.error("--rows and --test must be at least 1, --seed not negative")
    try:
        check_folder(args.output_dir)
        if Path(args.output_dir).exists():
            raise Refused(f"{args.output_dir} is there already; choose another output_dir or remove it")
        splits = split(args.family, args.rows, args.test, args.seed)
        write(splits, args.family, args.output_dir)
    except Refused as error:
        parser.exit(1, f"{error}\n")
    except ImportError as error:
        parser.exit(1, f"{error}; pip install -e '.[evidence]'\n")
    print(json.dumps(describe(splits), indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
