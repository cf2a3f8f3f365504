"""Sizes and durations: nothing but nothing is shown as 0, and no unit overflows."""

import pytest

from geomreg.units import duration_text, size_text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1, "1 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 KB"),
        (9_994, "9.99 KB"),
        (9_996, "10.0 KB"),
        (999_400, "999 KB"),
        (999_600, "1.00 MB"),
        (123_456_789, "123 MB"),
        (2.5e9, "2.50 GB"),
        (7e15, "7000 TB"),
    ],
)
def test_sizes(size, text):
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (0.00012, "0.00012 s"),
        (0.5, "0.5 s"),
        (1.0, "1 s"),
        (12.34, "12.3 s"),
        (99.4, "99.4 s"),
        (100, "1.7 min"),
        (3600, "60 min"),
        (7200, "2 h"),
        (36_000, "10 h"),
        (172_800, "2.0 days"),
    ],
)
def test_durations(seconds, text):
    assert duration_text(seconds) == text
