"""The description of a node, from which both of ComfyUI's node APIs are served (`schema`, `mappings`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

LORAS = "LORAMERGE_LORAS"
"""ComfyUI's name of the type of a stack: a tuple of `Weighted` LoRAs."""

Choices = Callable[[], Sequence[str]]


@dataclass(frozen=True)
class Input:
    """An input of a node: a link, or a widget."""

    name: str
    kind: str
    """ComfyUI's name of its type; ``COMBO`` for one of `choices`."""
    tooltip: str
    optional: bool = False
    choices: Choices | None = None
    """Returns what can be chosen now: files come and go."""
    options: dict[str, Any] = field(default_factory=dict)
    """ComfyUI's own options of a widget, which both APIs call by the same names: default, min, max, step, multiline."""


@dataclass(frozen=True)
class Output:
    """An output of a node."""

    name: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node: a function, and what its inputs and outputs are in ComfyUI."""

    id: str
    """Its name in workflows, which must never change."""
    title: str
    run: Callable[..., tuple[Any, ...]]
    """Takes the inputs by name and returns the outputs; an optional input that isn't connected is left out."""
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    is_end: bool = False
    """True if it runs even if no other node takes its outputs; ComfyUI then shows the first of them, a text."""
    state: Callable[..., str] | None = None
    """Takes the inputs and returns a text that changes when the files that they name do, so that the node runs again."""

    @property
    def description(self) -> str:
        """The docstring of its function, as one paragraph."""
        return " ".join((self.run.__doc__ or "").split())
