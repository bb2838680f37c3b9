"""The weight of each LoRA in each module.

A weight is a number, a table of patterns, or a vector of one number per block; or one of the `RULES` chooses all.
"""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol, SupportsFloat, TypeAlias

from ..errors import OptionError, did_you_mean
from ..files.architectures import blocks
from ..files.lora import LoRA
from .coefficients import Coefficients
from .rules import RULES, SCOPES, Rule, Scope, measured

if TYPE_CHECKING:
    from ..checkpoints.models import Checkpoint

Weight: TypeAlias = float | Mapping[str, float | str] | str
"""A number; ``{pattern: number}``, where a number may be a ramp such as ``"0.3..1"``; or text, see `parse`."""


class Listed(Protocol):
    """Weights in an array: one per LoRA."""

    def tolist(self) -> Any:
        """Return them as a list."""
        ...


PlainWeights: TypeAlias = Sequence[Weight] | Coefficients | str | None

Weights: TypeAlias = PlainWeights | Sequence[Weight | SupportsFloat | Mapping[str, SupportsFloat | str]] | Listed
"""The values that are taken for weights: numbers may be scalars of numpy or torch, or one array."""

SHARED, ALONE = "@shared", "@alone"
"""Patterns for the modules that another of the LoRAs has too, and for those that no other has."""

ONE_EACH = "One weight per LoRA: weights=[0.7, 0.5]"

PRESETS: Mapping[str, Mapping[str, float | str]] = {
    "blora:content": {"*": 0.0, "unet.up_blocks.0.attentions.0.*": 1.0},
    "blora:style": {"*": 0.0, "unet.up_blocks.0.attentions.1.*": 1.0},
}
"""Named weight tables.  B-LoRA: one attention block of SDXL carries the content, the next one the style.

Source: Frenkel et al., 2024, https://arxiv.org/abs/2403.14572
"""


@dataclass(frozen=True)
class ModuleWeights:
    """The weights of all LoRAs, by module."""

    of: Callable[[str], list[Any]]
    label: tuple[str, ...]
    """Each LoRA's weight as text for a table."""
    deferred: bool = False
    """True if the weights aren't known from headers."""
    columns: bool = False
    """True if a weight may be an array with one number per input column."""
    given: tuple[Weight, ...] | str = ()
    """The argument with which `resolve` gives the same weights again."""
    scope: Scope | None = None
    """The modules over which norms are taken, if the weights are by a rule on norms."""
    sha256: str | None = None
    """`Coefficients.sha256` of learned weights; None for others."""


def resolve(
    loras: Sequence[LoRA],
    weights: Weights,
    scope: Scope | None = None,
    base: "Checkpoint | None" = None,
    *,
    learned: bool = True,
    exclude: Sequence[str] = (),
) -> ModuleWeights:
    """Turn the weights that the user gave into the weights of each module.

    Args:
        loras: The LoRAs that are merged.
        weights: The name of one of the `RULES`; learned coefficients, or the path of their file; or one
            weight per LoRA. None is ``"sum"``.
        scope: For a rule on norms, what they are taken over: each ``module``, each ``component``
            (UNet, text encoder), or the ``whole`` file; None for the rule's own.
        base: The base model, for the norms of layers whose ΔW depends on it.
        learned: False where learned coefficients can't be weights, so that no error offers them.
        exclude: Patterns of modules that were left out of the LoRAs; learned coefficients may be for these, too.

    Raises:
        OptionError: The number of weights is wrong, a number is not finite, a pattern matches nothing.
    """
    weights = plain(weights)
    check_scope(weights, scope)
    if isinstance(weights, str) and weights.endswith(".safetensors"):
        weights = Coefficients.read(weights)
    if isinstance(weights, Coefficients):
        weights.check(loras, exclude)
        label = ("learned",) * len(loras)
        return ModuleWeights(weights.of_module, label, True, True, weights.source, sha256=weights.sha256)
    if weights is None or isinstance(weights, str):
        rule = rule_of(weights or "sum", learned)
        if rule.count is None:
            over = scope or rule.scope
            labels = (f"{rule.name} ({over})",) * len(loras)
            return ModuleWeights(measured(rule, loras, over, base), labels, True, given=rule.name, scope=over)
        share = rule.count(len(loras))
        return ModuleWeights(
            lambda module: [share] * len(loras), (f"{share:.4g}",) * len(loras), given=(share,) * len(loras)
        )
    if len(weights) != len(loras):
        raise OptionError(f"Weights given: {len(weights)}, LoRAs: {len(loras)}. {ONE_EACH}.")
    given = [
        _Given(lora, weight, [*loras[:i], *loras[i + 1 :]])
        for i, (lora, weight) in enumerate(zip(loras, weights, strict=True))
    ]
    return ModuleWeights(
        lambda module: [g.at(module) for g in given],
        tuple(g.label for g in given),
        given=tuple(g.weight for g in given),
    )


def rule_of(name: str, learned: bool = True) -> Rule:
    """Return the rule for weights with this name; the error offers learned coefficients, too, where they can be weights.

    Raises:
        OptionError: There is none.
    """
    try:
        return RULES[name]
    except OptionError as error:
        file = " Or a file of learned coefficients (.safetensors)." if learned else ""
        raise OptionError(f"{error}{file} {ONE_EACH}.") from None


def check_scope(weights: object, scope: Scope | None) -> None:
    """Check that the scope is one, and that the weights are those of a rule on norms, if a scope was given.

    Raises:
        OptionError: It isn't, or they aren't.
    """
    if scope is None:
        return
    if scope not in SCOPES:
        raise OptionError(f"Unknown scope {scope!r}. Available: {', '.join(SCOPES)}.")
    if not takes_scope(weights):
        names = ", ".join(name for name, rule in RULES.items() if rule.sizes)
        raise OptionError(f"The scope {scope!r} goes with weights by a rule on norms only: {names}.")


def takes_scope(weights: object) -> bool:
    """Return whether weights are by a rule on norms, which are taken over a scope."""
    return isinstance(weights, str) and weights in RULES and RULES[weights].count is None


def plain(weights: object) -> PlainWeights:
    """Convert weights to Python's own types: arrays and tensors to lists and numbers, names to lower case."""
    if isinstance(weights, str):
        return weights if weights.endswith(".safetensors") else weights.lower()
    if isinstance(weights, Coefficients):
        return weights
    found: object = weights.tolist() if hasattr(weights, "tolist") else weights
    if found is not None and not isinstance(found, Sequence):
        raise OptionError(f"weights must be a list with one entry per LoRA, such as [0.7, 0.5]; got {weights!r}.")
    return found and [
        {pattern: _scalar(n) for pattern, n in weight.items()} if isinstance(weight, Mapping) else _scalar(weight)
        for weight in found
    ]


def _scalar(value: Any) -> Any:
    """Return an array of one number as Python's number, and anything else as it is."""
    try:
        return value.item() if hasattr(value, "item") and not isinstance(value, Real) else value
    except (TypeError, ValueError, RuntimeError):
        return value


def parse(text: str) -> Weight:
    """Parse a weight as it is typed: ``0.5``, ``0.5;text_encoder=0;*attn2*=0.3``, ``0.3..1``, ``lbw:1,0,0,…`` or ``blora:style``.

    Raises:
        OptionError: It has another form.
    """
    if text.startswith("lbw:"):
        return text
    if text in PRESETS:
        return PRESETS[text]
    table: dict[str, float | str] = {}
    for item in text.split(";"):
        pattern, _, number = item.rpartition("=")
        pattern = pattern.strip() or "*"
        if pattern in table:
            raise OptionError(f"The weight {text!r} gives {pattern!r} twice. {ONE_EACH}.")
        table[pattern] = _value(number.strip(), text)
    only = table["*"] if list(table) == ["*"] else table
    return table if isinstance(only, str) else only


def _value(given: object, whole: str) -> float | str:
    """Return a number, or a ramp between two numbers as text."""
    if not isinstance(given, str) or ".." not in given:
        return _number(str(given), whole)
    _ends(given, whole)
    return "..".join(end.strip() for end in given.split(".."))


def _ends(ramp: str, whole: str) -> list[float]:
    """Return both numbers of a ramp."""
    if "..." in ramp:
        raise OptionError(f"Can't read the weight {whole!r}: a ramp has two dots, such as 0.3..1; got three or more.")
    return [_number(end, whole) for end in ramp.split("..", 1)]


def _number(text: str, whole: str) -> float:
    try:
        value = float(text)
    except ValueError:
        if whole in RULES:
            raise OptionError(
                f"{whole} is a rule for all LoRAs, not a weight of one. Way out: --weights {whole} (weights={whole!r})."
            ) from None
        raise OptionError(
            f"Can't read the weight {whole!r}: wanted a number, NUMBER..NUMBER from the first block to the last, "
            f"'NUMBER;PATTERN=NUMBER;…', 'lbw:NUMBER,NUMBER,…', {' or '.join(PRESETS)}. {ONE_EACH}. Or a rule for all: "
            f"{', '.join(RULES)}.{did_you_mean(whole, RULES)}"
        ) from None
    if not math.isfinite(value):
        raise OptionError(f"The weight {whole!r} is not finite.")
    return value


class _Given:
    """One LoRA's weight as the user gave it."""

    def __init__(self, lora: LoRA, weight: Weight, others: Sequence[LoRA]) -> None:
        if isinstance(weight, str) and not weight.startswith("lbw:"):
            weight = parse(weight)
        self.lora = lora
        self.others = others
        if isinstance(weight, Mapping):
            weight = {pattern: _value(n, f"{pattern}={n}") for pattern, n in weight.items()}
        elif not isinstance(weight, str):
            weight = _number(str(weight), str(weight))
        self.weight = weight
        self.at = self._rule(weight)
        self.label = weight if isinstance(weight, str) else _label(weight)

    def _rule(self, weight: Weight) -> Callable[[str], float]:
        if isinstance(weight, str):
            numbers = [_number(n, weight) for n in weight.removeprefix("lbw:").split(",")]
            return self._by_block(blocks.vector(numbers, self.lora.architecture))
        if isinstance(weight, Mapping):
            return self._by_pattern(weight)
        return lambda module: weight

    def _by_block(self, weights: Mapping[str, float]) -> Callable[[str], float]:
        def at(module: str) -> float:
            name = blocks.block(module, self.lora.architecture)
            if name not in weights and module in self.lora:
                raise OptionError(
                    f"The block vector of {self.lora.name} has no number for block {name} (module {module}). "
                    "Way out: a longer vector, or patterns."
                )
            return weights.get(name, 0.0)

        return at

    def _by_pattern(self, weights: Mapping[str, float | str]) -> Callable[[str], float]:
        architecture = self.lora.architecture
        selector = blocks.Selector([p for p in weights if p not in (SHARED, ALONE)], architecture)

        @cache
        def matching(module: str) -> list[str]:
            found = {*selector.matching(module), SHARED if any(module in o for o in self.others) else ALONE}
            return [pattern for pattern in weights if pattern in found]

        used = {"*"}.union(*map(matching, self.lora))
        for pattern in weights:
            if pattern not in used:
                raise OptionError(
                    f"The pattern {pattern!r} matches no module of {self.lora.name}{self._told(pattern)}. "
                    f"{blocks.offered(self.lora, architecture)}"
                )
        self._check_order({p: {m for m in self.lora if p in matching(m)} for p in weights})

        def at(module: str) -> float:
            # The last match wins, as in a .gitignore: general patterns first, then exceptions.
            found = matching(module)
            weight = weights[found[-1]] if found else 1.0
            return self._on_ramp(weight, module) if isinstance(weight, str) else weight

        return at

    def _check_order(self, matched: Mapping[str, Set[str]]) -> None:
        """Refuse a pattern that a more general one behind it overrides everywhere, as the last match wins."""
        for special, general in combinations(matched, 2):
            if matched[special] and matched[special] < matched[general]:
                raise OptionError(
                    f"The weight for {special!r} is never used in {self.lora.name}: the last pattern that matches counts, and "
                    f"{general!r} behind it matches all {len(matched[special])} of its modules and "
                    f"{len(matched[general] - matched[special])} more. Way out: {general!r} first, then {special!r}."
                )

    def _told(self, pattern: str) -> str:
        """Say why a pattern on what other LoRAs have matches nothing."""
        count = len(self.lora)
        whole = {ALONE: f": all {count} are in another LoRA too", SHARED: f": none of its {count} is in another LoRA"}
        return whole.get(pattern, "")

    def _on_ramp(self, ramp: str, module: str) -> float:
        architecture = self.lora.architecture
        if architecture is None:
            raise OptionError(
                f"The weight {ramp} goes from a model's first block to its last, and the family of {self.lora.name} isn't "
                "known. Way out: architecture=… (--architecture), or patterns."
            )
        first, last = _ends(ramp, ramp)
        return first + (last - first) * blocks.depth(module, architecture)


def _label(weight: float | Mapping[str, float | str]) -> str:
    if isinstance(weight, Mapping):
        return ";".join(f"{pattern}={_label_of(number)}" for pattern, number in weight.items())
    return f"{float(weight):g}"


def _label_of(number: float | str) -> str:
    return number if isinstance(number, str) else f"{float(number):g}"
