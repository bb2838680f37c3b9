"""ComfyUI's V3 schema, as far as the nodes use it, with the parameters that its classes have."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

OPTIONS: dict[str, set[str]] = {
    "BOOLEAN": {"default", "label_on", "label_off"},
    "COMBO": {"default", "options"},
    "FLOAT": {"default", "min", "max", "step", "round"},
    "STRING": {"default", "multiline", "placeholder"},
}
"""Options that the inputs of each type take, besides those of all."""


@dataclass
class Input:
    io_type: str
    id: str
    tooltip: str
    optional: bool
    options: dict[str, Any]

    def __post_init__(self) -> None:
        assert self.options.keys() <= OPTIONS.get(self.io_type, set())

    def spelled(self) -> tuple[Any, dict[str, Any]]:
        """The input as the older API has it."""
        options = {"tooltip": self.tooltip, **self.options}
        return (options.pop("options") if self.io_type == "COMBO" else self.io_type), options


@dataclass
class Output:
    io_type: str
    display_name: str


def custom(kind: str) -> Any:
    def given(name: str, *, tooltip: str, optional: bool, **options: Any) -> Input:
        return Input(kind, name, tooltip, optional, options)

    return SimpleNamespace(Input=given, Output=lambda display_name: Output(kind, display_name))


@dataclass(kw_only=True)
class Schema:
    node_id: str
    display_name: str
    category: str
    description: str
    inputs: list[Input]
    outputs: list[Output]
    is_output_node: bool


@dataclass(init=False)
class NodeOutput:
    args: tuple[Any, ...]
    ui: dict[str, Any] | None = field(default=None)

    def __init__(self, *args: Any, ui: dict[str, Any] | None = None) -> None:
        self.args, self.ui = args, ui


class ComfyNode:
    """The base of every node."""


class ComfyExtension:
    """The base of an extension."""


io = SimpleNamespace(
    Boolean=custom("BOOLEAN"),
    Clip=custom("CLIP"),
    Combo=custom("COMBO"),
    Float=custom("FLOAT"),
    Image=custom("IMAGE"),
    Model=custom("MODEL"),
    String=custom("STRING"),
    Custom=custom,
    Schema=Schema,
    NodeOutput=NodeOutput,
    ComfyNode=ComfyNode,
)
