"""Downsampling keeps extremes and gaps; axes hold their values and have ticks."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa_dist.report.scale import fit, readable
from moa_dist.report.series import Series, downsample

NUMBERS = st.lists(st.floats(), min_size=1, max_size=300)


def test_extremes_ends_and_gaps_survive():
    values = np.sin(np.arange(100_000) / 7)
    values[31_234], values[77_777], values[50_001] = 40.0, -40.0, math.nan
    series = Series.of(np.arange(100_000), values)
    small = downsample(series, 500)
    assert len(small) <= 500
    assert {0, 31_234, 77_777, 50_001, 99_999} <= set(small.steps.tolist())
    assert (np.diff(small.steps) > 0).all()


@given(NUMBERS, st.integers(8, 100))
def test_whatever_the_values(values, limit):
    series = Series.of(range(len(values)), values)
    small, finite = downsample(series, limit), series.finite()
    assert len(small) <= max(limit, 2)
    if len(finite):
        ours = small.finite().values
        assert (ours.min(), ours.max()) == (finite.values.min(), finite.values.max())


@given(NUMBERS)
def test_an_axis_holds_its_values_and_has_ticks(values):
    finite = Series.of(range(len(values)), values).finite().values
    if not finite.size:
        return
    axis = fit(finite, 200.0, 10.0)
    places = axis.place(finite)
    assert np.isfinite(places).all()
    assert (places >= 9.9).all()
    assert (places <= 200.1).all()
    assert len(axis.ticks(5)) <= 20


def test_spikes_make_an_axis_logarithmic():
    assert fit(np.array([3.0, 1e6]), 0, 1).is_log
    assert not fit(np.array([3.0, 6.0]), 0, 1).is_log
    assert not fit(np.array([-3.0, 1e6]), 0, 1).is_log


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (0.0003, "3e-4"),
        (5.33081, "5.331"),
        (12345.6, "12,346"),
        (1.2e9, "1.2e9"),
        (-5e-324, "-4.941e-324"),
    ],
)
def test_readable(value, text):
    assert readable(value) == text
    assert readable(math.nan) == "not finite"
