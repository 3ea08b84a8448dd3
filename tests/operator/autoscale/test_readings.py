"""Which values can be trusted, and what is said about the others."""

from __future__ import annotations

from math import inf, nan

import pytest

from kvfleet_operator.autoscale.readings import Quality, Raw, Reading, failed, judge


def judged(raw: Raw, expected: int | None = 2) -> Reading:
    return judge("concurrency", "AverageValue", raw, expected_sources=expected, source_name="router", max_age_s=60.0)


@pytest.mark.parametrize(
    ("raw", "expected", "quality", "words"),
    [
        (Raw(5.0, 10.0, 2, 12.0), 2, Quality.FRESH, ""),
        (Raw(5.0, 10.0, 3, 12.0), 2, Quality.FRESH, ""),
        (Raw(5.0, 10.0), None, Quality.FRESH, ""),
        (Raw(0.0, 10.0, 2, 60.0), 2, Quality.FRESH, ""),
        (Raw(5.0, 10.0, 1, 12.0), 2, Quality.PARTIAL, "only 1 of 2 routers report it"),
        (Raw(5.0, 10.0, 2, 61.0), 2, Quality.STALE, "61 s old, more than 60 s"),
        (Raw(5.0, 10.0, 2, 12.0), 0, Quality.STALE, "no router is ready"),
        (Raw(None, 10.0, 0), 2, Quality.ABSENT, "no router reports it"),
        (Raw(None, 10.0), None, Quality.ABSENT, "no router reports it"),
        (Raw(None, 10.0, 2, 1.0), 2, Quality.SILENT, "no router has a figure yet"),
        (Raw(None, 10.0, 1, 1.0), 2, Quality.PARTIAL, "only 1 of 2 routers"),
        (Raw(None, 10.0, 2, 61.0), 2, Quality.STALE, "61 s old"),
        (Raw(5.0, None, 2, 12.0), 2, Quality.ABSENT, "set one in the signal"),
        (Raw(nan, 10.0, 2, 12.0), 2, Quality.INVALID, "its value is nan"),
        (Raw(inf, 10.0, 2, 12.0), 2, Quality.INVALID, "its value is inf"),
        (Raw(5.0, 0.0, 2, 12.0), 2, Quality.INVALID, "its target is 0"),
        (Raw(5.0, nan, 2, 12.0), 2, Quality.INVALID, "its target is nan"),
    ],
)
def test_a_raw_value_is_judged(raw: Raw, expected: int | None, quality: Quality, words: str) -> None:
    reading = judged(raw, expected)
    assert (reading.quality, reading.fresh) == (quality, quality is Quality.FRESH)
    assert words in reading.message
    assert bool(reading.message) == (quality is not Quality.FRESH)


def test_only_fresh_and_partial_values_can_be_used() -> None:
    assert judged(Raw(5.0, 10.0, 1, 1.0)).usable == (5.0, 10.0)
    assert judged(Raw(5.0, 10.0, 2, 99.0)).usable is None
    assert failed("x", "Value", "refused").usable is None
