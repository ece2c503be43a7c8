"""Models of float16 and bfloat16: every learner stays finite, keeps the weights' dtype, and its checkpoints load."""

from __future__ import annotations

import mlx.core as mx
import pytest

from efficientai_toolkit import MLP, Conv4, SimpleClassifier, learner_class, mse_loss
from efficientai_toolkit.backbones.resnet12 import DropBlock, ResNet12
from efficientai_toolkit.learners.metric import cosine_head, squared_distances, unit
from efficientai_toolkit.learners.update_rules import adam, clip_scale
from efficientai_toolkit.nn.elementwise import add_scaled
from efficientai_toolkit.nn.functional import functional, key_scope, trainable
from efficientai_toolkit.nn.layers import EpisodicBatchNorm
from learner_cases import blobs, sines

HALVES = (mx.float16, mx.bfloat16)
DTYPES = pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: str(dtype)[9:])


def in_half(stack, dtype):
    return type(stack)(*(a.astype(dtype) if a.dtype == mx.float32 else a for a in stack))


def made(name, dtype, **options):
    regression = name == "alpaca" or options.get("decodes") == "all"
    model = MLP(hidden_dim=8) if regression else SimpleClassifier(hidden_dim=8, num_classes=3)
    model.set_dtype(dtype)
    learner = learner_class(name)(model, inner_lr=0.05, num_inner_steps=2, compile=False, **options)
    return learner, in_half(sines(2) if regression else blobs(2), dtype)


@DTYPES
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("maml", {}),
        ("reptile", {"inner_optimizer": "adam"}),
        ("meta_sgd", {}),
        ("lslr", {}),
        ("maml++", {}),
        ("meta_curvature", {}),
        ("maml_enhanced", {}),
        ("leo", {}),
        ("leo", {"decodes": "all"}),
        ("r2d2", {}),
        ("alpaca", {}),
        ("protonet", {}),
        ("protonet", {"distance_metric": "cosine"}),
        ("proto_maml", {}),
        ("proto_maml", {"distance_metric": "cosine"}),
        ("matching", {}),
        ("matching", {"full_context": True}),
        ("relation", {}),
        ("baseline++", {}),
        ("imaml", {}),
        ("cavia", {}),
        ("melpa", {}),
        ("melpa", {"update": "optimizer"}),
    ],
)
def test_a_learner_of_half_precision_stays_finite_and_keeps_every_dtype(name, options, dtype):
    learner, stack = made(name, dtype, **options)
    before = {path: a.dtype for path, a in learner.meta["model"].items()}
    rules = {path: a.dtype for path, a in learner.meta["rule"].items()}
    for _ in range(3):
        metrics = learner.meta_train_step(stack)
    assert all(mx.isfinite(mx.array(value)).item() for value in metrics.values())
    assert {path: a.dtype for path, a in learner.meta["model"].items()} == before
    assert {path: a.dtype for path, a in learner.meta["rule"].items()} == rules
    assert all(mx.all(mx.isfinite(a)).item() for part in learner.meta.values() for a in part.values())
    if learner.adapts_by_steps:
        assert {a.dtype for _, a in learner.model.trainable_parameters().items() if isinstance(a, mx.array)} <= {dtype}
        adapted = learner.adapt(stack.support_x[0], stack.support_y[0])
        assert adapted(stack.query_x[0]).dtype == (mx.float32 if name == "baseline++" else dtype)


@DTYPES
def test_the_outer_step_is_that_of_float32_up_to_the_rounding_of_the_weights(dtype):
    learner, stack = made("maml", dtype)
    start = {path: a.astype(mx.float32) for path, a in learner.meta["model"].items()}
    _, grads = learner.meta_gradient(stack)
    learner.meta_train_step(stack)
    for path, a in learner.meta["model"].items():
        g = grads[f"model/{path}"].astype(mx.float32)
        expected = start[path] - 0.001 * g / (mx.abs(g) + 1e-8)  # Adam's first step
        spacing = 2.0 ** (-10 if dtype == mx.float16 else -7)
        assert mx.all(mx.abs(a - expected) <= spacing * mx.abs(expected) + 1e-6).item(), path


@DTYPES
def test_the_gradient_s_norm_is_taken_in_float32(dtype):
    model = SimpleClassifier(hidden_dim=8, num_classes=3)
    model.set_dtype(dtype)
    learner = learner_class("maml")(model, num_inner_steps=0, gradient_clip=1.0, compile=False)
    stack = in_half(blobs(2), dtype)
    metrics = learner.meta_train_step(stack, lambda predictions, y: 1000.0 * mx.mean(predictions))
    assert 256 < metrics["grad_norm"] < 65504  # its square is more than float16 holds
    assert 0 < metrics["param_diff"] < 1


@DTYPES
def test_a_checkpoint_of_half_precision_loads_and_goes_on_bit_for_bit(dtype, tmp_path):
    learner, stack = made("maml_enhanced", dtype)
    learner.meta_train_step(stack)
    learner.save(tmp_path / "a.npz")
    other, _ = made("maml_enhanced", dtype)
    other.load(tmp_path / "a.npz")
    ends = [one.meta_train_step(stack) for one in (learner, other)]
    assert ends[0] == ends[1]
    assert all(mx.array_equal(a, other.meta["model"][path]).item() for path, a in learner.meta["model"].items())


@DTYPES
def test_add_scaled_has_the_dtypes_of_what_it_is_given_in_both_orders(dtype):
    x, y, factor = mx.array([1.0, 2.0], dtype=dtype), mx.array([3.0, -1.0], dtype=dtype), mx.array(0.5)

    def loss(x, factor, y):
        return mx.sum(add_scaled(x, factor, y))

    grads = mx.grad(loss, argnums=(0, 1, 2))(x, factor, y)
    assert add_scaled(x, factor, y).dtype == dtype
    assert [g.dtype for g in grads] == [dtype, mx.float32, dtype]
    assert [g.tolist() for g in grads] == [[1, 1], 2, [0.5, 0.5]]
    curved = mx.grad(lambda f: mx.sum(mx.square(mx.grad(loss, argnums=2)(x, f, y))))(factor)
    assert (curved.dtype, curved.item()) == (mx.float32, 2.0)
    stacked = mx.vmap(add_scaled, in_axes=(0, None, 0))(x[None], factor, y[None])
    assert stacked.dtype == mx.vmap(add_scaled)(x[None], factor[None], y[None]).dtype == dtype


@DTYPES
def test_inner_adam_and_the_clip_of_gradients_survive_what_float16_loses(dtype):
    params, rule = {"w": mx.zeros((2,), dtype)}, adam(0.1)
    moved, _ = rule.update({}, rule.start(params), {"w": mx.array([1e-5, 0.0], dtype=dtype)}, params, 0)
    assert moved["w"].dtype == dtype
    assert moved["w"].tolist() == pytest.approx([-0.1, 0.0], rel=0.01)
    scale = clip_scale({"w": mx.full((4,), 300.0, dtype)}, 6.0)
    assert scale.item() == pytest.approx(0.01, rel=1e-2)


@DTYPES
def test_dropblock_scales_what_it_keeps_where_there_are_more_numbers_than_float16_counts(dtype):
    x = mx.ones((8, 21, 21, 32), dtype)
    with key_scope(mx.random.key(0)):
        y = DropBlock(0.2, 5)(x)
    assert y.dtype == dtype
    assert mx.mean(y.astype(mx.float32)).item() == pytest.approx(1, abs=0.01)


@DTYPES
def test_a_network_with_batch_norm_has_half_precision_features_of_float32_s_values(dtype):
    model = Conv4((28, 28, 1), 5, hidden_dim=4)
    x = mx.random.normal((10, 28, 28, 1), key=mx.random.key(0))
    exact = model.features(x)
    model.set_dtype(dtype)
    found = model.features(x.astype(dtype)).astype(mx.float32)
    assert float(mx.linalg.norm(found - exact)) <= 0.05 * float(mx.linalg.norm(exact))


@DTYPES
@pytest.mark.parametrize(
    "make",
    [lambda: Conv4((84, 84, 3), 5, 4, 2), lambda: ResNet12((64, 64, 3), 5, (4, 8, 8, 8))],
    ids=["fused", "by layers"],
)
def test_batch_norm_counts_more_pixels_than_float16_does(make, dtype):
    model = make()
    side = 84 if isinstance(model, Conv4) else 64
    x = 8 * mx.random.uniform(shape=(15, side, side, 3), key=mx.random.key(0))

    def loss(params, x):
        return mse_loss(functional(model)(params, x), mx.zeros((15, 5)))

    exact = model(x)
    model.set_dtype(dtype)
    found, (value, grads) = model(x.astype(dtype)), mx.value_and_grad(loss)(trainable(model), x.astype(dtype))
    assert found.dtype == dtype
    assert float(mx.linalg.norm(found - exact)) <= 0.2 * float(mx.linalg.norm(exact))
    assert all(mx.all(mx.isfinite(g)).item() and g.dtype == dtype for g in grads.values())
    assert mx.isfinite(value).item()


@DTYPES
def test_cosines_and_distances_of_very_small_and_very_large_rows(dtype):
    rows = mx.array([[0, 0], [300, 400], [3e-4, 4e-4]], dtype=dtype)
    assert mx.allclose(unit(rows), mx.array([[0, 0], [0.6, 0.8], [0.6, 0.8]]), atol=0.01)
    assert mx.isfinite(mx.grad(lambda x: mx.sum(unit(x)))(rows)).all().item()
    assert squared_distances(rows, rows[:1])[:, 0].tolist() == pytest.approx([0, 250000, 2.5e-7], rel=0.02)
    weight, bias = cosine_head(rows, mx.eye(3), 10.0)
    assert mx.isfinite(weight).all().item()
    assert mx.isfinite(bias).all().item()
    assert mx.linalg.norm(weight[1]).item() == pytest.approx(10 / (500 / 3), rel=0.01)


@DTYPES
@pytest.mark.parametrize(
    ("name", "options"),
    [("protonet", {}), ("protonet", {"distance_metric": "cosine"}), ("matching", {}), ("baseline++", {})],
)
def test_large_inputs_are_classified_as_in_float32(name, options, dtype):
    """Embeddings whose squares are more than float16 holds."""
    found = []
    for kind in (mx.float32, dtype):
        learner, stack = made(name, kind, **options)
        far = stack._replace(support_x=200 * stack.support_x, query_x=200 * stack.query_x)
        found.append(learner.evaluate(far, num_adaptation_steps=(2,))["step_2_acc"])
    assert found[1] == pytest.approx(found[0], abs=0.1)


@DTYPES
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("protonet", {"distance_metric": "cosine"}),
        ("proto_maml", {"distance_metric": "cosine"}),
        ("matching", {}),
        ("baseline++", {}),
        ("melpa", {}),
    ],
)
@pytest.mark.parametrize("shot", [1, 2])
def test_a_row_of_dead_features_leaves_the_weights_finite(name, options, shot, dtype):
    model = SimpleClassifier(hidden_dim=8, num_classes=3)
    for layer in model.layers:
        layer.bias = mx.full((8,), -0.1)
    model.set_dtype(dtype)
    stack = in_half(blobs(2, shot=shot), dtype)
    stack = stack._replace(support_x=mx.concatenate([stack.support_x[:, :-1], 0 * stack.support_x[:, -1:]], axis=1))
    assert not mx.any(model.features(stack.support_x[0])[-1]).item()
    learner = learner_class(name)(model, inner_lr=0.05, num_inner_steps=2, **options)
    for _ in range(2):
        metrics = learner.meta_train_step(stack)
    assert all(mx.isfinite(mx.array(value)).item() for value in metrics.values())
    assert all(mx.all(mx.isfinite(a)).item() for part in learner.meta.values() for a in part.values())


def test_a_batch_norm_of_whole_numbers_has_fractions():
    x = mx.array([[0, 10, 255], [3, 4, 5], [9, 200, 7]])
    plain = EpisodicBatchNorm(3)(x.astype(mx.float32))
    for dtype in (mx.uint8, mx.int32):
        y = EpisodicBatchNorm(3)(x.astype(dtype))
        assert y.dtype == mx.float32
        assert mx.allclose(y, plain, atol=1e-5).item()


@DTYPES
def test_squared_errors_beyond_what_float16_holds(dtype):
    predictions, y = mx.full((100,), 400.0, dtype), mx.zeros((100,), dtype)
    assert mse_loss(predictions, y).item() == pytest.approx(160000)
