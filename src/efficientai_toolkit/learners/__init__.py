"""Learners, one paper a file. To add one: its file, and its line in `LEARNERS`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import ConfigurationError, did_you_mean

if TYPE_CHECKING:
    from .base import MetaLearner

LEARNERS = {
    "alpaca": "alpaca:ALPaCALearner",
    "anil": "anil:ANILLearner",
    "baseline++": "baseline_pp:BaselinePlusPlus",
    "cavia": "cavia:CAVIALearner",
    "fomaml": "fomaml:FOMAMLLearner",
    "imaml": "imaml:IMAMLLearner",
    "leo": "leo:LEOLearner",
    "lslr": "maml_pp:LSLRLearner",
    "maml": "maml:MAMLLearner",
    "maml++": "maml_pp:MAMLPlusPlusLearner",
    "maml_enhanced": "meta_curvature:MAMLEnhancedLearner",
    "matching": "matching:MatchingNetwork",
    "melpa": "melpa:MeLPALearner",
    "meta_curvature": "meta_curvature:MetaCurvatureLearner",
    "meta_sgd": "meta_sgd:MetaSGDLearner",
    "proto_maml": "proto_maml:ProtoMAMLLearner",
    "protonet": "protonet:PrototypicalNetwork",
    "r2d2": "r2d2:R2D2Learner",
    "relation": "relation:RelationNetwork",
    "reptile": "reptile:ReptileLearner",
}


def learner_class(name: str) -> type[MetaLearner]:
    """The class of a learner by its name in configuration."""
    if name not in LEARNERS:
        raise ConfigurationError(f"unknown algorithm {name!r}{did_you_mean(name, LEARNERS)}")
    module, _, attribute = LEARNERS[name].partition(":")
    return getattr(import_module(f".{module}", __name__), attribute)
