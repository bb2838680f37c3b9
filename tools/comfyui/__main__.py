"""Run the pack of nodes in the real ComfyUI, and compare what they patch with what ComfyUI's own loader does.

    python tools/comfyui CHECKOUT [--python PYTHON] [--families sd15 …] [--examples] [--older]

CHECKOUT is a clone of ComfyUI; PYTHON that of an environment with its requirements and loramerge.  A server is started on
the CPU, at loopback, in a temporary folder.  A model of each family is made of ComfyUI's own classes, with small
widths and random weights in float32, and LoRAs for it.  Printed is the worst relative difference of a patched
weight, ‖A − B‖ / ‖B‖, over all weights that a LoRA changes; more than 1e-6, or a weight that only one changes, is an error.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from examples import EXAMPLES, Workflow, samples
from server import Server, server

FAMILIES = (
    "sd15",
    "sdxl",
    "flux",
    "qwen-image",
    "wan-1.3b",
    "chroma",
    "lumina2",
    "hunyuanvideo",
    "flux2-klein-4b",
    "z-image",
)
KINDS = ("lora", "loha", "lokr", "dora")
MOST = 1e-6


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """Return a node in the API's format; an input from another node is a list of its number and its output's."""
    return {"class_type": kind, "inputs": inputs}


def file(name: str, weight: float = 1.0, **more: Any) -> dict[str, Any]:
    return node("LoramergeFile", file=f"{name}.safetensors", weight=weight, blocks="", **more)


def apply(loras: str, clip: bool) -> dict[str, Any]:
    inputs = {"model": ["model", 0], "loras": [loras, 0], "strength_model": 1.0, "strength_clip": 1.0}
    return node("LoramergeApply", **inputs, **({"clip": ["model", 1]} if clip else {}))


def loader(name: str, weight: float, clip: bool, after: str = "model") -> dict[str, Any]:
    inputs = {"model": [after, 0], "lora_name": f"{name}.safetensors", "strength_model": weight}
    if not clip:
        return node("LoraLoaderModelOnly", **inputs)
    return node("LoraLoader", **inputs, clip=[after, 1], strength_clip=weight)


def difference(a: str, b: str, clip: bool) -> dict[str, Any]:
    clips = {"clip": [a, 1], "other_clip": [b, 1]} if clip else {}
    return node("MeasureDifference", model=[a, 0], other=[b, 0], **clips)


def save(loras: str, name: str) -> dict[str, Any]:
    return node("LoramergeSave", loras=[loras, 0], name=name, dialect="comfyui", dtype="as it is", overwrite=True)


def merge(loras: str) -> dict[str, Any]:
    inputs = {"strength": "as given", "method": "linear", "options": "", "fit": "exact", "limit": ""}
    return node("LoramergeMerge", loras=[loras, 0], **inputs)


def measured(found: Server, family: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the kind, what was compared, and the figures."""
    clip = family in ("sd15", "sdxl", "flux")
    model = {"model": node("MeasureModel", family=family)}
    notes = json.loads(found.run({"files": node("MeasureFiles", family=family)})["files"]["text"][0])["notes"]
    for kind in KINDS:
        read = {**model, "file": file(f"{family}-{kind}-kohya"), "ours": apply("file", clip)}
        found.run({"file": read["file"], "save": save("file", f"{family}-{kind}-saved")})
        for what, name in (("saved", f"{family}-{kind}-saved"), ("kohya", f"{family}-{kind}-kohya")):
            if what == "kohya" and notes[f"{name}.safetensors"]:
                continue
            shown = found.run({**read, "theirs": loader(name, 1.0, clip), "out": difference("ours", "theirs", clip)})
            yield kind, what, json.loads(shown["out"]["text"][0])
    names = [f"{family}-{kind}-comfyui" for kind in ("lora", "second")]
    stack = {"a": file(names[0], 0.7), "b": file(names[1], 0.5, loras=["a", 0]), "merge": merge("b")}
    found.run({**stack, "save": save("merge", f"{family}-merged")})
    whole = {**model, **stack, "ours": apply("merge", clip)}
    merged = {**whole, "theirs": loader(f"{family}-merged", 1.0, clip), "out": difference("ours", "theirs", clip)}
    yield "merge", "saved", json.loads(found.run(merged)["out"]["text"][0])
    two = {"first": loader(names[0], 0.7, clip), "second": loader(names[1], 0.5, clip, "first")}
    shown = found.run({**whole, **two, "out": difference("ours", "second", clip)})
    yield "merge", "one by one", json.loads(shown["out"]["text"][0])


def drawn_small(prompt: Workflow) -> Workflow:
    """Return a workflow that draws a picture of 64 pixels in two steps."""
    small = {"EmptyLatentImage": {"width": 64, "height": 64}, "KSampler": {"steps": 2}}
    return {
        key: {**node, "inputs": {**node["inputs"], **small.get(node["class_type"], {})}} for key, node in prompt.items()
    }


def examples(found: Server) -> None:
    """Run every example workflow, and print what its last nodes show."""
    samples(found.folder, "sd15")
    found.run({"checkpoint": node("MeasureCheckpoint", name="sd15.safetensors")})
    for name, (make, _) in EXAMPLES.items():
        shown = found.run(drawn_small(make()))
        for key, outputs in sorted(shown.items(), key=lambda item: int(item[0])):
            what = [str(each)[:60].splitlines()[0] for each in outputs.get("text", outputs.get("images", []))]
            print(f"{name} {key} {make()[key]['class_type']}: {what}", flush=True)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument("--older", action="store_true", help="serve the nodes by the older API")
    parser.add_argument("--examples", action="store_true", help="run the example workflows instead")
    given = parser.parse_args()
    failed = False
    if not given.examples:
        print("| family | kind | against | weights | worst |\n|---|---|---|---|---|")
    with TemporaryDirectory() as folder, server(given.checkout, given.python, Path(folder), given.older) as found:
        if given.examples:
            examples(found)
            return
        for family in given.families:
            for kind, what, row in measured(found, family):
                wrong = bool(row["missed"]) or not row["worst"] <= MOST or not row["weights"]
                failed |= wrong
                figures = f"{row['weights']} | {row['worst']:.1e}"
                print(
                    f"| {family} | {kind} | {what} | {figures} |{' WRONG ' * wrong}{row['missed'][:3] or ''}",
                    flush=True,
                )
    sys.exit(failed)


if __name__ == "__main__":
    main()
