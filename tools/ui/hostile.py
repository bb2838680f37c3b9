"""Fifty files that no page should take."""

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

NAMES = (
    "../up.safetensors",
    "../../../../etc/cron.d/x.safetensors",
    "..\\..\\up.safetensors",
    "/etc/passwd",
    "<script>alert(1)</script>.safetensors",
    "<img src=x onerror=alert(1)>.safetensors",
    '"><svg onload=alert(1)>.safetensors',
    "${jndi:x}.safetensors",
    "$(touch x).safetensors",
    "`touch x`.safetensors",
    "a b;rm -rf x.safetensors",
    "-rf.safetensors",
    "~root.safetensors",
    "naïve — 日本語 🎨.safetensors",
    "\u202egnp.safetensors",
    "n" * 200 + ".safetensors",
    "con.safetensors",
    "CON",
    "%2e%2e%2fup.safetensors",
    "[x](javascript:alert(1)).safetensors",
)
"""Names that might be taken for something else; the files have no LoRA in them."""


def uploads(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield a name and the bytes of each file; a LoRA in the folder is the model of the broken ones."""
    good = (folder / "person.safetensors").read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + length])
    key = next(name for name in header if name.endswith("lora_down.weight"))  # float16
    begin, end = header[key]["data_offsets"]
    for name in NAMES:
        yield name, b"not a LoRA"
    for cut in (1, 7, 8, 9, 100, 8 + length, 8 + length + 50, len(good) - 1):
        yield f"cut-to-{cut}.safetensors", good[:cut]
    for number in (0, 1, 2**31, 2**63 - 1, 2**64 - 1):
        yield f"header-of-{number}.safetensors", struct.pack("<Q", number) + good[8:]
    yield "longer.safetensors", good + b"\0" * 100
    yield "no-json.safetensors", good[:8] + b"\xff" * length + good[8 + length :]
    yield "nan.safetensors", _filled(good, 8 + length + begin, end - begin, b"\x00\x7e")
    yield "infinite.safetensors", _filled(good, 8 + length + begin, end - begin, b"\x00\x7c")
    yield "pickle.pt", pickle.dumps({"a": 1})
    yield "pickle.safetensors", b"cposix\nsystem\n(S'touch /tmp/taken'\ntR."
    yield "torch.ckpt", _zipped({"archive/data.pkl": b"cposix\nsystem\n(S'touch /tmp/taken'\ntR."})
    yield "archive.safetensors", _zipped({"../../up": b"x"})
    yield "picture.png", b"\x89PNG\r\n\x1a\n" + b"\0" * 100
    yield "recipe.toml", b'method = "os:system"\n[[loras]]\npath = "/etc/passwd"\n'
    yield "noise.safetensors", random.Random(0).randbytes(10_000)
    yield "checkpoint.safetensors", _safetensors({"model.diffusion_model.input_blocks.0.0.weight": [4, 4]})
    yield "embedding.safetensors", _safetensors({"emb_params": [2, 768]})
    yield (
        "half-a-layer.safetensors",
        _safetensors({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": [4, 1280]}),
    )
    yield (
        "wrong-shapes.safetensors",
        _safetensors(
            {f"lora_unet_mid_block_attentions_0_proj_in.lora_{side}.weight": [4, 5] for side in ("down", "up")}
        ),
    )
    yield (
        "two-dialects.safetensors",
        _safetensors({"lora_unet_x.lora_down.weight": [4, 5], "transformer.y.lora_A.weight": [4, 5], "<script>": [1]}),
    )
    yield "nested.safetensors", _headed(b'{"a":' * 20_000)
    yield "nothing.safetensors", _headed(b"{}")


def _filled(data: bytes, start: int, length: int, value: bytes) -> bytes:
    return data[:start] + value * (length // len(value)) + data[start + length :]


def _headed(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def _safetensors(shapes: dict[str, list[int]]) -> bytes:
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4
        for dimension in shape:
            size *= dimension
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    return _headed(json.dumps(header).encode()) + b"\0" * offset


def _zipped(members: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()
