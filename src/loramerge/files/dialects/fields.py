"""PEFT's configurations, and what each of their fields means for the tensors of the adapter.

Source: https://github.com/huggingface/peft, tuners/lora/config.py and layer.py; tuners/adalora, loha and lokr.
"""

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

from ...errors import FileError, LayerError, NumberError
from ...layers import Layer, LowRank
from ...tensors import LARGEST
from .patterns import Patterns

Config = Mapping[str, Any]


class Kind(NamedTuple):
    """A kind of adapter whose tensors and scale are read as PEFT reads them."""

    alpha: str
    """The field that holds alpha."""
    roles: frozenset[str]
    """Roles of tensors; every layer of the kind has one of them."""


KINDS: dict[str, Kind] = {
    "LORA": Kind("lora_alpha", frozenset({"down"})),
    "LOHA": Kind("alpha", frozenset({"hada_w1_a"})),
    "LOKR": Kind("alpha", frozenset({"lokr_w1", "lokr_w1_a"})),
    "ADALORA": Kind("lora_alpha", frozenset({"diagonal"})),
}

ALPHA, RANK, INITIAL_RANK = 8, 8, 12
"""PEFT's defaults of alpha, ``r`` and ``init_r``."""

SCALED = frozenset(role for kind in KINDS.values() for role in kind.roles)
"""Roles of tensors that a configuration scales."""

WHOLE = frozenset({"lokr_w1", "lokr_w2"})
"""Roles of a LoKr without factors, which PEFT scales and LyCORIS doesn't."""

SWITCHES = ("use_rslora", "use_dora")
"""Fields of `READ` that are true or false."""

READ = frozenset(
    {"peft_type", "r", "init_r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"}
    | {"init_lora_weights"}
)
"""Fields that give the scale or the kind of factors."""

KEPT = frozenset({"base_model_name_or_path", "revision", "task_type"})
"""Fields about the base model: a merge keeps those that all its inputs agree on."""

NOTED = frozenset({"bias", "modules_to_save", "trainable_token_indices"})
"""Fields that put trained weights other than the adapter into the file."""

HARMLESS = frozenset(
    {"auto_mapping", "peft_version", "inference_mode", "runtime_config", "ensure_weight_tying", "megatron_core"}
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_bias", "fan_in_fan_out"}
    | {"lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "velora_config", "monteclora_config"}
    | {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "init_weights"}
    | {"use_effective_conv2d", "decompose_both", "decompose_factor"}
    | {"target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}
)
"""Fields about the training, and fields that repeat what the tensors say: ΔW doesn't depend on them."""

REFUSED: dict[str, str] = {
    "use_qalora": "QA-LoRA's factors work on sums of inputs",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "kasa_config": "KaSA takes the smallest singular values out of the base weights",
    "arrow_config": "Arrow routes every token to another adapter",
    "alora_invocation_tokens": "aLoRA works only behind certain tokens",
    "layer_replication": "its layers are those of a model whose blocks were repeated",
    "target_parameters": "its factors update parameters that are no weight of a module",
    "megatron_config": "its factors are one part of those of a model that was split over several GPUs",
}
"""Fields that make the factors something else than an update of a module's weight, and why; harmless if empty."""

PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` that leave the base weights alone."""

WAY_OUT = "merge it into the base with PEFT (merge_and_unload), and extract a LoRA from the result (loramerge extract)"


def checked(config: Config) -> dict[str, Any]:
    """Check a configuration and compile its patterns.

    Raises:
        FileError: Its kind can't be read, or it has one of the fields in `REFUSED`.
    """
    name = str(config.get("peft_type") or "LORA").upper()
    if name not in KINDS:
        raise FileError(
            f"its configuration is of PEFT's {config['peft_type']}, and read are {', '.join(KINDS)}. Way out, if PEFT "
            f"can merge it: {WAY_OUT}"
        )
    for field in SWITCHES:
        if not isinstance(config.get(field, False), bool | None):
            raise FileError(f"its configuration's {field} is {config[field]!r}, wanted true or false")
    for field, why in REFUSED.items():
        if config.get(field):
            raise FileError(f"its configuration has {field}: {why}. Way out, if PEFT can merge it: {WAY_OUT}")
    patterns = {"alpha_pattern": Patterns(config.get("alpha_pattern") or {}, "alpha_pattern")}
    ranks = config.get("rank_pattern") or {}
    return {
        **config,
        **patterns,
        "rank_pattern": _left(ranks) if name == "ADALORA" else Patterns(ranks, "rank_pattern"),
        "peft_type": name,
    }


def _left(masks: Any) -> dict[str, int]:
    """Count the ranks that AdaLoRA left, from its lists of masks."""
    if not isinstance(masks, Mapping) or not all(isinstance(mask, list) for mask in masks.values()):
        raise FileError("rank_pattern in the configuration is not AdaLoRA's: wanted an object of lists")
    return {str(key).partition(".lora_E")[0]: sum(map(bool, mask)) for key, mask in masks.items()}


def strange(config: Config) -> list[str]:
    """List the fields that have a value and are in no table of this file."""
    known = READ | KEPT | NOTED | HARMLESS | REFUSED.keys()
    return [field for field, value in config.items() if value and field not in known]


def about(config: Config) -> dict[str, str]:
    """Return the fields about the base model."""
    return {field: value for field in sorted(KEPT) if isinstance(value := config.get(field), str)}


def start(config: Config) -> str | None:
    """Return the initialisation if it took the factors out of the base weights: ΔW is then not their product."""
    value = config.get("init_lora_weights")
    plain = value is None or isinstance(value, bool) or str(value).lower() in PLAIN_STARTS
    return None if plain else str(value).lower()


def is_uniform(config: Config) -> bool:
    """Return whether a `checked` configuration means the same for every module of one rank: it has no patterns."""
    patterns = (config["alpha_pattern"], config["rank_pattern"])
    return not any(pattern.count if isinstance(pattern, Patterns) else pattern for pattern in patterns)


def alpha(config: Config, names: Sequence[str], rank: int, roles: Set[str]) -> float:
    """Return the effective alpha of a module: alpha / rank is PEFT's scale.

    Args:
        config: A `checked` configuration.
        names: Names that patterns may call the module.
        rank: Rank of the module's own factors, 1 if it has none.
        roles: The roles of its tensors.

    Raises:
        LayerError: The tensors are not of the configuration's kind, or of its rank.
        NumberError: A value in the configuration isn't a finite number.
    """
    kind = KINDS[config["peft_type"]]
    if not roles & kind.roles:
        raise LayerError(f"its tensors are not those of PEFT's {config['peft_type']}, of which the configuration is")
    if config["peft_type"] == "ADALORA":
        return _adalora(config, names, rank)
    value = _number(config, kind.alpha, names, ALPHA, "alpha_pattern")
    whole = roles >= WHOLE
    stated = _number(config, "r", names, RANK if whole else rank, "rank_pattern")
    if whole:
        return value / max(stated, 1)
    _check_rank(config, stated, rank)
    return value * math.sqrt(rank) if config.get("use_rslora") and config["peft_type"] == "LORA" else value


def as_trained(layer: Layer, config: Config) -> Layer:
    """Return a layer as its configuration means it: a `Relative` one if its factors began as a part of the base weight.

    Raises:
        LayerError: A magnitude is missing, or ΔW depends on the base weight in two ways.
    """
    if layer.inner.kind != "lora":
        return layer
    initial = start(config)
    if config.get("use_dora") and layer.axis is None:
        raise LayerError("the configuration has use_dora, and the layer has no magnitude, so it is not whole")
    if initial and layer.axis is not None:
        raise LayerError(f"a DoRA layer with init_lora_weights {initial!r} can't be read. Way out: {WAY_OUT}")
    if not initial or not isinstance(layer, LowRank):
        return layer
    from ...layers import Relative

    return Relative(trained=layer, start=initial)


def _adalora(config: Config, names: Sequence[str], rank: int) -> float:
    """Return AdaLoRA's alpha: PEFT scales by alpha / (init_r + 10⁻⁵), whatever rank is left."""
    initial = _number(config, "init_r", names, INITIAL_RANK)
    value = _number(config, "lora_alpha", names, ALPHA)
    ranks = config["rank_pattern"]
    left = next((ranks[name] for name in names if name in ranks), initial)
    _check_rank(config, left, rank)
    return (value if value > 0 else rank) / (max(initial, 1) + 1e-5) * rank


def _check_rank(config: Config, stated: float, rank: int) -> None:
    if stated != rank:
        raise LayerError(
            f"the configuration, PEFT's {config['peft_type']}, says rank {stated:g}, and its factors have rank {rank}, so its "
            "scale can't be told. Ways out: put the adapter_config.json of the same download beside the file, or give "
            "the right one in Python (config=…)"
        )


def _number(config: Config, field: str, names: Sequence[str], default: float, pattern: str | None = None) -> float:
    """Return a module's number: of the first name that a pattern matches, else of the field, else PEFT's default."""
    patterns: Patterns | None = config[pattern] if pattern else None
    matched = [patterns.of(name, None) for name in names] if patterns else []
    stated = next((value for value in matched if value is not None), config.get(field))
    value = default if stated is None else stated
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST["F32"]:
        raise NumberError(f"the configuration's {field} of {names[0]} is {value!r}, wanted a finite number")
    return float(value)
