"""CAVIA (Zintgraf, Shiarlis, Kurin, Hofmann & Whiteson 2019): only a few context parameters adapt."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..errors import ConfigurationError, ModelError, did_you_mean
from ..nn.functional import trainable
from ..nn.head import in_order
from ..settings import Count
from .base import MetaLearner
from .inner_loop import inner_loop
from .learner import Learner
from .update_rules import sgd

CONTEXT, MODULATION = "/context", "/modulation."  # no parameter path has a slash


class CAVIALearner(MetaLearner):
    """MAML whose inner steps change a context vector φ alone, from zero; θ is meta-learned and never adapts.

    φ enters by addition: every modulated array p is used as p + C φ, C learned. For the bias of the first dense layer
    that is exactly φ concatenated to the input, C being the weights of the added inputs; for the scale and shift of a
    normalisation layer it is FiLM, as the paper does for images.

    Options:
        num_context: size of φ.
        modulates: paths of the arrays that φ modulates; by default those of the first layer that has a bias: the bias,
            and for a normalisation layer the scale too.

    Reference: L. Zintgraf, K. Shiarlis, V. Kurin, K. Hofmann, S. Whiteson, *Fast Context Adaptation via
    Meta-Learning*, ICML 2019, arXiv:1810.03642. The paper's `inner_lr` is 1.
    """

    algorithm = "cavia"

    def build(self, *, num_context: Count = 5, modulates: list[str] | None = None) -> Learner:
        paths = modulated_paths(self._model) if modulates is None else tuple(modulates)
        if not paths:
            raise ConfigurationError(
                "modulates names no array, so nothing would adapt; leave it out for the first layer's"
            )
        known = trainable(self._model)
        for path in paths:
            if path not in known:
                raise ConfigurationError(f"modulates: {path!r} is not a trainable parameter{did_you_mean(path, known)}")
        rule = sgd(self.inner_lr)

        def init(params, *, key):
            bound = (num_context + 1) ** -0.5
            keys = mx.random.split(key, len(paths))
            matrices = {
                f"modulation.{path}": mx.random.uniform(-bound, bound, (params[path].size, num_context), key=k)
                for path, k in zip(paths, keys, strict=True)
            }
            return {"model": params, "rule": matrices}

        def modulated(p):
            """The weights that the model runs with."""
            moved = {path: p[path] + (p[MODULATION + path] @ p[CONTEXT]).reshape(p[path].shape) for path in paths}
            own = {path: value for path, value in p.items() if not path.startswith("/")}
            return {path: moved.get(path, value).astype(value.dtype) for path, value in own.items()}

        def adapt(problem, meta, support_x, support_y, *, key, num_steps, each=None):
            def loss(p, x, y, *, key=None):
                return problem.loss(modulated(p), x, y, key=key)

            start = {**meta["model"], **{f"/{name}": c for name, c in meta["rule"].items()}}
            end = inner_loop(
                loss,
                {**start, CONTEXT: mx.zeros((num_context,))},
                support_x,
                support_y,
                rule=rule,
                rule_params={},
                num_steps=num_steps,
                adapts=(CONTEXT,),
                key=key,
                each=None if each is None else lambda k, p: each(k, modulated(p)),
            )
            return modulated(end)

        return Learner(adapt, init)


def modulated_paths(model: nn.Module) -> tuple[str, ...]:
    """The 1-D arrays of the first layer with a trainable bias."""
    path_of = {id(module): path for path, module in model.named_modules()}
    for module in in_order(model):
        own = {name: a for name, a in module.trainable_parameters().items() if isinstance(a, mx.array)}
        if "bias" in own:
            return tuple(f"{path_of[id(module)]}.{name}" for name, a in own.items() if a.ndim == 1)
    raise ModelError(f"{type(model).__name__} has no layer with a trainable bias; name arrays by modulates=[…]")
