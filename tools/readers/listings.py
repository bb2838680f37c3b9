"""Compare what `loramerge.check` says of files with what a reader's own code takes of them.

    python tools/readers/listings.py READER CHECKOUT [NAME …]

READER is comfyui or diffusers (then CHECKOUT is ``-``).  The files have the keys of real tools' files, ``tests/data``, with random
values.  What was measured goes to ``tests/data/read.json``, where ``tests/test_checking.py`` finds it; what is there already is not
measured again.  Files with text encoders, Tucker cores or other layers than LoRAs are left out.
"""

import contextlib
import gzip
import io
import json
import lzma
import sys
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from judging import Changes, _parted, places, product
from safetensors.torch import save_file

import loramerge as lm
from loramerge.files.architectures import ARCHITECTURES
from loramerge.layers import DoRA

DATA = Path(__file__).parents[2] / "tests/data"
MEASURED = DATA / "read.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}


def listings() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every listing by name: keys with dtype and shape, metadata, PEFT's configuration."""
    found = json.loads(lzma.decompress((DATA / "families.json.xz").read_bytes()))
    yield from sorted(found.items())
    for path in sorted((DATA / "listings").glob("*.json.gz")):
        data = json.loads(gzip.decompress(path.read_bytes()))
        dtype = (data.get("dtypes") or ["F16"])[0]
        yield path.name.removesuffix(".json.gz"), {**data, "keys": {k: [dtype, s] for k, s in data["keys"].items()}}


def filled(listing: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return small random tensors for the keys of a listing."""
    made = {}
    for key, (dtype, shape) in listing["keys"].items():
        random = np.random.default_rng(zlib.crc32(key.encode()))
        value = 0.1 * random.standard_normal(shape, dtype=np.float32) if shape else np.float32(1 + random.integers(8))
        made[key] = torch.as_tensor(np.asarray(value)).to(DTYPES.get(dtype, torch.float32))
    return made


def truth(reader: Any, lora: lm.LoRA, file: Path) -> list[str]:
    """Return the modules of which a reader's model gets the whole change; none if it stops with an error."""
    a = ARCHITECTURES[lora.architecture or ""]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found: Changes = reader.read(a.name, "", file)
    except ImportError:
        raise
    except Exception:  # whatever it stops with, it reads nothing
        return []
    homes, got = places(a), dict[str, list[torch.Tensor]]()
    for path, change in found.items():
        for part, rows in _parted(homes.get(path, ()), change):
            got.setdefault(part.module, []).append(rows)
    return [m for m in got if m in lora and _right(lora, m, got[m])]


def _right(lora: lm.LoRA, module: str, changes: list[torch.Tensor]) -> bool:
    layer = lora[module]
    if isinstance(layer, DoRA) or layer.delta_bias() is not None:
        return False
    up, down = (torch.as_tensor(np.asarray(factor, dtype=np.float32)) for factor in layer.factors())
    total, wanted = torch.stack(changes).sum(0), product(up, down)
    return total.shape == wanted.shape and bool((total - wanted).abs().max() < 1e-2 * wanted.abs().max())


def compared(lora: lm.LoRA, reader: str, found: Iterable[str]) -> str:
    """Return in a line whether a check says what was measured."""
    said, taken = lm.check(lora, reader), set(found)
    measured = f"{lora.dialect}, {len(taken)} of {len(lora)}"
    if said.verdict == "unknown":
        return f"unknown ({measured}): {said.unknown[0]}"
    ignored = set(said.ignored)
    if ignored == set(lora) - taken:
        return f"agrees ({measured})"
    more, less = sorted(ignored & taken), sorted(set(lora) - taken - ignored)
    return f"DIFFERS ({measured}): said to be ignored {len(more)} {more[:1]}, ignored too {len(less)} {less[:2]}"


def main() -> None:
    """Measure what isn't measured yet, then compare."""
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    name, checkout, *names = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    reader = import_module({"diffusers": "pipelines"}.get(name, name))
    reader.open_checkout(Path(checkout))
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    rows = measured.setdefault(name, {})
    for title, listing in listings():
        if (names and title not in names) or title in rows:
            continue
        tensors = filled(listing)
        metadata = listing.get("metadata") or {}
        lora = lm.load(tensors, metadata=metadata, config=listing.get("adapter_config"))
        layers = lora.layouts.items()
        plain = all(not m.startswith("text_encoder") and la.kind == "lora" and not la.has_core for m, la in layers)
        if lora.architecture not in reader.MODELS or not plain:
            continue
        with TemporaryDirectory() as folder:
            file = Path(folder) / "lora.safetensors"
            save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata)
            taken = truth(reader, lora, file)
        rows[title] = [len(taken), len(lora)]
        measured[name] = dict(sorted(rows.items()))
        MEASURED.write_text(as_lines(measured), encoding="utf-8")
        print(f"{title}: {compared(lora, name, taken)}", flush=True)


def as_lines(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the table with a line per file."""
    readers = [
        f' "{reader}": {{\n' + ",\n".join(f'  "{title}": {json.dumps(row)}' for title, row in rows.items()) + "\n }"
        for reader, rows in measured.items()
    ]
    return "{\n" + ",\n".join(readers) + "\n}\n"


if __name__ == "__main__":
    main()
