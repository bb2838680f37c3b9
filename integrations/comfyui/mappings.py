"""The nodes in ComfyUI's older API: classes with attributes that it knows by name, in two mappings."""

from typing import Any

from .node import Input, Node
from .nodes import NODES


def _spelled(given: Input) -> tuple[Any, dict[str, Any]]:
    kind = list(given.choices()) if given.choices else given.kind
    return kind, {"tooltip": given.tooltip, **given.options}


def _class(node: Node) -> type:
    def inputs(cls: type) -> dict[str, dict[str, Any]]:
        return {
            "required": {i.name: _spelled(i) for i in node.inputs if not i.optional},
            "optional": {i.name: _spelled(i) for i in node.inputs if i.optional},
        }

    def run(self: object, **given: Any) -> Any:
        result = node.run(**given)
        return {"ui": {"text": (result[0],)}, "result": result} if node.is_end else result

    members: dict[str, Any] = {
        "INPUT_TYPES": classmethod(inputs),
        "RETURN_TYPES": tuple(output.kind for output in node.outputs),
        "RETURN_NAMES": tuple(output.name for output in node.outputs),
        "FUNCTION": "run",
        "CATEGORY": "loramerge",
        "DESCRIPTION": node.description,
        "OUTPUT_NODE": node.is_end,
        "run": run,
    }
    if node.state:
        state = node.state
        members["IS_CHANGED"] = classmethod(lambda cls, **given: state(**given))
    return type(node.id, (), members)


NODE_CLASS_MAPPINGS = {node.id: _class(node) for node in NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node.id: node.title for node in NODES}
