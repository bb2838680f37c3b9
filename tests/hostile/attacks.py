"""Hostile and broken files, made on the spot: each is a function that writes one into a folder.

The ordinary tests see that each is refused by a clear error, or read right; `tools/attacks.py` measures the
time and memory that this takes, of the large ones too.
"""

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

STEM = "lora_unet_input_blocks_4_1_proj_in"
MARK = "exploded"
"""What a pickle's code would make in the working directory."""


@dataclass(frozen=True)
class Attack:
    """Something to be opened."""

    make: Callable[[Path], Path]
    """Writes it into a folder."""
    refused: str | None = None
    """What the message says; None where it is to be read, all of it."""
    allow_pickle: bool = False
    large: bool = False
    """Whether it takes too much time or space for the ordinary tests."""
    recipe: bool = False
    """Whether it is a recipe, to be read as one."""


class Bomb:
    """A pickle that runs code when it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (MARK,)


def lora(dtype: Any = np.float32, value: float = 1.0, rank: int = 2) -> dict[str, np.ndarray]:
    """The tensors of one layer."""
    shapes = {"down": (rank, 640), "up": (640, rank)}
    return {f"{STEM}.lora_{role}.weight": np.full(shape, value).astype(dtype) for role, shape in shapes.items()}


def raw(head: bytes, body: bytes = b"") -> bytes:
    """A file of a header and what follows it."""
    return struct.pack("<Q", len(head)) + head + body


def entry(**changes: object) -> bytes:
    """A file of one tensor whose entry in the header is changed."""
    fields = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    return raw(json.dumps({"x.lora_up.weight": fields}).encode(), bytes(8))


def entries(names: list[str], metadata: object = None) -> bytes:
    """A file of layers of rank 1 under some stems, and metadata."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name in names:
        for role, shape in (("down", [1, 2]), ("up", [2, 1])):
            header[f"{name}.lora_{role}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + 8]}
            at += 8
    return raw(json.dumps(header).encode(), struct.pack("<f", 1.0) * (at // 4))


def valid(metadata: dict[str, str] | None = None, **changes: Any) -> bytes:
    """A whole file."""
    return safetensors.numpy.save({**lora(), **changes}, metadata=metadata)


def alpha(value: float, dtype: Any = np.float64) -> bytes:
    """A file with an alpha."""
    return valid(**{f"{STEM}.alpha": np.array(value).astype(dtype)})


def written(data: bytes | Callable[[], bytes], name: str = "x.safetensors") -> Callable[[Path], Path]:
    """An attack that is one file."""

    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(data if isinstance(data, bytes) else data())
        return path

    return make


def adapter(config: bytes = b'{"r": 2, "lora_alpha": 2}', **files: bytes) -> Callable[[Path], Path]:
    """An attack that is PEFT's directory."""

    def make(folder: Path) -> Path:
        path = folder / "adapter"
        path.mkdir()
        name = "base_model.model.down_blocks.1.attentions.0.proj_in"
        tensors = {f"{name}.lora_A.weight": np.ones((2, 640), np.float32)}
        tensors |= {f"{name}.lora_B.weight": np.ones((640, 2), np.float32)}
        (path / "adapter_model.safetensors").write_bytes(safetensors.numpy.save(tensors))
        (path / "adapter_config.json").write_bytes(config)
        for file, data in files.items():
            (path / file.replace("_bin", ".bin")).write_bytes(data)
        return path

    return make


def linked(name: str, target: str) -> Callable[[Path], Path]:
    """PEFT's directory with one of its files a link."""

    def make(folder: Path) -> Path:
        path = adapter()(folder)
        (path / name).unlink()
        (path / name).symlink_to(target)
        return path

    return make


def pipe(name: str) -> Callable[[Path], Path]:
    """PEFT's directory with one of its files a pipe that nobody writes to."""

    def make(folder: Path) -> Path:
        path = adapter()(folder)
        (path / name).unlink()
        os.mkfifo(path / name)
        return path

    return make


def pickled(tensors: Any, **options: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer, **options)
    return buffer.getvalue()


def torches(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], bytes]:
    """A pickle of a layer whose tensors are changed."""
    return lambda: pickled({key: change(torch.from_numpy(value)) for key, value in lora().items()})


def packed(size: int) -> bytes:
    """torch's zip, its records compressed: a few kilobytes that unpack to many."""
    stored = zipfile.ZipFile(io.BytesIO(pickled({"a": torch.zeros(size, dtype=torch.uint8)})))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name in stored.namelist():
            file.writestr(name, stored.read(name))
    return buffer.getvalue()


def itself() -> dict[str, Any]:
    """A dictionary that holds itself."""
    found: dict[str, Any] = {}
    found["state_dict"] = found
    return found


HEADERS = {
    "empty": Attack(written(b""), "wanted at least 8"),
    "header bomb": Attack(written(struct.pack("<Q", 100_000_001) + b"{}"), "hostile"),
    "header of 2^64 bytes": Attack(written(b"\xff" * 8 + b"{}"), "hostile"),
    "header past the end": Attack(written(struct.pack("<Q", 10_000) + b"{}"), "truncated"),
    "not JSON": Attack(written(raw(b"nonsense")), "not JSON"),
    "not an object": Attack(written(raw(b"[1, 2]")), "not a JSON object"),
    "not UTF-8": Attack(written(raw(b'{"\xff": 1}')), "not JSON"),
    "half a surrogate": Attack(written(entries(["\ud800"])), "not JSON"),
    "half a surrogate in metadata": Attack(written(entries(["a"], {"b": "\udfff"})), "not JSON"),
    "deep JSON": Attack(written(raw(b"[" * 200_000)), "not JSON"),
    "key twice": Attack(
        written(raw(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},' * 2 + b'"b":1}')), "not JSON"
    ),
    "name twice": Attack(written(raw(b'{"__metadata__":{"a":"1","a":"2"}}')), "stands twice"),
    "metadata of numbers": Attack(written(raw(b'{"__metadata__":{"a":1}}')), "strings to strings"),
    "a million keys": Attack(
        written(
            lambda: raw(
                b"{"
                + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(10**6))
                + b"}"
            )
        ),
        "quotation marks: 100000 tensors",
        large=True,
    ),
    "three million entries of metadata": Attack(
        written(lambda: raw(json.dumps({"__metadata__": {str(i): "" for i in range(3 * 10**6)}}).encode())),
        "entries of metadata",
        large=True,
    ),
    "metadata of 50 MB": Attack(written(lambda: valid({"a": "x" * 50_000_000})), large=True),
    "metadata of 50 MB, quoted": Attack(written(lambda: valid({"a": '"\n' * 12_500_000})), large=True),
    "metadata of 50 MB with an emoji": Attack(
        written(lambda: valid({"a": "x" * 50_000_000 + "\U0001f600"})), "not all of them ASCII", large=True
    ),
    "metadata of 100 MB": Attack(written(lambda: valid({"a": "x" * 99_000_000})), large=True),
    "lists of 90 MB": Attack(written(lambda: raw(b'{"a":[' + b"[]," * 30_000_000 + b"[]]}")), "outside", large=True),
    "an axis for every byte": Attack(
        written(lambda: raw(b'{"a":{"dtype":"F32","data_offsets":[0,4],"shape":[' + b"1," * 10**7 + b"1]}}")),
        "outside",
        large=True,
    ),
    "a string without an end": Attack(written(lambda: raw(b'{"' + b'\\"' * 10**7)), "not JSON", large=True),
}

ENTRIES = {
    "unknown dtype": Attack(written(entry(dtype="F7")), "does not know"),
    "complex dtype": Attack(written(entry(dtype="C64", shape=[1])), "does not know"),
    "negative size": Attack(written(entry(shape=[-2])), "malformed"),
    "size as text": Attack(written(entry(shape=["2"])), "malformed"),
    "dtype as list": Attack(written(entry(dtype=["F32"])), "malformed"),
    "size as bool": Attack(written(entry(shape=[True, 2])), "malformed"),
    "offsets reversed": Attack(written(entry(data_offsets=[8, 0])), "wanted 8"),
    "offsets too few": Attack(written(entry(data_offsets=[0])), "malformed"),
    "offset past the end": Attack(written(entry(shape=[4], data_offsets=[0, 16])), "truncated"),
    "gap before": Attack(written(entry(shape=[1], data_offsets=[4, 8])), "begins at byte 4"),
    "overlap": Attack(
        written(
            raw(
                b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
                bytes(12),
            )
        ),
        "begins at byte 4",
    ),
    "the same bytes twice": Attack(
        written(
            raw(
                b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
                bytes(8),
            )
        ),
        "begins at byte 0",
    ),
    "bytes of nobody": Attack(written(entry(shape=[1], data_offsets=[0, 4])), "no tensor owns"),
    "overflowing shape": Attack(written(entry(shape=[2**62, 2**62])), "wanted"),
    "overflowing shape of nothing": Attack(
        written(raw(b'{"a":{"dtype":"F32","shape":[4611686018427387904,4,0],"data_offsets":[0,0]}}')), "no array"
    ),
    "65 axes": Attack(written(entry(shape=[2] + [1] * 64)), "malformed"),
    "sizes of many digits": Attack(written(entry(shape=[2**62] * 64)), "wanted"),
    "strange field": Attack(written(entry(more=1)), "malformed"),
}

VALUES = {
    **{
        f"{value} in {dtype}": Attack(
            written(
                raw(
                    json.dumps(
                        {
                            f"{STEM}.lora_down.weight": {
                                "dtype": code,
                                "shape": [1, 640],
                                "data_offsets": [0, 640 * size],
                            },
                            f"{STEM}.lora_up.weight": {
                                "dtype": code,
                                "shape": [640, 1],
                                "data_offsets": [640 * size, 1280 * size],
                            },
                        }
                    ).encode(),
                    bits * 1280,
                )
            ),
            "NaN or infinite",
        )
        for dtype, code, size, value, bits in (
            ("float32", "F32", 4, "NaN", b"\0\0\xc0\x7f"),
            ("float32", "F32", 4, "-inf", b"\0\0\x80\xff"),
            ("float16", "F16", 2, "NaN", b"\1\x7c"),
            ("float16", "F16", 2, "inf", b"\0\x7c"),
            ("bfloat16", "BF16", 2, "NaN", b"\xc0\x7f"),
            ("bfloat16", "BF16", 2, "-inf", b"\x80\xff"),
            ("fp8 e4m3", "F8_E4M3", 1, "NaN", b"\x7f"),
            ("fp8 e5m2", "F8_E5M2", 1, "inf", b"\x7c"),
        )
    },
    "NaN as alpha": Attack(written(alpha(np.nan)), "alpha is nan"),
    "alpha beyond float32": Attack(written(alpha(1e300)), r"alpha is 1e\+300"),
    "negative alpha": Attack(written(alpha(-2.0))),
    "alpha 0": Attack(written(alpha(0.0))),
    "subnormal alpha": Attack(written(alpha(1e-310)), "outside of the range of float32"),
    "subnormal values": Attack(written(safetensors.numpy.save(lora(value=1e-42)))),
    "subnormal half values": Attack(written(safetensors.numpy.save(lora(np.float16, 6e-8)))),
    "alpha as int8": Attack(written(alpha(2, np.int8))),
    "factors as int8": Attack(written(safetensors.numpy.save(lora(np.int8))), "quantised"),
    "factors as bool": Attack(written(safetensors.numpy.save(lora(np.bool_))), "quantised"),
    "factors as int64": Attack(written(safetensors.numpy.save(lora(np.int64))), "quantised"),
    "rank 0": Attack(written(safetensors.numpy.save(lora(rank=0))), "rank or size 0"),
    "rank 50,000 of a small module": Attack(
        written(lambda: safetensors.numpy.save(lora(rank=50_000))), "are exchanged", large=True
    ),
}

NAMES = {
    f"a module called {name!r}": Attack(written(entries([name])))
    for name in (
        "../../evil",
        "/etc/passwd",
        "a\0b",
        "C:\\x",
        "a/../b",
        "..",
        " ",
        "\x1b[2J",
        "é",
        "unet..",
        "x" * 5000,
    )
}

PATHS = {
    f"a file called {name[:20]!r}": Attack(written(lambda: safetensors.numpy.save(lora()), name))
    for name in (
        os.fsdecode(b"a\xff.safetensors"),
        "~.safetensors",
        "~root.safetensors",
        f"{'é' * 121}x.safetensors",
        "a\nb.safetensors",
        "$x_{.safetensors",
    )
}

LINKS = {
    "a directory as the adapter": Attack(
        lambda folder: linked("adapter_model.safetensors", str(folder))(folder), "directory, a pipe or a device"
    ),
    "a pipe as the adapter": Attack(pipe("adapter_model.safetensors"), "directory, a pipe or a device"),
    "a pipe as a pickle": Attack(
        lambda folder: os.mkfifo(folder / "lora.pt") or folder / "lora.pt", "a pipe or a device", allow_pickle=True
    ),
    "a pipe as the configuration": Attack(pipe("adapter_config.json"), "directory, a pipe or a device"),
    "a link to itself": Attack(linked("adapter_config.json", "adapter_config.json"), "symbolic links"),
    "a link to another file": Attack(linked("adapter_model.safetensors", "/etc/hostname"), "safetensors file"),
    "a device as the adapter": Attack(
        linked("adapter_model.safetensors", "/dev/zero"), "directory, a pipe or a device"
    ),
    "a device as the configuration": Attack(
        linked("adapter_config.json", "/dev/zero"), "directory, a pipe or a device"
    ),
    "deep configuration in a header": Attack(
        written(valid({"lora_adapter_metadata": "[" * 200_000})), "lora_adapter_metadata .* not JSON"
    ),
    "lists in a header's configuration": Attack(
        written(lambda: valid({"lora_adapter_metadata": '{"a": [' + "[]," * 10_000_000 + "1]}"})),
        "outside of strings",
        large=True,
    ),
    "lists in a header's tags": Attack(
        written(lambda: valid({"ss_tag_frequency": '{"a": [' + "[]," * 10_000_000 + "1]}"})), large=True
    ),
    "deep configuration": Attack(adapter(b"[" * 200_000), "not JSON"),
    "configuration not in UTF-8": Attack(adapter(b'{"\xff": 1}'), "not UTF-8"),
    "endless configuration": Attack(adapter(b" " * 10_000_001), "more than 10000000 bytes"),
    "an alpha of 400 digits": Attack(adapter(b'{"lora_alpha": ' + b"9" * 400 + b"}"), "a number is not finite"),
    "an endless regular expression": Attack(
        adapter(json.dumps({"lora_alpha": 2, "alpha_pattern": {"(([a-z_.0-9])+)+!": 1}}).encode()), "too much work"
    ),
    "an exponential regular expression": Attack(
        adapter(json.dumps({"lora_alpha": 2, "alpha_pattern": {"(.|.)" * 40 + "!": 1}}).encode()), "too much work"
    ),
    "a regular expression of many repeats": Attack(
        adapter(json.dumps({"lora_alpha": 2, "alpha_pattern": {"a.*" * 12 + "!": 1}}).encode()), "too much work"
    ),
}

PICKLES = {
    **{
        f"a pickle as {name}": Attack(written(pickle.dumps({"a": Bomb()}), name), message)
        for name, message in (
            ("x.pt", "allow_pickle"),
            ("x.bin", "allow_pickle"),
            ("x.ckpt", "allow_pickle"),
            ("x.pth", "allow_pickle"),
            ("x.safetensors", "no safetensors file"),
            ("x.pkl", "no safetensors file"),
            ("x.PT", "no safetensors file"),
        )
    },
    "a pickle in a zip": Attack(written(lambda: pickled({"a": Bomb()}), "x.zip"), "no safetensors file"),
    "a pickle in a gz": Attack(written(gzip.compress(pickle.dumps(Bomb())), "x.gz"), "no safetensors file"),
    "torch's zip as safetensors": Attack(written(lambda: pickled({"a": Bomb()})), "no safetensors file"),
    "a pickle alone in a directory": Attack(
        lambda folder: written(pickle.dumps(Bomb()), "adapter_model.bin")(folder).parent, "is a pickle"
    ),
    "a pickle as the adapter": Attack(
        lambda folder: written(pickle.dumps(Bomb()), "adapter_model.safetensors")(folder).parent, "no safetensors file"
    ),
    "a pickle beside an adapter": Attack(adapter(adapter_model_bin=pickle.dumps(Bomb()))),
    "a pickle with code": Attack(written(pickle.dumps({"a": Bomb()}), "x.pt"), "tensors only", allow_pickle=True),
    "torch's zip with code": Attack(written(lambda: pickled({"a": Bomb()}), "x.pt"), "tensors only", allow_pickle=True),
    "torch's older file with code": Attack(
        written(lambda: pickled({"a": Bomb()}, _use_new_zipfile_serialization=False), "x.pt"),
        "tensors only",
        allow_pickle=True,
    ),
    "a packed zip": Attack(written(lambda: packed(10**6), "x.pt"), "compressed", allow_pickle=True),
    "a packed zip of 3 GB": Attack(
        written(lambda: packed(3 * 10**9), "x.pt"), "compressed", allow_pickle=True, large=True
    ),
    "one number said to be many": Attack(
        written(lambda: pickled({"a.lora_A.weight": torch.ones(1).expand(10**6, 10**7)}), "x.pt"),
        "number by number",
        allow_pickle=True,
    ),
    "sparse tensors": Attack(written(torches(torch.Tensor.to_sparse), "x.pt"), "number by number", allow_pickle=True),
    "complex tensors": Attack(
        written(torches(lambda t: t.to(torch.complex64)), "x.pt"), "number by number", allow_pickle=True
    ),
    "tensors without values": Attack(
        written(torches(lambda t: t.to("meta")), "x.pt"), "number by number", allow_pickle=True
    ),
    "parameters": Attack(written(torches(torch.nn.Parameter), "x.pt"), allow_pickle=True),
    "a dictionary that holds itself": Attack(
        written(lambda: pickled(itself()), "x.pt"), "holds no tensors", allow_pickle=True
    ),
    "a list": Attack(written(lambda: pickled([1]), "x.pt"), "holds a list", allow_pickle=True),
    "nothing": Attack(written(b"", "x.pt"), "tensors only", allow_pickle=True),
}


def recipe(text: str, refused: str, weight: str = "") -> Attack:
    """A recipe of one LoRA, and more."""
    lines = f'{text}\n[[loras]]\npath = "x.safetensors"\n{f"weight = {weight}" if weight else ""}\n'

    def make(folder: Path) -> Path:
        written(entries([f"lora_unet_{'input_blocks_' * 5}{i}" for i in range(2000)]))(folder)
        return written(lines.encode("utf-8", "surrogatepass"), "recipe.toml")(folder)

    return Attack(make, refused, recipe=True)


RECIPES = {
    "output above": recipe('output.path = "../x.safetensors"', "not below"),
    "output elsewhere": recipe('output.path = "/tmp/x.safetensors"', "not below"),
    "output at home": recipe('output.path = "~/x.safetensors"', "not below"),
    "output at home, by a detour": recipe('output.path = "./~/x.safetensors"', "not below"),
    "output at another's home": recipe('output.path = ".//~root/x.safetensors"', "not below"),
    "output above, by a detour": recipe('output.path = "a/../../x.safetensors"', "not below"),
    "output with a NUL": recipe('output.path = "a\\u0000.safetensors"', "NUL"),
    "input with a NUL": recipe('[[loras]]\npath = "~a\\u0000"', "NUL"),
    "a key of many parts": recipe("a" + ".a" * 30_000 + " = 1", "more than 100 parts"),
    "deep lists": recipe("a = " + "[" * 100_000, "not TOML"),
    "half a surrogate": recipe('method = "\ud800"', "not UTF-8"),
    "a number of many digits": recipe("rank = " + "9" * 100_000, "not TOML"),
    "a pattern without an end": recipe("", "too much work", '{ "*" = 1, "re:(([a-z_.0-9])+)+!" = 0.5 }'),
    "a pattern without an end, as text": recipe("", "too much work", '"1;re:(([a-z_.0-9])+)+!=0.5"'),
    "an exclusion without an end": recipe('exclude = ["re:(([a-z_.0-9])+)+!"]', "too much work"),
    "a pattern that is slow on every name": recipe('exclude = ["re:[a-z_0-9]*[a-z_0-9]*[a-z_0-9]*!"]', "too much work"),
    "many slow patterns": recipe(
        "exclude = [" + ", ".join(f'"re:[a-z_0-9]*[a-z_0-9]*{i}!"' for i in range(20_000)) + "]", "too much work"
    ),
    "a deep pattern": recipe(f'exclude = ["re:{"(" * 400}{")" * 400}("]', "is not a regular expression"),
    "a pattern of large repeats": recipe('exclude = ["re:a{99999999999999999999}"]', "is not a regular expression"),
    "a number of 400 digits": recipe("max_error = " + "9" * 400, "not finite"),
    "a recipe without an end": recipe("#" * 1_000_001, "more than 1000000 bytes"),
    "a pipe": Attack(lambda folder: pipe("adapter_config.json")(folder) / "adapter_config.json", "pipe", recipe=True),
}

ATTACKS = {
    f"{group}: {name}": attack
    for group, attacks in {
        "header": HEADERS,
        "entry": ENTRIES,
        "values": VALUES,
        "names": NAMES,
        "path": PATHS,
        "adapter": LINKS,
        "pickle": PICKLES,
        "recipe": RECIPES,
    }.items()
    for name, attack in attacks.items()
}
