"""Intervals of means: Student's t at every number of values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from efficientai_toolkit.intervals import difference, interval, mean_ci95


# Quantiles by scipy.stats.t.ppf(0.975, n - 1).
@pytest.mark.parametrize(
    ("count", "quantile"), [(2, 12.7062), (4, 3.1824), (31, 2.0423), (32, 2.0395), (51, 2.0086), (600, 1.9639)]
)
def test_the_width_is_students(count, quantile):
    values = np.random.default_rng(count).normal(3, 2, count)
    mean, half = mean_ci95(values)
    assert mean == pytest.approx(values.mean(), rel=1e-12)
    assert half == pytest.approx(quantile * values.std(ddof=1) / math.sqrt(count), rel=3e-4)


def test_the_interval_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(size=(4000, 5))
    inside = [abs(mean) <= half for mean, half in map(mean_ci95, draws)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.01)


def test_one_value_has_no_width_and_what_is_not_finite_stays_so():
    assert mean_ci95([0.3]) == (0.3, None)
    mean, half = mean_ci95([1.0, math.inf])
    assert mean == math.inf
    assert half is not None
    assert math.isnan(half)


def test_an_interval_counts_tasks_and_not_their_episodes():
    rng = np.random.default_rng(0)
    groups = [f"task {i}" for i in range(20) for _ in range(6)]
    means = rng.standard_normal((2000, 20)).repeat(6, axis=1) + 0.3 * rng.standard_normal((2000, 120))
    covered = np.mean([abs(mean) < width for mean, width in (mean_ci95(row, groups) for row in means)])
    assert covered == pytest.approx(0.95, abs=0.015)
    one_each = rng.standard_normal(40)
    assert mean_ci95(one_each, list(range(40))) == pytest.approx(mean_ci95(one_each))
    assert mean_ci95(one_each, ["one"] * 40)[1] is None
    # Six equal episodes of a task say no more than one of them.
    assert mean_ci95(one_each.repeat(6), np.arange(40).repeat(6).tolist()) == pytest.approx(mean_ci95(one_each))


def test_a_mean_is_shown_to_its_intervals_second_digit():
    assert interval(2.8886, 0.3866) == "2.89 ± 0.39"
    assert interval(4.385, 55.07) == "4 ± 55"
    assert interval(0.00312, 0.00021) == "0.00312 ± 0.00021"
    assert interval(0.7732, 0.0251, percent=True) == "77.3 % ± 2.5"
    assert interval(0.7732, None, percent=True) == "77.3 %"
    assert (interval(1.23456, None), interval(1.23456, 0.0)) == ("1.23", "1.23")
    assert interval(None, None) == interval(float("inf"), float("nan")) == "not finite"
    assert difference(0.026, 0.019, percent=True) == "+2.6 ± 1.9 points"
    assert difference(-0.331, 0.123) == "−0.33 ± 0.12"


def test_numbers_that_no_table_can_hold():
    assert interval(3.4e37, 1e36) == "(3.40 ± 0.10)e37"
    assert interval(5668250179862528, 13587574507784618) == "(0.6 ± 1.4)e16"
    assert interval(*mean_ci95([0.1] * 7)) == interval(0.1, 1e-300) == "0.1"
    assert interval(2.5e-7, 1e-8) == "(2.50 ± 0.10)e-7"
    assert interval(12345.678, 230.0) == "12346 ± 230"
    assert difference(-0.0001, 0.0002, percent=True) == "+0.0 ± 0.0 points"
    assert difference(-3.4e37, 1e36) == "−(3.40 ± 0.10)e37"
