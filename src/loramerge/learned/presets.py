"""Settings of ZipLoRA, and presets with those that others published."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

from ..errors import OptionError
from ..merging.methods import Range, Seed
from ..merging.methods.options import Count, NonNegative, Positive, misfits

Init = Literal["lsq", "ones", "mean"]
Loss = Literal["normalised", "norm", "mse"]
Parametrisation = Literal["column", "rank", "softmax", "sigmoid", "down"]
Gates = Literal["module", "block", "input"]
Penalty = Literal["none", "dot", "absmean", "cos", "columns", "balance"]


@dataclass(frozen=True)
class Settings:
    """The settings of a ZipLoRA run; `PRESETS` has the default and those that papers publish.

    Raises:
        OptionError: A value is unknown, out of range, or has no effect with the others.
    """

    steps: Annotated[int, Range(0)] = 50
    lr: Positive = 1e-2
    batch_size: Count = 1
    """Examples of each LoRA in a step."""
    init: Init = "lsq"
    """Coefficients to begin with: the closed form, 1 (the sum), or 1/N (the average)."""
    parametrisation: Parametrisation = "column"
    """The learned numbers.  ``column``: one factor per column.  ``rank``: one factor per unit of rank, as the file has
    them, DuoLoRA's ZipRank, https://arxiv.org/abs/2504.13206.  ``down``: the whole ``down`` factors; the rank is the
    same.  Gates are one factor per LoRA: ``softmax``, Σ mᵢ = 1, or ``sigmoid``, each of its own in (0, 2)."""
    gates: Gates = "module"
    """The modules that share a gate: a ``module``, a ``block``, or a block in one picture and step, ``input``, as MoLE's
    do, which no file of a LoRA can hold: see `mole`."""
    loss: Loss = "normalised"
    """normalised: Σ wᵢ ‖ε − εᵢ‖² / mean ‖εᵢ − ε_base‖².  norm: Σ wᵢ ‖ε − εᵢ‖₂, the paper's.  mse: the mean square."""
    penalty: Penalty = "none"
    """``balance`` is MoLE's, −log Π qᵢ of each LoRA's share qᵢ of the gates; the others compare columns."""
    lam: NonNegative = 0.0
    """Weight of the penalty."""
    mean_penalty: bool = True
    """True averages the penalty over modules; the paper sums it."""
    weight_decay: NonNegative = 0.0
    shared_noise: bool = False
    """True gives all LoRAs' examples of a step the same noise and timestep."""
    stop_below: NonNegative = 0.0
    """Stop once the penalty, without its weight, is below this; 0 never stops.  The paper stops at 0, which its preset
    approximates by 1e-3."""
    calibration: Count = 16
    """Batches per LoRA for the closed form, and for the normalisation."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        wrong = [*misfits(self), *self._of_no_effect()]
        if wrong:
            raise OptionError(f"ZipLoRA: {'; '.join(wrong)}.")

    @property
    def gated(self) -> bool:
        """True if there is one factor per LoRA."""
        return self.parametrisation in ("softmax", "sigmoid")

    @property
    def by_column(self) -> bool:
        """True if the result is a merge with a weight per column, or with one weight for all of them."""
        return self.parametrisation not in ("down", "rank")

    def _of_no_effect(self) -> list[str]:
        return [
            message
            for message, wrong in (
                ("lam needs a penalty", self.lam and self.penalty == "none"),
                ("stop_below needs a penalty", self.stop_below and self.penalty == "none"),
                (
                    f"a penalty needs coefficients of columns, not {self.parametrisation!r}",
                    self.penalty != "none" and not self.by_column,
                ),
                (
                    "softmax begins at the average: init='mean'",
                    self.parametrisation == "softmax" and self.init != "mean",
                ),
                (
                    "sigmoid begins at the sum: init='ones'",
                    self.parametrisation == "sigmoid" and self.init != "ones",
                ),
                (
                    "gates of blocks and the balance need parametrisation='softmax' or 'sigmoid'",
                    not self.gated and (self.gates != "module" or self.penalty == "balance"),
                ),
                (
                    "gates='input' have no columns: penalty='balance' or 'none'",
                    self.gates == "input" and self.penalty not in ("none", "balance"),
                ),
            )
            if wrong
        ]


_MKSHING = Settings(
    steps=100,
    lr=5e-5,
    init="ones",
    loss="mse",
    penalty="absmean",
    lam=0.01,
    mean_penalty=False,
    weight_decay=1e-4,
    shared_noise=True,
)

PRESETS: Mapping[str, Settings] = {
    "default": Settings(),
    "paper": Settings(
        steps=100, init="ones", loss="norm", penalty="dot", lam=0.01, mean_penalty=False, stop_below=1e-3
    ),
    "lora.rar": replace(_MKSHING, lr=0.01, penalty="cos"),
    "mkshing": _MKSHING,
    "mole": Settings(steps=100, init="mean", parametrisation="softmax", gates="block", penalty="balance", lam=0.5),
}
"""``default`` is loramerge's own; ``paper`` is equation 3 and appendix A of the paper; ``lora.rar`` is the ZipLoRA
that LoRA.rar compares with, https://arxiv.org/abs/2412.05148; ``mkshing`` is
https://github.com/mkshing/ziplora-pytorch with the README's learning rate, which moves a coefficient
by 0.005 at most: it is here to show that this has no effect; ``mole`` are the gates by block of
https://arxiv.org/abs/2404.13628 with its balance, the same for every input so that a file can hold them, and with
``gates="input"`` those that follow it; the paper trains 400 steps at 1e-5, on a loss of CLIP's."""


def settings(preset: str = "default", **changes: Any) -> Settings:
    """Return a preset with some settings changed.

    Raises:
        OptionError: The preset or a setting is unknown, or a value is out of range.
    """
    if preset not in PRESETS:
        raise OptionError(f"Unknown preset {preset!r}. Available: {', '.join(PRESETS)}.")
    known = [field.name for field in fields(Settings)]
    unknown = [name for name in changes if name not in known]
    if unknown:
        raise OptionError(f"Unknown setting {unknown[0]!r}. Available: {', '.join(known)}.")
    return replace(PRESETS[preset], **changes)
