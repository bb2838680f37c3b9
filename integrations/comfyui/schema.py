"""The nodes in ComfyUI's V3 schema: classes of `io.ComfyNode`, and the extension that lists them."""

from typing import Any

from comfy_api.latest import ComfyExtension, io

from .node import Input, Node, Output
from .nodes import NODES

TYPES = {
    "BOOLEAN": io.Boolean,
    "CLIP": io.Clip,
    "COMBO": io.Combo,
    "FLOAT": io.Float,
    "IMAGE": io.Image,
    "MODEL": io.Model,
    "STRING": io.String,
}
"""ComfyUI's types by name; any other name is a type of this pack."""


def _type(given: Input | Output) -> Any:
    return TYPES.get(given.kind) or io.Custom(given.kind)


def _input(given: Input) -> Any:
    choices = {"options": list(given.choices())} if given.choices else {}
    return _type(given).Input(given.name, tooltip=given.tooltip, optional=given.optional, **choices, **given.options)


def _class(node: Node) -> type[io.ComfyNode]:
    def define(cls: type) -> io.Schema:
        return io.Schema(
            node_id=node.id,
            display_name=node.title,
            category="loramerge",
            description=node.description,
            inputs=[_input(given) for given in node.inputs],
            outputs=[_type(given).Output(display_name=given.name) for given in node.outputs],
            is_output_node=node.is_end,
        )

    def run(cls: type, **given: Any) -> io.NodeOutput:
        result = node.run(**given)
        return io.NodeOutput(*result, ui={"text": (result[0],)} if node.is_end else None)

    members: dict[str, Any] = {"define_schema": classmethod(define), "execute": classmethod(run)}
    if node.state:
        state = node.state
        members["fingerprint_inputs"] = classmethod(lambda cls, **given: state(**given))
    return type(node.id, (io.ComfyNode,), members)


class LoramergeExtension(ComfyExtension):
    """The list of the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return a class for every node."""
        return [_class(node) for node in NODES]


async def comfy_entrypoint() -> ComfyExtension:
    """Return the extension, for ComfyUI."""
    return LoramergeExtension()
