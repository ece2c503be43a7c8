"""Meta-Curvature (Park & Oliva 2019): inner gradients are transformed by learned matrices, one for each mode."""

from __future__ import annotations

import math

import mlx.core as mx

from ..errors import ConfigurationError
from .base import MetaLearner
from .learner import Learner
from .maml import maml
from .update_rules import UpdateRule, lslr, sgd

MODES = {"mc1": ("in", "filter"), "mc2": ("in", "filter", "out")}


def curvature(rule: UpdateRule, modes: tuple[str, ...]) -> UpdateRule:
    """`rule` on G ×_out M_o ×_filter M_f ×_in M_i in place of each gradient G; the matrices start at identity.

    For a dense weight (out, in) that is M_o G M_iᵀ; for a convolution (out, k, k, in), whose filter mode is k²
    wide, the three-mode product. Arrays of one dimension are scaled elementwise. Arrays: `MODE.PATH`.
    """

    def init(params, *, key):
        arrays = rule.init(params, key=key)
        for path, p in params.items():
            if p.ndim < 2:
                arrays[f"scale.{path}"] = mx.ones(p.shape)
                continue
            sizes = {"out": p.shape[0], "filter": math.prod(p.shape[1:-1]), "in": p.shape[-1]}
            for mode in modes:
                if mode != "filter" or p.ndim > 2:
                    arrays[f"{mode}.{path}"] = mx.eye(sizes[mode])
        return arrays

    def update(rule_params, state, grads, params, step):
        grads = {path: _transform(rule_params, path, grads[path]).astype(p.dtype) for path, p in params.items()}
        return rule.update(rule_params, state, grads, params, step)

    return UpdateRule(update, init, rule.start)


def _transform(matrices, path, g):
    if f"scale.{path}" in matrices:
        return matrices[f"scale.{path}"] * g
    shape, out, width = g.shape, g.shape[0], g.shape[-1]
    if f"in.{path}" in matrices:
        g = g @ matrices[f"in.{path}"].T
    if f"filter.{path}" in matrices:
        g = matrices[f"filter.{path}"] @ g.reshape(out, -1, width)
    if f"out.{path}" in matrices:
        g = matrices[f"out.{path}"] @ g.reshape(out, -1)
    return g.reshape(shape)


class MetaCurvatureLearner(MetaLearner):
    """Meta-Curvature: θ′ = θ − α MC(∇L_support(θ)), with MC learned along with θ.

    Options:
        kind: "mc2" transforms every mode of a gradient (input, filter, output); "mc1" holds M_o of every layer, the
            last too, at the identity.
        first_order: count the inner gradients as constants.

    Reference: E. Park, J. B. Oliva, *Meta-Curvature*, NeurIPS 2019, arXiv:1902.03356. "mc2" is the authors' published
    code (github.com/silverbottlep/maml, `--mc=True`): biases have an elementwise scale, every matrix starts at the
    identity, and the product is multiplied by the fixed rate `inner_lr`. That code has no MC1, so "mc1" could not be
    held against it.
    """

    algorithm = "meta_curvature"

    def build(self, *, kind: str = "mc2", first_order: bool = False) -> Learner:
        return maml(curvature(sgd(self.inner_lr), _modes(kind)), second_order=not first_order)


class MAMLEnhancedLearner(MetaLearner):
    """MAML Enhanced: Meta-Curvature with learned per-layer, per-step rates (LSLR) in place of the fixed one.

    Options:
        kind, first_order: as for `MetaCurvatureLearner`.
    """

    algorithm = "maml_enhanced"
    per_step_rule = True

    def build(self, *, kind: str = "mc2", first_order: bool = False) -> Learner:
        rule = curvature(lslr(self.num_inner_steps, self.inner_lr), _modes(kind))
        return maml(rule, second_order=not first_order)


def _modes(kind: str) -> tuple[str, ...]:
    if kind not in MODES:
        raise ConfigurationError(f"kind must be one of {', '.join(MODES)}, got {kind!r}")
    return MODES[kind]
