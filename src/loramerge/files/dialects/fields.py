"""PEFT's configurations: what each of their fields means for the tensors beside them.

Source: https://github.com/huggingface/peft, tuners/lora/config.py and layer.py; tuners/adalora, loha and lokr.
"""

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

from ...errors import FileError, LayerError, NumberError
from ...layers import Layer, LowRank, Relative
from ...tensors import LARGEST
from .patterns import Patterns

Config = Mapping[str, Any]


class Kind(NamedTuple):
    """A kind of adapter whose tensors and scale are read as PEFT reads them."""

    alpha: str
    """The field that holds alpha."""
    roles: frozenset[str]
    """Roles of tensors, of which every layer of the kind has one."""


KINDS: dict[str, Kind] = {
    "LORA": Kind("lora_alpha", frozenset({"down"})),
    "LOHA": Kind("alpha", frozenset({"hada_w1_a"})),
    "LOKR": Kind("alpha", frozenset({"lokr_w1", "lokr_w1_a"})),
    "ADALORA": Kind("lora_alpha", frozenset({"diagonal"})),
}

ALPHA, RANK, INITIAL_RANK = 8, 8, 12
"""PEFT's own values of alpha, ``r`` and ``init_r``, where a configuration has none."""

SCALED = frozenset(role for kind in KINDS.values() for role in kind.roles)
"""Roles of tensors that a configuration scales."""

WHOLE = frozenset({"lokr_w1", "lokr_w2"})
"""Roles of a LoKr without factors, which PEFT scales and LyCORIS doesn't."""

READ = frozenset(
    {"peft_type", "r", "init_r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"}
    | {"init_lora_weights"}
)
"""Fields that give the scale, or say what the factors are."""

KEPT = frozenset({"base_model_name_or_path", "revision", "task_type"})
"""Fields about the base model, which stay where all inputs of a merge agree."""

NOTED = frozenset({"bias", "modules_to_save", "trainable_token_indices"})
"""Fields by which a file holds trained weights besides the adapter."""

HARMLESS = frozenset(
    {"auto_mapping", "peft_version", "inference_mode", "runtime_config", "ensure_weight_tying", "megatron_core"}
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_bias", "fan_in_fan_out"}
    | {"lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "velora_config", "monteclora_config"}
    | {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "init_weights"}
    | {"use_effective_conv2d", "decompose_both", "decompose_factor"}
    | {"target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}
)
"""Fields that say how it was trained, or what the tensors say too; ΔW is the same without them."""

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
"""Fields with which the factors are no update of a module's weight, and why; harmless where they are empty."""

PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` that leave the base weights alone."""

WAY_OUT = "merge it into the base with PEFT (merge_and_unload), and extract a LoRA from the result (loramerge extract)"


def checked(config: Config) -> dict[str, Any]:
    """A configuration with its patterns compiled.

    Raises:
        FileError: It is not of a kind that is read, or has a field with which the factors mean something else.
    """
    name = str(config.get("peft_type") or "LORA").upper()
    if name not in KINDS:
        raise FileError(
            f"its configuration is of PEFT's {config['peft_type']}, and read are {', '.join(KINDS)}. Way out, if PEFT "
            f"can merge it: {WAY_OUT}"
        )
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
    """The ranks that AdaLoRA left, out of its lists of what stays."""
    if not isinstance(masks, Mapping) or not all(isinstance(mask, list) for mask in masks.values()):
        raise FileError("rank_pattern in the configuration is not AdaLoRA's: wanted an object of lists")
    return {str(key).partition(".lora_E")[0]: sum(map(bool, mask)) for key, mask in masks.items()}


def strange(config: Config) -> list[str]:
    """Fields with a value that no table here knows."""
    known = READ | KEPT | NOTED | HARMLESS | REFUSED.keys()
    return [field for field, value in config.items() if value and field not in known]


def about(config: Config) -> dict[str, str]:
    """What a configuration says of the base model."""
    return {field: value for field in sorted(KEPT) if isinstance(value := config.get(field), str)}


def start(config: Config) -> str | None:
    """How the factors began, if the base weights were changed to begin with them: ΔW is then not their product."""
    value = config.get("init_lora_weights")
    plain = value is None or isinstance(value, bool) or str(value).lower() in PLAIN_STARTS
    return None if plain else str(value).lower()


def alpha(config: Config, names: Sequence[str], rank: int, roles: Set[str]) -> float:
    """Effective alpha of a module: what alpha / rank must be for PEFT's scale.

    Args:
        config: A `checked` configuration.
        names: What patterns may call the module.
        rank: That of the module's own factors, 1 where it has none.
        roles: The roles of its tensors.

    Raises:
        LayerError: The tensors are not of the configuration's kind, or of its rank.
        NumberError: A number in the configuration is none.
    """
    kind = KINDS[config["peft_type"]]
    if not roles & kind.roles:
        raise LayerError(f"its tensors are not those of PEFT's {config['peft_type']}, of which the configuration is")
    if config["peft_type"] == "ADALORA":
        return _adalora(config, names, rank)
    value = _number(config, kind.alpha, names, ALPHA, "alpha_pattern")
    whole = roles >= WHOLE
    told = _number(config, "r", names, RANK if whole else rank, "rank_pattern")
    if whole:
        return value / max(told, 1)
    _check_rank(config, told, rank)
    return value * math.sqrt(rank) if config.get("use_rslora") else value


def as_trained(layer: Layer, config: Config) -> Layer:
    """A layer as its configuration means it: with factors that began as a part of the base weight, or without.

    Raises:
        LayerError: A magnitude is missing, or ΔW depends on the base weight in two ways.
    """
    if layer.inner.kind != "lora":
        return layer
    began = start(config)
    if config.get("use_dora") and layer.axis is None:
        raise LayerError("the configuration has use_dora, and the layer has no magnitude, so it is not whole")
    if began and layer.axis is not None:
        raise LayerError(f"a DoRA layer with init_lora_weights {began!r} can't be read. Way out: {WAY_OUT}")
    return Relative(trained=layer, start=began) if began and isinstance(layer, LowRank) else layer


def _adalora(config: Config, names: Sequence[str], rank: int) -> float:
    """PEFT scales by alpha / (init_r + 10⁻⁵), whatever rank is left."""
    began = _number(config, "init_r", names, INITIAL_RANK)
    value = _number(config, "lora_alpha", names, ALPHA)
    ranks = config["rank_pattern"]
    left = next((ranks[name] for name in names if name in ranks), began)
    _check_rank(config, left, rank)
    return (value if value > 0 else rank) / (max(began, 1) + 1e-5) * rank


def _check_rank(config: Config, told: float, rank: int) -> None:
    if told != rank:
        raise LayerError(
            f"the configuration, PEFT's {config['peft_type']}, says rank {told:g}, and its factors have rank {rank}, so its "
            "scale can't be told. Ways out: put the adapter_config.json of the same download beside the file, or give "
            "the right one in Python (config=…)"
        )


def _number(config: Config, field: str, names: Sequence[str], default: float, pattern: str | None = None) -> float:
    """A module's number: of the first name that a pattern matches, else of the field, else PEFT's own."""
    patterns: Patterns | None = config[pattern] if pattern else None
    matched = [patterns.of(name, None) for name in names] if patterns else []
    given = next((value for value in matched if value is not None), config.get(field))
    value = default if given is None else given
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST["F32"]:
        raise NumberError(f"the configuration's {field} of {names[0]} is {value!r}, wanted a finite number")
    return float(value)
