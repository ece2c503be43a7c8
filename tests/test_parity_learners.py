"""Meta-gradients and losses equal those of PyTorch's `torch.func`, to rounding.

The fixtures are made by `tests/fixtures/make_torch_fixtures.py`, in float64; each states how far PyTorch's own float32
is from that (5e-6 at worst).
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from efficientai_toolkit import MLP, Conv4, EpisodeStack, FOMAMLLearner, MAMLLearner, ReptileLearner
from efficientai_toolkit.learners.inner_loop import inner_loop
from efficientai_toolkit.learners.learner import bind
from efficientai_toolkit.learners.meta_curvature import MODES, curvature
from efficientai_toolkit.learners.meta_sgd import meta_sgd_rule
from efficientai_toolkit.learners.update_rules import lslr, sgd
from efficientai_toolkit.nn.functional import trainable, update
from efficientai_toolkit.nn.layers import Conv2d, EpisodicBatchNorm, max_pool2d

FIXTURES = Path(__file__).parent / "fixtures"
LEARNERS = {"maml": MAMLLearner, "fomaml": FOMAMLLearner, "reptile": ReptileLearner}
CASES = ("mlp_mse", "mlp_ce", "mlp_rules", "conv4", "attention")
TOLERANCE = 1e-5


class Attention(nn.Module):
    """MLX's own layers and its fused attention, against PyTorch's written out by hand."""

    def __init__(self, width: int = 8, heads: int = 2, classes: int = 3):
        super().__init__()
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.heads = heads

    def __call__(self, x: mx.array) -> mx.array:
        n, length, width = x.shape
        size = width // self.heads
        q, k, v = (
            layer(x).reshape(n, length, self.heads, size).transpose(0, 2, 1, 3)
            for layer in (self.query, self.key, self.value)
        )
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=size**-0.5)
        y = x + self.out(y.transpose(0, 2, 1, 3).reshape(n, length, width))
        return self.head(mx.mean(self.norm(y), axis=1))


class PlainConv4(nn.Module):
    """Conv-4 layer by layer, as one would write it; the shipped one does the same in fewer passes."""

    def __init__(self, filters: int = 8, classes: int = 5):
        super().__init__()
        channels = [1, filters, filters, filters]
        self.blocks = [
            {"conv": Conv2d(c, filters, 3, padding=1, bias=False), "norm": EpisodicBatchNorm(filters)} for c in channels
        ]
        self.head = nn.Linear(filters, classes)

    def __call__(self, x: mx.array) -> mx.array:
        for block in self.blocks:
            x = max_pool2d(nn.relu(block["norm"](block["conv"](x))))
        return self.head(x.reshape(x.shape[0], -1))


MODELS = {
    "mlp_mse": lambda: MLP(1, 1, 40, 2),
    "mlp_ce": lambda: MLP(2, 3, 16, 2),
    "mlp_rules": lambda: MLP(1, 1, 20, 2),
    "conv4": lambda: Conv4((28, 28, 1), 5, 8),
    "attention": Attention,
}


class Fixture:
    def __init__(self, name: str):
        with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as file:
            arrays = dict(file)
        self.meta = json.loads(str(arrays.pop("meta")))
        self.arrays = {path: mx.array(a.astype(np.int32) if a.dtype == np.int64 else a) for path, a in arrays.items()}
        parts = ("support_x", "support_y", "query_x", "query_y")
        self.stack = EpisodeStack(*(self.arrays[f"episode/{part}"] for part in parts))

    def under(self, prefix: str) -> dict[str, mx.array]:
        return {path[len(prefix) :]: value for path, value in self.arrays.items() if path.startswith(prefix)}

    def model(self, make) -> nn.Module:
        model, params = make(), self.under("param/")
        assert {path: value.shape for path, value in trainable(model).items()} == {
            path: value.shape for path, value in params.items()
        }
        update(model, params)
        return model


def error(ours: mx.array, theirs: mx.array) -> float:
    return (mx.linalg.norm((ours - theirs).reshape(-1)) / mx.linalg.norm(theirs.reshape(-1))).item()


def assert_same(ours: dict[str, mx.array], theirs: dict[str, mx.array]) -> None:
    assert ours.keys() == theirs.keys()
    errors = {path: error(ours[path], theirs[path]) for path in theirs}
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("chunk", [None, 1], ids=["stacked", "looped"])
@pytest.mark.parametrize("algorithm", LEARNERS)
@pytest.mark.parametrize("case", CASES)
def test_meta_gradient(case, algorithm, chunk):
    fixture = Fixture(case)
    learner = LEARNERS[algorithm](
        fixture.model(MODELS[case]),
        inner_lr=fixture.meta["inner_lr"],
        num_inner_steps=fixture.meta["steps"],
        chunk=fixture.stack.num_tasks if chunk is None else chunk,
        compile=case == "mlp_ce",  # the first compilation of the larger graphs takes seconds
    )
    metrics, grads = learner.meta_gradient(fixture.stack)
    assert_same(grads, {f"model/{path}": value for path, value in fixture.under(f"{algorithm}/grad/").items()})
    for name in ("query_loss", "support_loss"):
        assert metrics[name].item() == pytest.approx(fixture.arrays[f"{algorithm}/{name}"].item(), rel=TOLERANCE)


def test_conv4_layer_by_layer():
    fixture = Fixture("conv4")
    learner = MAMLLearner(
        fixture.model(PlainConv4), fixture.meta["inner_lr"], num_inner_steps=fixture.meta["steps"], compile=False
    )
    _, grads = learner.meta_gradient(fixture.stack)
    assert_same(grads, {f"model/{path}": value for path, value in fixture.under("maml/grad/").items()})


def test_checkpointed_steps_give_the_same_gradient():
    fixture = Fixture("mlp_mse")
    learner = MAMLLearner(
        fixture.model(MODELS["mlp_mse"]), fixture.meta["inner_lr"], num_inner_steps=3, checkpoint=True, compile=False
    )
    _, grads = learner.meta_gradient(fixture.stack)
    assert_same(grads, {f"model/{path}": value for path, value in fixture.under("maml/grad/").items()})


# --- the shipped rules that are meta-learned, in the inner loop -------------------------------------------------------


RULES = {
    "meta_sgd": lambda steps, rate: meta_sgd_rule(0.005, 0.1),
    "lslr": lslr,
    "mc1": lambda steps, rate: curvature(sgd(rate), MODES["mc1"]),
    "mc2": lambda steps, rate: curvature(sgd(rate), MODES["mc2"]),
}


def renamed(arrays: dict[str, mx.array], algorithm: str) -> dict[str, mx.array]:
    """The fixture's names of a rule's arrays as the shipped rule has them."""
    if algorithm in ("meta_sgd", "lslr"):
        return {f"rate.{path}": value for path, value in arrays.items()}
    split = {tuple(name.rsplit("/", 1)): value for name, value in arrays.items()}
    return {f"{'scale' if mode == 'diagonal' else mode}.{path}": value for (path, mode), value in split.items()}


@pytest.mark.parametrize("algorithm", RULES)
@pytest.mark.parametrize("case", ["mlp_ce", "mlp_rules"])
def test_gradients_reach_the_rule(case, algorithm):
    fixture = Fixture(case)
    rate, steps = fixture.meta["inner_lr"], fixture.meta["steps"]
    rule, arrays = RULES[algorithm](steps, rate), renamed(fixture.under(f"rule/{algorithm}/"), algorithm)
    problem = bind(fixture.model(MODELS[case]))
    own = rule.init(fixture.under("param/"), key=mx.random.key(0))
    assert {name: a.shape for name, a in own.items()} == {name: a.shape for name, a in arrays.items()}

    def task(meta, sx, sy, qx, qy):
        fast = inner_loop(problem.loss, meta["model"], sx, sy, rule=rule, rule_params=meta["rule"], num_steps=steps)
        return problem.loss(fast, qx, qy)

    def outer(meta):
        return mx.mean(mx.vmap(task, in_axes=(None, 0, 0, 0, 0))(meta, *fixture.stack))

    loss, grads = mx.value_and_grad(outer)({"model": fixture.under("param/"), "rule": arrays})
    assert loss.item() == pytest.approx(fixture.arrays[f"{algorithm}/query_loss"].item(), rel=TOLERANCE)
    assert_same(grads["model"], fixture.under(f"{algorithm}/grad/"))
    assert_same(grads["rule"], renamed(fixture.under(f"{algorithm}/rule_grad/"), algorithm))
