"""Compositions: functions of one call of the denoiser, with a name, a source and options.

A composition works by two primitives. ``together`` runs the denoiser once, each LoRA at a weight of its own in every
module, row and place; ``each`` runs it once per share of the LoRAs, and the composition combines the predictions.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from os import PathLike
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ...errors import OptionError
from ...files.lora import LoRA
from ...files.triggers import PHRASE
from ...learned.attach import Attachment, Gates
from ...merging.methods.options import Option, checked, options_of, title_of
from ...scoring.pictures import Box
from . import attention, places
from .layouts import Grid, grid_of, text_of

Curve: TypeAlias = Sequence[tuple[float, float]]
"""Keyframes ``(progress, factor)``, progress from 0 (noise) to 1 (picture); linear in between, constant outside."""


@dataclass(frozen=True)
class Use:
    """A LoRA and its weight, and for compositions its words, its place and its times."""

    lora: LoRA
    weight: float = 1.0
    words: str | None = None
    """Its name in the prompt, such as ``psq-person``; the file's trigger phrase by default."""
    noun: str | None = None
    """A common noun for it, such as ``person``: `clora` tells the other LoRAs' passes no more than that."""
    box: Box | None = None
    """The part of the picture where it acts; with a mask, the mask within that part."""
    mask: str | PathLike[str] | None = None
    """A picture, white where it acts."""
    curve: Curve = ()
    """Factors on its weight over time."""

    def __post_init__(self) -> None:
        if not all(len(point) == 2 and 0 <= point[0] <= 1 and math.isfinite(point[1]) for point in self.curve):
            raise OptionError(
                f"The curve {list(self.curve)}: wanted pairs of a progress from 0 to 1 and a finite factor."
            )

    @property
    def called(self) -> str | None:
        """Its words, or the file's trigger phrase."""
        return self.words or self.lora.metadata.get(PHRASE)

    @property
    def found_by_words(self) -> bool:
        """True if nothing but its words says where it acts."""
        return self.box is None and self.mask is None

    def required(self) -> str:
        """Return its words.

        Raises:
            OptionError: There are none.
        """
        if self.called:
            return self.called
        raise OptionError(
            f"A composition must know what {self.lora.name} is called in the prompt, and its metadata name no trigger. "
            "Ways out: words= (--words), or a place: mask= (--mask) or box= (--box), which is (0, 0, 1, 1) for everywhere."
        )

    def at(self, progress: float) -> float:
        """Return its weight at a progress in [0, 1]."""
        if not self.curve:
            return self.weight
        points = sorted(self.curve, key=lambda point: point[0])  # of two at one progress, the later holds from there
        for (a, low), (b, high) in pairwise(points):
            if a <= progress < b:
                return self.weight * (low + (high - low) * (progress - a) / (b - a))
        return self.weight * (points[0] if progress < points[0][0] else points[-1])[1]


Compose = Callable[..., Tensor]
"""``compose(call, **options)``: the prediction for all rows of one call."""


@dataclass(frozen=True)
class Composition:
    """A way for several LoRAs to be at work at once."""

    name: str
    function: Compose
    source: str
    passes: str
    """Passes of the denoiser per step, for N LoRAs."""
    placed: bool = False
    """True if each LoRA needs a place: words that find it, a box or a mask."""
    options: Mapping[str, Option] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The first line of the function's docstring."""
        return title_of(self.function, self.name)

    def files(self) -> list[str]:
        """List the options that are files."""
        return [name for name, option in self.options.items() if option.kind is str and not option.choices]

    def check(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return all options: those given, and the defaults of the others.

        Raises:
            OptionError: An option is unknown, or its value is out of range.
        """
        return checked(f"The composition {self.name}", self.options, given)


def composition(name: str, *, source: str, passes: str, placed: bool = False) -> Callable[[Compose], Composition]:
    """Name a composition; its keyword-only parameters become its options, one of any text is a file.

    Args:
        name: The name that users type.
        source: The paper, or the code.
        passes: Passes of the denoiser per step, for N LoRAs.
        placed: True if each LoRA needs a place.
    """
    return lambda function: Composition(name, function, source, passes, placed, options_of(function))


@dataclass
class Drawing:
    """The drawing at work, as compositions see it: its prompts, its step, and values that they remembered."""

    prompts: list[str] = field(default_factory=list)
    """One per picture; empty if the pipeline was given embeddings."""
    pictures: int = 0
    """Zero until prompts were encoded."""
    ids: list[list[int]] = field(default_factory=list)
    """The tokens of each picture's text, where a template surrounds the prompt."""
    begun: bool = False
    """True once there are steps."""
    first: int = 0
    """Place of the drawing's first time step among the scheduler's: not 0 in image to image."""
    step: int = 0
    calls: int = 0
    """Calls of the denoiser since the last step."""
    memory: dict[str, Any] = field(default_factory=dict)


@dataclass
class Call:
    """One call of the denoiser by the pipeline."""

    run: Callable[..., Tensor]
    """The denoiser without a composition; takes ``given`` and returns the prediction."""
    given: Mapping[str, Any]
    """The denoiser's arguments by name."""
    sample: str
    """The name of the latents among them."""
    uses: Sequence[Use]
    attached: Attachment
    drawing: Drawing
    progress: float
    """From 0 at the first step to nearly 1 at the last."""
    pipe: Any
    model: nn.Module
    encoded: Callable[[Sequence[str], int], Mapping[str, Tensor]]
    """Encodes prompts with one LoRA, or with none for a number below zero."""
    passes: list[attention.Maps] = field(default_factory=list)
    """The attention of each pass inside of `looking`."""

    @property
    def count(self) -> int:
        """Number of LoRAs, N."""
        return len(self.uses)

    @property
    def latents(self) -> Tensor:
        """The noisy latents, ``(rows, …)``."""
        found = self.given[self.sample]
        return torch.stack(found) if isinstance(found, list) else found

    @property
    def grid(self) -> Grid:
        """Frames, height and width of the latents, in places."""
        return grid_of(self.given, self.latents)

    @property
    def rows(self) -> int:
        """Rows of the batch: those without the prompt, if there is guidance, and then one per picture."""
        return len(self.latents)

    @property
    def pictures(self) -> int:
        """Pictures that are drawn; the last rows of the batch belong to them and their prompts."""
        return self.drawing.pictures

    @property
    def weights(self) -> Tensor:
        """Each LoRA's weight now, ``(N,)``."""
        return torch.tensor([use.at(self.progress) for use in self.uses], device=self.latents.device)

    def together(self, gates: Gates | Tensor | None = None, given: Mapping[str, Any] | None = None) -> Tensor:
        """Run the denoiser once with all LoRAs.

        Args:
            gates: Each LoRA's weight, ``(N,)``, or as a function of module, site and input; the LoRAs' own by default.
            given: The denoiser's arguments, if others than the pipeline's.
        """
        weights = self.weights if gates is None else gates
        self.passes.append({})
        self.attached.gates = weights if callable(weights) else places.everywhere(weights)
        return self.run(**(self.given if given is None else given))

    def each(self, shares: Tensor, given: Sequence[Mapping[str, Any]] | None = None) -> Tensor:
        """Run the denoiser once per row of shares, one after the other, and return all predictions.

        Args:
            shares: Factors on each LoRA's weight, ``(passes, N)``.
            given: The denoiser's arguments for each pass, if others than the pipeline's.

        Returns:
            Predictions, ``(passes, rows, …)``.
        """
        weights = self.weights
        return torch.stack(
            [self.together(share * weights, given[i] if given else None) for i, share in enumerate(shares.to(weights))]
        )

    @contextmanager
    def looking(self, columns: Sequence[Tensor]) -> Iterator[list[attention.Maps]]:
        """Read the attention that words attract in each pass inside the block.

        Args:
            columns: For each pass the shares of the text's tokens, ``(pictures, tokens, words)``.
        """
        self.passes = []
        with attention.looking(self.model, self.passes, columns, self.pictures, self.grid):
            yield self.passes

    def pieces(self, called: Sequence[str], prompts: Sequence[str] | None = None) -> Tensor:
        """Return the tokens of each LoRA's words one by one, ``(pictures, tokens, N, most)``: 1 at the token of each.

        Args:
            called: The words of each LoRA; those of a LoRA with a box or a mask aren't looked for.
            prompts: One per picture; the drawing's by default.

        Raises:
            OptionError: A LoRA has no words, or a prompt lacks them.
        """
        length = text_of(self.given)
        ids: Sequence[list[int] | None] = self.drawing.ids or [None] * self.pictures
        prompts = self.drawing.prompts if prompts is None else prompts
        if not prompts:
            raise OptionError(
                "The pipeline was given embeddings, and a composition by words needs the prompt. Way out: box=."
            )
        found = [
            [
                attention.tokens(self.pipe, prompt, words, length, own) if use.found_by_words else []
                for use, words in zip(self.uses, called, strict=True)
            ]
            for prompt, own in zip(prompts, ids, strict=True)
        ]
        pieces = torch.zeros(len(prompts), length, self.count, max(len(each) for row in found for each in row))
        for row, prompt in enumerate(found):
            for i, tokens in enumerate(prompt):
                pieces[row, tokens, i, range(len(tokens))] = 1
        return pieces.to(self.latents.device)

    def columns(self) -> Tensor:
        """Return the mean of the tokens of each LoRA's words, ``(pictures, tokens, N)``, by which attention is weighed."""
        pieces = self.pieces([use.required() if use.found_by_words else "" for use in self.uses]).sum(-1)
        return pieces / pieces.sum(1, keepdim=True).clamp_min(1)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what was made at the first call of this drawing by that name."""
        memory = self.drawing.memory
        if name not in memory:
            memory[name] = make()
        return memory[name]

    def remember(self, name: str, value: Tensor, inertia: float = 0.0) -> Tensor:
        """Mix a value with that of earlier steps of this drawing, which keeps the share ``inertia``."""
        before = self.drawing.memory.get(name)
        mixed: Tensor = value if before is None else inertia * before + (1 - inertia) * value
        self.drawing.memory[name] = mixed
        return mixed
