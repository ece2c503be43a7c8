"""How VeRA's frozen pair is drawn."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from efficientai_toolkit.adapters import adapter_config, attach


def test_the_pair_is_drawn_as_he_et_al_draw_it():
    model = attach(nn.Linear(96, 96), adapter_config("vera", rank=64), "linear")
    pair = model["adapter_shared"]["default"]
    for array, fan_in in ((pair.a, 96), (pair.b, 64)):
        bound = (6 / fan_in) ** 0.5
        assert 0.98 * bound < mx.abs(array).max().item() <= bound
        assert abs(mx.std(array).item() / (2 / fan_in) ** 0.5 - 1) < 0.05
