"""Models as users write them: shared layers, MLX's own layers, functions in lists, heads by another name."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from efficientai_toolkit import MLP, MAMLLearner, ModelError, PrototypicalNetwork, functional, learner_class, trainable
from efficientai_toolkit.nn.functional import clone
from efficientai_toolkit.nn.head import features_of, find_head
from learner_cases import blobs, singles


class Layers(nn.Module):
    """One after the other."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = list(layers)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def __call__(self, x):
        return mx.tanh(self.norm(self.linear(x)))


class Shared(nn.Module):
    """One block, used three times, as ALBERT does; and a head with two names."""

    def __init__(self):
        super().__init__()
        block = Block()
        self.first, self.blocks = nn.Linear(2, 8), [block, block, block]
        self.outputs = [nn.Linear(8, 3)]
        self.head = self.outputs[0]

    def __call__(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


# --- shared layers ----------------------------------------------------------------------------------------------------


def test_a_shared_layer_is_listed_once():
    model = Shared()
    assert list(trainable(model)) == [
        f"{path}.{name}"
        for path in ("first", "blocks.0.linear", "blocks.0.norm", "outputs.0")
        for name in ("weight", "bias")
    ]
    assert MAMLLearner(model).num_trainable == 3 * 8 + 9 * 8 + 2 * 8 + 9 * 3


def test_an_array_named_twice_is_put_back():
    model, x = Shared(), mx.ones((4, 2))
    own = model.blocks[0].linear.weight
    once = functional(model)({"blocks.0.linear.weight": 2 * own}, x)
    twice = functional(model)({"blocks.0.linear.weight": 3 * own, "blocks.2.linear.weight": 2 * own}, x)
    assert model.blocks[1].linear.weight is own
    assert mx.array_equal(once, twice)


@pytest.mark.parametrize(
    ("name", "compiled"), [(name, name == "maml") for name in ("maml", "maml++", "anil", "protonet", "leo", "reptile")]
)
def test_a_model_of_shared_layers_is_trained_and_stays_whole(name, compiled):
    learner, stack = learner_class(name)(Shared(), 0.1, num_inner_steps=2, compile=compiled), blobs(2)
    before = {path: mx.array(value) for path, value in trainable(learner.model).items()}
    learner.meta_train_step(stack)
    adapted = learner.adapt(stack.support_x[0], stack.support_y[0])
    model = learner.model
    mx.eval(model.parameters(), adapted.parameters())
    assert model.blocks[0] is model.blocks[2]
    assert not mx.array_equal(model.blocks[2].linear.weight, before["blocks.0.linear.weight"])
    again = learner.evaluate(stack, num_adaptation_steps=(2,))["step_2_loss"]
    assert again == learner.evaluate(stack, num_adaptation_steps=(2,))["step_2_loss"]


def test_a_head_of_two_names_is_one_head():
    model, x = Shared(), mx.ones((4, 2))
    assert find_head(model) == find_head(model, "head") == find_head(model, "outputs.0") == "outputs.0"
    features = features_of(model, "outputs.0")(trainable(model), x)
    assert mx.allclose(model.head(features), model(x))
    assert model.head is model.outputs[0]
    assert isinstance(model.head, nn.Linear)


# --- MLX's own layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        (nn.Dropout(0.5), r"layers\.1 of Layers is an mlx\.nn\.Dropout in training mode.*efficientai_toolkit\.Dropout"),
        (nn.BatchNorm(8), r"mlx\.nn\.BatchNorm in training mode.*efficientai_toolkit\.EpisodicBatchNorm"),
    ],
)
def test_layers_with_a_state_of_their_own_are_refused(layer, sentence):
    model = Layers(nn.Linear(2, 8), layer, nn.Linear(8, 3))
    with pytest.raises(ModelError, match=sentence):
        MAMLLearner(model)
    model.eval()
    learner, stack = MAMLLearner(model, 0.1, compile=False), blobs(2)
    learner.meta_train_step(stack)
    mx.eval(model.parameters())
    adapted = learner.adapt(stack.support_x[0], stack.support_y[0])
    assert mx.array_equal(adapted(stack.query_x[0]), adapted(stack.query_x[0]))


@pytest.mark.parametrize("layer", [nn.Dropout2d(0.5), nn.Dropout3d(0.5)])
def test_dropout_of_channels_is_refused(layer):
    with pytest.raises(ModelError, match=rf"layers\.0 of Layers is an mlx\.nn\.{type(layer).__name__} in training"):
        MAMLLearner(Layers(layer, nn.Linear(8, 3)))


@pytest.mark.parametrize("layer", [nn.Dropout(0.0), nn.BatchNorm(8, track_running_stats=False)])
def test_layers_without_a_state_are_taken(layer):
    model = Layers(nn.Linear(2, 8), layer, nn.Linear(8, 3))
    MAMLLearner(model, compile=False).meta_train_step(blobs(2))
    mx.eval(model.parameters())


def test_inputs_are_looked_at_whole():
    """A batch of one is not what the model is given, and may be what it cannot read."""

    class Centred(nn.Linear):
        def __call__(self, x):
            if x.shape[0] < 2:
                raise ValueError("needs more than one example")
            return super().__call__(x - x.mean(axis=0))

    learner, stack = MAMLLearner(Centred(2, 3), compile=False), blobs(1)
    learner.meta_train_step(stack)
    with pytest.raises(ModelError, match=r"shape \(2,\): needs more than one example"):
        learner.evaluate([tuple(part[:1] for part in singles(stack)[0])])


def test_what_holds_a_model_and_a_function_holds_the_copy():
    class Helper:
        def __init__(self, model):
            self.model, self.activation = model, nn.relu

    model = Shared()
    model.helper, model.activation = Helper(model), nn.relu
    copied = clone(model)
    assert copied.helper.model is copied


@pytest.mark.parametrize("layer", [nn.relu, mx.tanh, nn.gelu, lambda x: mx.maximum(x, 0), nn.Sequential(mx.sigmoid)])
def test_functions_among_layers_are_shared_by_a_copy(layer):
    model = Layers(nn.Linear(2, 8), layer, nn.Linear(8, 3))
    learner, stack = MAMLLearner(model, 0.1, compile=False), blobs(1)
    adapted = learner.adapt(stack.support_x[0], stack.support_y[0])
    assert not mx.array_equal(adapted.layers[0].weight, model.layers[0].weight)
    assert mx.all(mx.isfinite(adapted(stack.query_x[0])))


def test_a_copy_of_pooling_layers():
    model = Layers(nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2), nn.AvgPool2d(2))
    model.own = model  # a model may hold itself by a private name, as MLX leaves those alone
    model._own = model.pop("own")
    x = mx.random.normal((2, 8, 8, 1), key=mx.random.key(0))
    copied: Any = clone(model)
    assert mx.array_equal(copied(x), model(x))
    assert copied._own is copied
    assert copied.layers[1] is not model.layers[1]


def test_a_copy_keeps_methods_and_shared_layers_its_own():
    model = Shared()
    model.act = nn.relu
    model.call = model.__call__
    copied: Any = clone(model)
    assert copied.act is nn.relu
    assert copied.blocks[0] is copied.blocks[2] is not model.blocks[0]
    assert copied.call.__self__ is copied


# --- heads ------------------------------------------------------------------------------------------------------------


def test_another_head_than_the_models_own_is_reached_by_its_input():
    model, x = MLP(2, 3, 8, 2), mx.ones((4, 2))
    params = trainable(model)
    hidden = nn.relu(model.layers[0](x))
    assert mx.allclose(features_of(model, "layers.1")(params, x), hidden)
    assert mx.allclose(features_of(model, "head")(params, x), model.features(x))
    problem = PrototypicalNetwork(model, head="layers.1").problem()
    assert mx.allclose(problem.features(params, x), hidden)
    assert mx.allclose(problem.head(params, hidden), model.layers[1](hidden))
