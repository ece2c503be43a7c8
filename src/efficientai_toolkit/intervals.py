"""How sure a mean is."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

# 97.5 % quantiles of Student's t for 1 … 30 degrees of freedom.
_T975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

_ROUNDING = 1e-7  # of float32, relative


def mean_ci95(values: ArrayLike, groups: Sequence[Hashable] | None = None) -> tuple[float, float | None]:
    """(mean, half-width of its 95 % interval by Student's t) of values (N,): tasks, episodes or seeds.

    Args:
        values: independent of one another, but within a group.
        groups: of which group each is (several episodes of one task); default: all are independent. Then what varies
            is a group's sum of differences from the mean, and there are as many of those as groups.

    One value, or one group, has no width: None. Values that are not finite make both numbers so, without a warning.
    """
    values = np.asarray(values, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        mean = float(values.mean())
        sums = values - mean
        if groups is not None:
            number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
            sums = np.bincount([number[group] for group in groups], sums, len(number))
        count = len(sums)
        if count < 2:
            return mean, None
        error = float(np.sqrt((sums**2).sum() * count / (count - 1))) / len(values)
        return mean, _t975(count - 1) * error


def interval(mean: float | None, ci95: float | None, *, percent: bool = False) -> str:
    """`77.3 % ± 2.5` of a share, `2.89 ± 0.39` of anything else: no digits beyond the interval's second.

    A width that is rounding alone is none, and what is very large or small has a power of ten: `(3.40 ± 0.10)e37`.
    """
    if mean is None or not math.isfinite(mean):
        return "not finite"
    width = ci95 if ci95 and math.isfinite(ci95) and ci95 > _ROUNDING * abs(mean) else None
    if percent:
        return f"{100 * mean:.1f} %" + ("" if width is None else f" ± {100 * width:.1f}")
    if width is None:
        return f"{mean:.3g}"
    digits, power = 1 - math.floor(math.log10(width)), math.floor(math.log10(max(abs(mean), width)))
    if -5 < power < 6:
        return f"{mean:.{max(0, digits)}f} ± {width:.{max(0, digits)}f}"
    digits, unit = max(0, digits + power), 10.0**power
    return f"({mean / unit:.{digits}f} ± {width / unit:.{digits}f})e{power}"


def difference(mean: float | None, ci95: float | None, *, percent: bool = False) -> str:
    """`+2.6 ± 1.9 points` of two shares, `−0.33 ± 0.12` of anything else."""
    text = interval(None if mean is None else abs(mean), ci95, percent=percent)
    if mean is None or not math.isfinite(mean):
        return text
    zero = not any(digit in text.partition(" ±")[0] for digit in "123456789")
    return ("−" if mean < 0 and not zero else "+") + (text.replace(" %", "") + " points" if percent else text)


def _t975(freedom: int) -> float:
    """The quantile; beyond the table by the expansion in 1 / freedom, right to 1e-4 there."""
    return _T975[freedom - 1] if freedom <= len(_T975) else 1.95996 + 2.3723 / freedom + 2.8225 / freedom**2
