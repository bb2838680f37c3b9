"""How ZipLoRA learns, and the settings that others published."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from ..errors import OptionError
from .penalties import Penalty

Init = Literal["lsq", "ones", "mean"]
Loss = Literal["normalised", "norm", "mse"]
Parametrisation = Literal["column", "softmax", "down"]


@dataclass(frozen=True)
class Settings:
    """How to learn; `PRESETS` has the published ones.

    Raises:
        OptionError: A value is unknown, out of range, or of no effect beside the others.
    """

    steps: int = 50
    lr: float = 1e-2
    batch_size: int = 1
    """Examples of each LoRA in a step."""
    init: Init = "lsq"
    """Coefficients to begin with: the closed form, 1 (the sum), or 1/N (the average)."""
    parametrisation: Parametrisation = "column"
    """What is learned: ``column``: one factor a column.  ``down``: the whole ``down`` factors; the rank is the
    same.  ``softmax``: one factor a module, Σ mᵢ = 1 by a softmax, as MoLE's gates but for every input alike."""
    loss: Loss = "normalised"
    """normalised: Σ wᵢ ‖ε − εᵢ‖² / mean ‖εᵢ − ε_base‖².  norm: Σ wᵢ ‖ε − εᵢ‖₂, the paper's.  mse: the mean square."""
    penalty: Penalty = "none"
    lam: float = 0.0
    """Weight of the penalty."""
    mean_penalty: bool = True
    """Whether the penalty is averaged over modules; the paper adds up."""
    weight_decay: float = 0.0
    shared_noise: bool = False
    """Whether all LoRAs' examples of a step draw the same noise and timestep."""
    stop_below: float = 0.0
    """Stop once the penalty without its weight is below: the paper stops at 0."""
    calibration: int = 16
    """Batches of each LoRA for the closed form, and for the normalisation."""
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [*self._out_of_range(), *self._of_no_effect()]
        if wrong:
            raise OptionError(f"ZipLoRA: {'; '.join(wrong)}.")

    def _out_of_range(self) -> list[str]:
        wrong = []
        for name, known in (("init", Init), ("parametrisation", Parametrisation), ("loss", Loss), ("penalty", Penalty)):
            if getattr(self, name) not in get_args(known):
                wrong.append(f"{name} must be one of {', '.join(get_args(known))}, got {getattr(self, name)!r}")
        for name, kind, least in (
            ("steps", int, 0),
            ("batch_size", int, 1),
            ("calibration", int, 1),
            ("seed", int, 0),
            ("lr", float, 0),
            ("lam", float, 0),
            ("weight_decay", float, 0),
            ("stop_below", float, 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int | kind) or isinstance(value, bool) or not least <= value < math.inf:
                wanted = "a whole number" if kind is int else "a number"
                wrong.append(f"{name} must be {wanted} from {least}, got {value!r}")
        return wrong

    def _of_no_effect(self) -> list[str]:
        return [
            told
            for told, so in (
                ("lr must be above 0", self.lr == 0),
                ("lam needs a penalty", self.lam and self.penalty == "none"),
                ("stop_below needs a penalty", self.stop_below and self.penalty == "none"),
                ("a penalty needs coefficients, not 'down'", self.penalty != "none" and self.parametrisation == "down"),
                (
                    "softmax begins at the average: init='mean'",
                    self.parametrisation == "softmax" and self.init != "mean",
                ),
            )
            if so
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
}
"""``default`` is ours; ``paper`` is equation 3 and appendix A of the paper; ``lora.rar`` is the ZipLoRA
that LoRA.rar compares with, https://arxiv.org/abs/2412.05148; ``mkshing`` is
https://github.com/mkshing/ziplora-pytorch with the README's learning rate, which moves a coefficient
by 0.005 at most: it is here to show that it does nothing."""


def settings(preset: str = "default", **changes: Any) -> Settings:
    """A preset with some settings changed.

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
