"""What a report says of a model's traces, on rows of results made up for it."""

import pytest
from scipy.stats import binomtest

from abscot_trl.report.verdict import difference, following, measured, verdicts

PROBE = {"follows": 63.2, "follows_ci95": [59.8, 66.4], "follows_n": 812, "follows_chance": 4.1}


def wilson(correct, n):
    interval = binomtest(int(correct), n).proportion_ci(method="wilson")
    return [100 * interval.low, 100 * interval.high]


def rows_of(n=1000, half=None, **accuracies):
    """Own, random, other, none with these accuracies; `half` of a paired interval's width, unpaired ones without."""
    row = {"model": "m", "task": "t", "mode": "abstract", "n": n, "tokens": 9.0, "swapped": 1.0}
    rows = [
        row | {"swap": swap, "accuracy": value, "ci95": wilson(round(n * value / 100), n)}
        for swap, value in accuracies.items()
    ]
    for each in rows[1:] if half is not None else []:
        off = each["accuracy"] - rows[0]["accuracy"]
        each |= {"difference": off, "difference_ci95": [off - half, off + half]}
    return rows


@pytest.mark.parametrize(
    ("level", "accuracies", "remark"),
    [
        ("tokens", {"own": 90, "random": 20, "other": 20, "none": 20}, ""),
        ("tokens", {"own": 26, "random": 20, "other": 19, "none": 25}, "does as well without"),
        ("tokens", {"own": 90, "random": 20, "other": 20}, ""),
        ("positions", {"own": 90, "random": 90, "other": 89, "none": 20}, ""),
        ("positions", {"own": 90, "random": 20, "other": 90, "none": 20}, "form matters, not content"),
        ("positions", {"own": 90, "random": 90, "other": 20, "none": 20}, "misleads it"),
        ("positions", {"own": 90, "random": 90, "none": 20}, ""),
        ("nothing", {"own": 50, "random": 53, "other": 50, "none": 52}, ""),
        ("nothing", {"own": 50, "random": 70, "other": 50, "none": 52}, "does worse than random tokens"),
        ("nothing", {"own": 100, "random": 100, "other": 100, "none": 100}, ""),
        ("nothing", {"own": 90, "random": 90, "other": 20, "none": 90}, "misleads it"),
        ("nothing", {"own": 26.3, "random": 26.0, "other": 26.4, "none": 26.4}, ""),  # METHOD.md's first real model
    ],
)
def test_three_findings(level, accuracies, remark):
    (verdict,) = verdicts(rows_of(**accuracies))
    assert verdict["level"] == level and remark in verdict["remark"] and bool(remark) == bool(verdict["remark"])
    said = {"tokens": "the tokens of its traces carry", "positions": "only the positions", "nothing": "nothing in its"}
    assert verdict["words"].startswith(said[level])


@pytest.mark.parametrize(
    ("why", "rows"),
    [
        ("not tested: swaps random, other, none", rows_of(own=50)),
        ("not tested: swap other", rows_of(own=90, random=20, none=20)),
        ("not tested: swap none", rows_of(own=50, random=50, other=50)),
        ("not tested: swaps random, other", rows_of(own=90, none=20)),
        ("n = 30 is too few", rows_of(n=30, own=50, random=50, other=50, none=50)),
        (
            "n = 30 is too few",
            rows_of(n=30, own=50, random=50, other=50, none=0),
        ),  # a trace helps: its tokens, or any?
        ("could hide an effect of 10 points", rows_of(half=10.1, own=50, random=50, other=50, none=50)),
        ("hardly any accuracy to lose", rows_of(half=2, own=4, random=4, other=4, none=4)),
        ("at 0.0 (guessing: 0) there is hardly any", rows_of(half=0.5, own=0, random=0, other=0, none=0)),
    ],
)
def test_nothing_can_be_told(why, rows):
    (verdict,) = verdicts(rows)
    assert verdict["level"] == "open" and why in verdict["words"]
    assert verdict["words"].startswith("nothing can be told about its traces: ")


def test_wide_is_what_could_hide_ten_points():
    for half, level in ((9.9, "nothing"), (10.1, "open")):
        assert [v["level"] for v in verdicts(rows_of(half=half, own=50, random=50, other=50, none=50))] == [level]


def test_chance_is_where_accuracy_ends():
    """Near guessing no swap can cost accuracy; a difference that is seen is one all the same."""
    rows = rows_of(half=3, own=21, random=20, other=21, none=21)
    assert [verdicts(rows, chance)[0]["level"] for chance in (None, 0.0, 20.0)] == ["nothing", "nothing", "open"]
    assert "at 21.0 (guessing: 20)" in verdicts(rows, 20.0)[0]["words"]
    rows[2] |= PROBE | {"follows_chance": 19.2}  # of the evaluation's own, where nobody says
    assert [verdicts(rows, chance)[0]["level"] for chance in (None, 0.0, 20.0)] == ["open", "nothing", "open"]
    assert verdicts(rows_of(half=1, own=7.9, random=3.2, other=0.5, none=4.8))[0]["level"] == "tokens"


def test_how_often_the_answer_follows_another_trace():
    words = "after another problem's trace the answer is that problem's in 63 % [60, 66] of 812 cases (by chance 4 %)"
    rows = rows_of(own=90, random=20, other=20, none=20)
    assert "another problem's trace the answer" not in verdicts(rows)[0]["words"]
    rows[2] |= PROBE
    assert verdicts(rows)[0]["words"].endswith(f"; {words}")
    rows[2]["repeats"] = 95.6
    assert verdicts(rows)[0]["words"].endswith(f"; {words}, and the one that the trace gave there in 96 %")
    assert following({key: value for key, value in PROBE.items() if key != "follows_chance"}).endswith("812 cases")


def test_how_it_was_measured_is_said_where_it_differs():
    large, small = rows_of(own=90, random=20), rows_of(n=50, own=90, random=20)
    for row in small:
        row |= {"task": "s", "decoding": {"seed": 1}}
    assert measured(large) == "n = 1000" and measured(large, large) == ""
    assert measured(small, [*large, *small]) == "n = 50"  # the only seed that there is
    assert [v["measured"] for v in verdicts(large + small)] == ["n = 1000", "n = 50"]
    assert [v["measured"] for v in verdicts(small)] == [""]


def test_traces_that_are_alike_are_said():
    rows = rows_of(own=50, random=50, other=50, none=50)
    rows[2]["swapped"] = 0.41
    assert verdicts(rows)[0]["remark"] == "the traces are much alike: another problem's differs in 41 % of cases"


def test_difference():
    """The unpaired interval against Newcombe's published example (1998, method 10); a paired one is taken as it is."""
    a, b = (
        {"swap": s, "accuracy": 100 * x / n, "ci95": wilson(x, n)} for s, x, n in (("none", 56, 70), ("own", 48, 80))
    )
    points, (low, high), paired = difference(a, b)
    assert (
        points == pytest.approx(20) and low == pytest.approx(5.24, abs=0.01) and high == pytest.approx(33.39, abs=0.01)
    )
    assert not paired
    assert difference(a | {"difference": 1.0, "difference_ci95": [0.5, 1.5]}, b) == (1.0, [0.5, 1.5], True)
