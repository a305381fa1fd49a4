"""What the gauges of a training phase (`training/gauges.py`) say, in words."""

SURE = 2.0  # standard errors, paired by row: by chance a row's own trace is so much better once in 40 times
MATTERS = 0.1  # of the answer's loss: that a trace is not read may not rest on errors that hide so large a difference
WRITABLE = 0.1  # of ln(M + 1): below this a trace is said to be predictable
NAMES = {"random": "random tokens", "other": "another row's", "none": "none"}
WORDS = {
    "tokens": "the answer reads its trace",
    "form": "the answer reads that a trace is of the usual form, not which one it is",
    "places": "the answer reads that a trace is there, not its tokens",
    "nothing": "the answer does not read its trace",
    "open": "whether the answer reads its trace cannot be told, losses of so few rows differ too much",
}


def readings(log: list[dict]) -> list[dict]:
    """The steps of a phase's log after which its gauges were read."""
    return [entry for entry in log if "useful_own" in entry]


def level(reading: dict) -> str:
    """
    A key of `WORDS`: after which other traces the answer's loss is surely higher than after its own.

    Where none surely is, all of them still may be, where errors are wide: `open`.
    Another row's trace is what tells content from form: random tokens, and none, may hurt because they are unusual.
    """
    own = reading["useful_own"]
    found = {swap: (reading[f"useful_{swap}"] - own, SURE * reading[f"useful_{swap}_se"]) for swap in NAMES}
    worse = {swap for swap, (difference, error) in found.items() if difference > error}
    if worse == {*NAMES}:
        return "tokens"
    if not worse and all(difference + error > MATTERS * own for difference, error in found.values()):
        return "open"
    return "form" if "random" in worse else "places" if "none" in worse else "nothing"


def says(reading: dict) -> str:
    """A reading in one line."""
    found = ", ".join(f"{reading[f'useful_{swap}']:.2f} after {name}" for swap, name in NAMES.items())
    words = f"{WORDS[level(reading)]}: loss {reading['useful_own']:.2f} after its own, {found}"
    if "useful_own_given_cot" in reading:
        own, random = reading["useful_own_given_cot"], reading["useful_random_given_cot"]
        words += f" (where the trace saw the CoT: {own:.2f} after its own, {random:.2f} after random tokens)"
    nats, uniform = reading["predictable"], reading["predictable_uniform"]
    yet = "" if nats <= WRITABLE * uniform else "not yet "
    return f"{words}; the trace is {yet}predictable from the prompt: {nats:.2f} nats a token of {uniform:.2f}"
