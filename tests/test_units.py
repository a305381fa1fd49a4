"""Numbers of any size as words."""

import pytest

from abscot_trl.units import count_words, size_words, time_words


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (size_words, {0: "0 B", 1000: "1,000 B", 2048: "2 KiB", 44_879_053: "42.8 MiB", 2**30: "1 GiB"}),
        (size_words, {41.84 * 2**30: "41.8 GiB", 1234 * 2**30: "1,234 GiB"}),
        (count_words, {90: "90", 6120: "6.12k", 865_000: "865k", 66_190_000: "66.2M", 8_190_735_360: "8.19B"}),
        (time_words, {0.4: "0.4 s", 45: "45 s", 90: "1.5 min", 3600: "1 h", 39.47 * 3600: "39.5 h"}),
    ],
)
def test_three_digits_in_the_largest_unit(words, values):
    assert {value: words(value) for value in values} == values
