"""Write the example workflows: as JSON, and as pictures of ComfyUI's canvas that ComfyUI opens as the workflow.

    python tools/comfyui/workflows.py CHECKOUT [--python PYTHON] [--chromium /usr/bin/chromium]

Run it when `examples` or the nodes change.  A server gives the nodes' inputs and outputs, and its own page, in Chromium, opens
each workflow: what the page makes of it for the server must be the workflow of `examples`.
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from examples import EXAMPLES, RUN, Workflow, samples
from PIL import Image, PngImagePlugin
from playwright.sync_api import Page, sync_playwright
from server import PACK, Server, server

OUT = PACK / "example_workflows"
DOCS = Path(__file__).parents[2] / "docs/how-to/comfyui.png"
COLUMN = 400
"""Width of a column of nodes, with the gap after it."""
LINKED = {"MODEL", "CLIP", "VAE", "CONDITIONING", "LATENT", "IMAGE", "LORAMERGE_LORAS", "*"}
SETTINGS = {
    "Comfy.TutorialCompleted": True, "Comfy.UseNewMenu": "Disabled", "Comfy.Graph.CanvasInfo": False, "Comfy.Graph.CanvasMenu": False,
    "Comfy.Minimap.Visible": False,
}  # fmt: skip
OPEN = """async workflow => { await app.loadGraphData(workflow); }"""
LAY_OUT = """places => {
    const columns = {};
    for (const node of app.graph._nodes) {
        const [column, row, wide] = places[node.id];
        const least = {PreviewImage: 500, PreviewAny: 340, LoramergeRecipe: 340}[node.type] ?? 0;
        node.setSize([COLUMN * (wide ?? 1) - 60, Math.max(node.computeSize()[1], least)]);
        (columns[column] ??= []).push([row, node]);
    }
    for (const [column, held] of Object.entries(columns)) {
        let top = 0;
        for (const [row, node] of held.sort((a, b) => a[0] - b[0])) { node.pos = [column * COLUMN, top]; top += node.size[1] + 70; }
    }
    const nodes = app.graph._nodes;
    app.canvas.ds.scale = 1; app.canvas.ds.offset = [30, 60]; app.canvas.setDirty(true, true);
    return [Math.max(...nodes.map(n => n.pos[0] + n.size[0])) + 60, Math.max(...nodes.map(n => n.pos[1] + n.size[1])) + 90];
}""".replace("COLUMN", str(COLUMN))


def drawn(prompt: Workflow, known: dict[str, Any]) -> dict[str, Any]:
    """Return a workflow as ComfyUI's page saves it.

    Args:
        prompt: The workflow in the API's format.
        known: What the server says of every kind of node.
    """
    links: list[list[Any]] = []
    nodes = {}
    for order, (key, node) in enumerate(prompt.items()):
        info = known[node["class_type"]]
        slots, values = [], []
        for name, spec in {**info["input"].get("required", {}), **info["input"].get("optional", {})}.items():
            kind = "COMBO" if isinstance(spec[0], list) else spec[0]
            given = node["inputs"].get(name)
            if kind not in LINKED:
                values.append(given)
                values += ["fixed"] if spec[1:] and spec[1].get("control_after_generate") else []
                continue
            slots.append({"name": name, "type": kind, "link": None})
            if given is not None:
                origin, slot = given
                output = known[prompt[origin]["class_type"]]["output"][slot]
                links.append([len(links) + 1, int(origin), slot, int(key), len(slots) - 1, output])
                slots[-1]["link"] = len(links)
        outputs = [
            {"name": n, "type": t, "links": []} for n, t in zip(info["output_name"], info["output"], strict=True)
        ]
        nodes[int(key)] = {
            "id": int(key), "type": node["class_type"], "pos": [0, 0], "size": [COLUMN - 60, 100], "flags": {},
            "order": order, "mode": 0, "inputs": slots, "outputs": outputs, "properties": {"Node name for S&R": node["class_type"]},
            "widgets_values": values,
        }  # fmt: skip
    for link in links:
        nodes[link[1]]["outputs"][link[2]]["links"].append(link[0])
    return {
        "last_node_id": len(nodes), "last_link_id": len(links), "nodes": list(nodes.values()), "links": links, "groups": [],
        "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


def plain(prompt: dict[str, Any]) -> Workflow:
    """Return a prompt that the page made without what is for people: titles."""
    return {key: {"class_type": n["class_type"], "inputs": n["inputs"]} for key, n in prompt.items()}


def write(found: Server, page: Page, name: str) -> None:
    """Write one workflow; stop if the page understands it differently."""
    make, places = EXAMPLES[name]
    prompt = make()
    page.evaluate(OPEN, drawn(prompt, found.ask("/object_info")))
    made = plain(page.evaluate("async () => (await app.graphToPrompt()).output"))
    if made != prompt:
        differ = [key for key in prompt if made.get(key) != prompt[key]]
        raise SystemExit(f"{name}: the page makes {[made.get(k) for k in differ]} of {[prompt[k] for k in differ]}.")
    if name in RUN:
        page.evaluate("app.queuePrompt(0)")
        page.wait_for_timeout(1000)
        while found.ask("/queue")["queue_running"]:
            page.wait_for_timeout(500)
        page.wait_for_timeout(3000)
    width, height = page.evaluate(LAY_OUT, places)
    page.set_viewport_size({"width": int(width), "height": int(height)})
    page.evaluate(LAY_OUT, places)
    page.wait_for_timeout(1500)
    workflow = page.evaluate("app.graph.serialize()")
    (OUT / f"{name}.json").write_text(json.dumps(workflow, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    picture = OUT / f"{name}.png"
    page.screenshot(path=picture)
    told = PngImagePlugin.PngInfo()
    told.add_text("workflow", json.dumps(workflow))
    told.add_text("prompt", json.dumps(prompt))
    with Image.open(picture) as shown:
        small = shown.convert("P", palette=Image.Palette.ADAPTIVE, colors=128)
    small.save(picture, pnginfo=told, optimize=True)


def main() -> None:
    """Write all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    given = parser.parse_args()
    with (
        TemporaryDirectory() as folder,
        server(given.checkout, given.python, Path(folder)) as found,
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=given.chromium, args=["--no-sandbox"]) as browser,
    ):
        samples(Path(folder), "sdxl")
        (Path(folder) / "models/checkpoints/sd15.safetensors").touch()
        (Path(folder) / "user/default").mkdir()
        (Path(folder) / "user/default/comfy.settings.json").write_text(json.dumps(SETTINGS))
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(300_000)
        page.goto(found.url)
        page.wait_for_function("!!window.LiteGraph?.registered_node_types?.LoramergeFile")
        page.wait_for_timeout(3000)
        page.add_style_tag(content=".comfy-menu, .p-toast, .bottom-panel {visibility: hidden}")
        for name in EXAMPLES:
            write(found, page, name)
    DOCS.write_bytes((OUT / "look.png").read_bytes())


if __name__ == "__main__":
    main()
