"""Numbers in words: durations, bytes."""

import pytest

from ntkdask.wording import duration, format_bytes


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0 s"),
        (7.2e-6, "7.2 µs"),
        (1.5e-3, "1.5 ms"),
        (48.04, "48 s"),
        (125.0, "2 min 05 s"),
        (1e7, "2,777 h 46 min"),
    ],
)
def test_duration(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (65.7 * 2**30, "65.7 GiB"),
        (2**40, "1 TiB"),
        (5000 * 2**40, "4.88 PiB"),
    ],
)
def test_bytes_in_binary_units(n, text):
    assert format_bytes(n) == text
