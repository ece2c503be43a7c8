"""Our methods as Hugging Face PEFT writes them: its names for them, for their options and for their arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.nn as nn

from ..errors import AdapterError
from .adalora import AdaLoRAConfig
from .base import AdapterConfig
from .dora import DoRAConfig
from .ia3 import IA3Config
from .lora import LoRAConfig, RsLoRAConfig
from .p_tuning import PTuningConfig
from .prefix import PrefixConfig, PrefixMLPConfig, projection
from .prompt_tuning import PromptConfig
from .quantized import out_features
from .select import is_attention, walk
from .vera import VeRAConfig

# What an entry is where there is one: a range is the affair of the method that has it.
TYPES = {
    "peft_type": str,
    "modules_to_save": list[str],
    **dict.fromkeys(("use_dora", "use_rslora"), bool),
    **dict.fromkeys(("r", "init_r", "target_r", "num_virtual_tokens"), int),
    **dict.fromkeys(("tinit", "tfinal", "deltaT", "total_step"), int),
    **dict.fromkeys(("lora_alpha", "lora_dropout", "vera_dropout", "d_initial"), float),
    **dict.fromkeys(("beta1", "beta2", "orth_reg_weight"), float),
}
# Options that change the mathematics and have no counterpart here: they must be absent or have this value.
_MUST_BE = {
    "bias": ("none", None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "target_parameters": (None,),
    "trainable_token_indices": (None,),
}
# Starts of LoRA that leave the base as it is; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) take a part out of it.
_KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva", "mica")


class Method(NamedTuple):
    """How one of our methods is written there."""

    peft_type: str
    leaves: dict[str, str]  # our array -> PEFT's, behind the module's path
    options: Callable[[Any], dict[str, Any]]
    config: Callable[[dict[str, Any]], AdapterConfig]


def _lora_options(config: LoRAConfig) -> dict[str, Any]:
    return {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": isinstance(config, RsLoRAConfig),
        "use_dora": isinstance(config, DoRAConfig),
    }


def _lora_config(data: dict[str, Any]) -> AdapterConfig:
    if data.get("use_dora") and data.get("use_rslora"):
        raise AdapterError("use_dora together with use_rslora has no counterpart here")
    made = DoRAConfig if data.get("use_dora") else RsLoRAConfig if data.get("use_rslora") else LoRAConfig
    return made(rank=data["r"], alpha=data["lora_alpha"], dropout=data.get("lora_dropout", 0.0))


def _adalora_options(config: AdaLoRAConfig) -> dict[str, Any]:
    return {
        **{k: v for k, v in _lora_options(config).items() if not k.startswith("use_")},
        "init_r": config.rank,
        "target_r": config.final_rank,
        "tinit": config.warmup,
        "tfinal": config.cooldown,
        "deltaT": config.interval,
        "beta1": config.beta1,
        "beta2": config.beta2,
        "orth_reg_weight": config.orthogonality,
        # PEFT wants a step at least between the two, and reads the schedule for further training only.
        "total_step": max(config.total_steps, config.warmup + config.cooldown + 1),
    }


def _adalora_config(data: dict[str, Any]) -> AdapterConfig:
    steps = data.get("total_step") or 1000
    first, last = data.get("tinit", 0), data.get("tfinal", 0)
    return AdaLoRAConfig(
        rank=data["init_r"],
        alpha=data["lora_alpha"],
        dropout=data.get("lora_dropout", 0.0),
        target_rank=min(data.get("target_r", data["init_r"]), data["init_r"]),
        warmup=first,
        cooldown=last,
        total_steps=max(steps, first + last),
        interval=data.get("deltaT", 1),
        beta1=data.get("beta1", 0.85),
        beta2=data.get("beta2", 0.85),
        orthogonality=data.get("orth_reg_weight", 0.5),
    )


def _vera_options(config: VeRAConfig) -> dict[str, Any]:
    return {
        "r": config.rank,
        "vera_dropout": config.dropout,
        "d_initial": config.d_initial,
        "projection_prng_key": 0,
        "save_projection": True,
        "bias": "none",
        "fan_in_fan_out": False,
    }


def _vera_config(data: dict[str, Any]) -> AdapterConfig:
    return VeRAConfig(rank=data["r"], d_initial=data.get("d_initial", 0.1), dropout=data.get("vera_dropout", 0.0))


_LORA = Method(
    "LORA",
    {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"},
    _lora_options,
    _lora_config,
)
_PROMPT = Method("PROMPT_TUNING", {}, lambda config: {}, lambda data: PromptConfig(data["num_virtual_tokens"]))
METHODS: dict[type[AdapterConfig], Method] = {
    LoRAConfig: _LORA,
    RsLoRAConfig: _LORA,
    DoRAConfig: _LORA,
    AdaLoRAConfig: Method(
        "ADALORA",
        {"lora_a": "lora_A", "lora_b": "lora_B", "lora_e": "lora_E"},
        _adalora_options,
        _adalora_config,
    ),
    IA3Config: Method("IA3", {"ia3": "ia3_l"}, lambda config: {}, lambda data: IA3Config()),
    VeRAConfig: Method("VERA", {"d": "vera_lambda_d", "b": "vera_lambda_b"}, _vera_options, _vera_config),
    PrefixConfig: Method(
        "PREFIX_TUNING",
        {},
        lambda config: {"prefix_projection": False},
        lambda data: PrefixConfig(data["num_virtual_tokens"]),
    ),
    PromptConfig: _PROMPT,
}
# What trains a network trains it no further there: the prompt or prefix it makes is written.
WRITTEN_AS = {PTuningConfig: PromptConfig, PrefixMLPConfig: PrefixConfig}
BY_PEFT_TYPE = {**{method.peft_type: method for method in METHODS.values()}, "P_TUNING": _PROMPT}
LEARNS_A_PROMPT = ("PREFIX_TUNING", "PROMPT_TUNING")


def check_options(data: Mapping[str, Any], folder: Path) -> None:
    """Refuse what `adapter_config.json` says where it changes the mathematics and has no counterpart here."""
    for option, allowed in _MUST_BE.items():
        if option == "rank_pattern" and data["peft_type"] == "ADALORA":
            continue  # the ranks that the schedule left, which the arrays say too
        if data.get(option) not in (*allowed, None):
            raise AdapterError(f"{folder}: {option} = {data[option]!r} has no counterpart here")
    start = data.get("init_lora_weights")
    if (start.lower() if isinstance(start, str) else start) not in _KEEPS_BASE:
        raise AdapterError(
            f"{folder}: init_lora_weights = {start!r} changed the base weights before the training, so this adapter "
            "does not belong to the plain base; PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…) "
            "makes a plain LoRA of PiSSA, OLoRA, CorDA and LoRA-GA; of others, merge_and_unload and load that model"
        )


def prompt_options(model: nn.Module, config: Any) -> dict[str, Any]:
    """What PEFT wants to know of the base for a prompt or prefix."""
    inner = getattr(model, "inner", "")
    nodes = [node for node in walk(model) if node.path.startswith(inner)]
    attentions: Sequence[Any] = [node.module for node in nodes if is_attention(node.module)]
    if not attentions:
        raise AdapterError("PEFT's prompt methods need a model with attention layers")
    width, head_names = out_features(projection(attentions[0], "key")), ("n_kv_heads", "num_heads", "n_heads")
    heads = next(getattr(attentions[0], n) for n in head_names if hasattr(attentions[0], n))
    if not isinstance(config, PrefixConfig):
        width = out_features(projection(attentions[0], "query"))
    return {
        "num_virtual_tokens": config.length,
        "num_layers": len(attentions),
        "num_attention_heads": heads,
        "num_transformer_submodules": 1,
        "token_dim": width,
    }
