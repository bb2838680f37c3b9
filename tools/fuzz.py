"""Fuzz the code that reads foreign files, guided by coverage.

    pip install atheris
    python tools/fuzz.py reader tests/hostile/corpus -runs=400000

The second argument is a directory of directories, one per target; new inputs are kept in ``found/``.  An
input is at fault if it raises anything but a LoRAMergeError, takes more than two seconds of CPU time, or
is taken for something that it isn't: the docstring of each target says what it checks.  Faults are printed
and kept, ten at most of each place.  Further arguments go to libFuzzer.  `python tools/fuzz.py seeds tests/hostile/corpus` writes the first inputs of the corpus.
"""

import json
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

if __name__ == "__main__" and sys.argv[1] != "seeds":
    import atheris

    with atheris.instrument_imports(include=["loramerge"]):
        import loramerge as lm
        from loramerge.files.dialects import DIALECTS, alphas, fields
        from loramerge.files.lora import from_tensors
        from loramerge.files.storage import reader, texts
        from loramerge.merging import coefficients, recipe, recipe_text
else:
    import loramerge as lm
    from loramerge.files.dialects import DIALECTS, alphas, fields
    from loramerge.files.lora import from_tensors
    from loramerge.files.storage import reader, texts
    from loramerge.merging import coefficients, recipe, recipe_text

from loramerge.cli import inspection
from loramerge.files.architectures import ARCHITECTURES, Architecture
from loramerge.files.architectures.labels import ARCHITECTURE as KEY
from loramerge.files.architectures.names import Parts, flat
from loramerge.files.dialects.base import Dialect, table
from loramerge.learned import plots
from loramerge.tensors import CODES, SIZES, Held, numpy_dtype
from loramerge.testing import random_lora

KEPT = 10
"""Inputs kept of all faults that were raised at one place."""
SLOW = 2.0
"""Seconds of CPU time."""
LARGEST = 200_000
"""Numbers that one input of the targets `detector` and `converter` may ask for."""
WRITTEN = [name for name, dialect in DIALECTS.items() if dialect.writes and name != "peft"]

SCRATCH = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


def fuzz_reader(data: bytes) -> None:
    """Check header and tensors: what is accepted, the reference implementation accepts with the same shapes.

    The first byte says whether the length of the header is put in front (it is, mostly).
    """
    if not data:
        return
    split = data.find(b"\0\0", 1)
    head, body = (data[1:], b"") if split < 0 else (data[1:split], data[split + 2 :])
    raw = data[1:] if data[0] == 0xFF else struct.pack("<Q", len(head)) + head + body
    path = SCRATCH / "x.safetensors"
    path.write_bytes(raw)
    file = reader.SafetensorsFile(path)
    try:
        reference = dict(safetensors.deserialize(raw))
        if {key: list(t.shape) for key, t in file.items()} != {key: t["shape"] for key, t in reference.items()}:
            raise AssertionError("the reference reads something else")
        if any(t.read().tobytes() != bytes(reference[key]["data"]) for key, t in file.items()):
            raise AssertionError("the reference reads other values")
    finally:
        file.close()


def fuzz_detector(data: bytes) -> None:
    """Check keys and shapes: every tensor belongs to a layer, is an extra, or is noted."""
    tensors, metadata = listing(data)
    lora = from_tensors(tensors, metadata, "fuzz")
    held = {id(t) for layer in lora.layouts.values() for t in layer.tensors().values()}
    if not lora.layouts or (not held and not lora.notes):
        raise AssertionError("a LoRA without a layer")


def fuzz_converter(data: bytes) -> None:
    """Check keys, shapes and values: in every dialect that takes it, a LoRA has the same ΔW when it is read again."""
    tensors, metadata = listing(data)
    lora = from_tensors(tensors, metadata, "fuzz").in_memory()
    wanted = {module: _delta(layer) for module, layer in lora.items()}
    for dialect in WRITTEN:
        path = SCRATCH / "y.safetensors"
        try:
            lm.save(lora, path, dialect=dialect)
        except lm.errors.LoRAMergeError:
            continue
        back = lm.load(path, architecture=lora.architecture)
        found = {module if lora.architecture else flat(module): module for module in back}
        for module, delta in wanted.items():
            again = found.get(module if lora.architecture else _read_as(module, lora.dialect, dialect))
            if again is None:
                raise AssertionError(f"{dialect}: lost {module}")
            if delta is not None and not _close(_delta(back[again]), delta):
                raise AssertionError(f"{dialect}: {module} has another ΔW")


def _read_as(module: str, own: str, dialect: str) -> str:
    """Name a module of a family that nobody knows as a dialect reads it, without dots: kohya's names lose them.

    A file of no dialect keeps its stems as the modules' names, and other dialects write the stems that they know.
    """
    return flat(DIALECTS[dialect].free_module(module) if DIALECTS[own].free is None else module)


def fuzz_family(data: bytes) -> None:
    """Check that some layers of a family in a dialect, with or without metadata, are never read as another family's.

    The first bytes choose the family, the dialect, what the header says and which family it names if a
    wrong one; each further pair of bytes chooses a layer.
    """
    if len(data) < 6:
        return
    a = ARCHITECTURES[FAMILIES[data[0] % len(FAMILIES)]]
    dialect = DIALECTS[NAMING[data[1] % len(NAMING)]]
    names = table(dialect.names, a)
    if not names:
        return
    stems = list(names)
    chosen = {stems[int.from_bytes(data[i : i + 2]) % len(stems)] for i in range(4, len(data) - 1, 2)}
    says = ("none", "right", "wrong", "strange")[data[2] % 4]
    named = {"right": a.name, "wrong": FAMILIES[data[3] % len(FAMILIES)], "strange": "omnigen"}.get(says, "")
    metadata = ({KEY: named}, {"modelspec.architecture": f"{named}/lora"})[data[2] // 4 % 2] if named else {}
    tensors = {key: t for stem in chosen for key, t in _layer(dialect, stem, names[stem], a).items()}
    try:
        lora = from_tensors(tensors, metadata, "fuzz")
    except lm.errors.FamilyError:
        if says in ("wrong", "strange") and named != a.name:
            return
        raise AssertionError(f"{a.name} in {dialect.name} is refused") from None
    if a.name in lora.families or (named in lora.families and says == "wrong"):
        return
    if lora.families or says in ("none", "right"):
        raise AssertionError(f"{a.name} in {dialect.name} is read as {lora.families or 'unknown'}")


def _layer(dialect: Dialect, stem: str, parts: Parts, a: Architecture) -> dict[str, Held]:
    """Return a layer of rank 2, or a difference if the weight is a vector; it takes no memory."""
    shapes = [a.shapes[part.module] for part in parts]
    shape = (sum(s[0] for s in shapes), *shapes[0][1:])
    value, module = np.float32(0.5), parts[0].module
    if len(shape) < 2:
        return {f"{stem}.diff": Held(np.broadcast_to(value, shape))}
    return {
        stem + dialect.suffix("down", module): Held(np.broadcast_to(value, (2, *shape[1:]))),
        stem + dialect.suffix("up", module): Held(np.broadcast_to(value, (shape[0], 2, *(1,) * (len(shape) - 2)))),
    }


FAMILIES = list(ARCHITECTURES)
NAMING = (
    "kohya",
    "kohya-diffusers",
    "diffusers",
    "diffusers-peft",
    "peft",
    "comfyui",
    "onetrainer",
    "lycoris",
    "omi",
    "native",
    "bare",
)


def fuzz_recipe(data: bytes) -> None:
    """Check that a recipe that is read, written and read again is the same."""
    path = SCRATCH / "recipe.toml"
    path.write_bytes(data)
    found = recipe.Recipe.read(path)
    path.write_text(found.to_toml(), encoding="utf-8")
    if recipe.Recipe.read(path) != found and b"nan" not in data:
        raise AssertionError("the recipe reads otherwise when it was written")


def fuzz_config(data: bytes) -> None:
    """Check that a configuration gives a finite alpha."""
    first, _, text = data.partition(b"\n")
    path, rank = first.decode("utf-8", "replace"), 4
    configs = alphas.configs({"lora_adapter_metadata": text.decode("utf-8", "replace")}, {})
    for config in configs.values():
        roles = fields.KINDS[config["peft_type"]].roles | {"lokr_w2"}
        for module in (path, "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "conv_in"):
            if not np.isfinite(fields.alpha(config, [module], rank, roles)):
                raise AssertionError("an alpha that is not finite")


def fuzz_coefficients(data: bytes) -> None:
    """Check that learned coefficients of any form are refused, or shown and used.

    The bytes choose what is changed in the entry of a header that is right, and the matrix.
    """
    picks = iter(data)
    entry = changed({"others": [1.0, 0.5], "names": ["a", "b"], "provenance": {"seed": 1}}, picks)
    shape = [(2, 640), (2, 640), (3, 640), (2, 0), (640,), ()][next(picks, 0) % 6]
    dtype = [np.float32, np.float32, np.float16, np.int32][next(picks, 0) % 4]
    with np.errstate(all="ignore"):
        values = np.full(shape, [1, 1, 3e38, np.nan, np.inf, -1e-45][next(picks, 0) % 6]).astype(dtype)
    names = [QUERY, QUERY, "x", "\x1b.blocks.1.x", "a.blocks." + "9" * 5000 + ".x", "unet.blocks.٣.x"]
    path = SCRATCH / "coefficients.safetensors"
    safetensors.numpy.save_file({names[next(picks, 0) % 6]: values}, path, {coefficients.KEY: json.dumps(entry)})
    found = coefficients.Coefficients.read(path)
    blocks = plots.by_block(found)
    plots.outside(blocks, *plots.span(blocks))
    lm.merge(PAIR, weights=found)


def fuzz_metadata(data: bytes) -> None:
    """Check that a header's JSON of any form is left out or shown in plain lines, and a recipe in it reads the same again.

    The bytes choose what is changed in a recipe and in tags that are right.
    """
    picks = iter(data)
    strings = {"loramerge": changed(MERGED, picks), "ss_tag_frequency": changed({"folder": {"tag": 5}}, picks)}
    lora = replace(PAIR[0], metadata={key: json.dumps(value) for key, value in strings.items()})
    json.dumps(inspection.as_data(lora, {}))
    if any(not c.isprintable() and c not in "\n" + texts.SPACES_AND_JOINERS for c in inspection.summary(lora)):
        raise AssertionError("a character that a terminal acts on")
    found = recipe.Recipe.of(lora)
    path = SCRATCH / "again.toml"
    path.write_text(found.to_toml(), encoding="utf-8")
    if recipe.Recipe.read(path) != found:
        raise AssertionError("the recipe reads otherwise when it was written")


def changed(value: Any, picks: Iterator[int]) -> Any:
    """Change parts of parsed JSON: each byte chooses a way in, what is put there, or that it is enough."""
    for pick in picks:
        if pick < 64:
            return value
        if pick >= 192 or not isinstance(value, dict | list) or not value:
            return ODD[pick % len(ODD)]
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = keys[pick % len(keys)]
        value = dict(value) if isinstance(value, dict) else list(value)
        if pick < 80:
            del value[key]
        elif pick < 96 and isinstance(value, dict):
            value[recipe_text.KEYS[pick % len(recipe_text.KEYS)]] = ODD[next(picks, 0) % len(ODD)]
        else:
            value[key] = changed(value[key], picks)
    return value


def _deep() -> list[Any]:
    found: list[Any] = []
    for _ in range(90):
        found = [found]
    return found


ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 10**18, 10**400, 1e308, 0.5, float("nan"), float("inf"), "", "a", "inf", "l2"),
    *(
        "\x1b[31m\n",
        "\u202e",
        "\ud800",
        "lbw:1,2",
        "re:(a+)+",
        "hf://a/b",
        "~x",
        "\0",
        "9" * 5000,
        "package.module:name",
    ),
    *([], {}, [1], [[]], [None], {"a": 1}, {"*": 0.5}, {"": ""}, {"re:(a+)+$": 1}, {"max_error": 10**400}, _deep()),
]
"""Values that a hostile file may have in place of the right ones."""

QUERY = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
PAIR = [
    replace(random_lora("sdxl", rank=2, seed=seed, only=lambda module, _: module == QUERY), name=f"{seed}.safetensors")
    for seed in (1, 2)
]
MERGED = {
    "loramerge": "0.1",
    "method": "ties",
    "options": {"density": 0.5},
    "rank": 4,
    "budget": {"max_error": 0.1},
    "ranks": {QUERY: 2},
    "exclude": ["text_encoder*"],
    "device": "cpu",
    "output": {"dialect": "kohya", "dtype": "F16"},
    "inputs": [
        {"name": "a", "sha256": "0" * 64, "source": "a.safetensors", "weight": 0.5, "metadata": {"a": "b"}},
        {"name": "b", "sha256": "0" * 64, "source": "hf://a/b@main", "weight": {"*": 1.0, "unet": 0.5}},
    ],
}
"""A recipe as a merge has it in its header."""

TARGETS: dict[str, Callable[[bytes], None]] = {
    "reader": fuzz_reader,
    "detector": fuzz_detector,
    "converter": fuzz_converter,
    "family": fuzz_family,
    "recipe": fuzz_recipe,
    "config": fuzz_config,
    "coefficients": fuzz_coefficients,
    "metadata": fuzz_metadata,
}


def attempt(target: Callable[[bytes], None], data: bytes, slow: float = SLOW) -> None:
    """Run a target on one input.

    Raises:
        Exception: The input is at fault.
    """
    began = time.process_time()
    try:
        target(data)
    except lm.errors.LoRAMergeError as error:
        if not str(error):
            raise AssertionError("an error without a message") from error
    if time.process_time() - began > slow:
        raise TimeoutError(f"took {time.process_time() - began:.1f} s")


def listing(data: bytes) -> tuple[dict[str, Held], dict[str, str]]:
    """Parse tensors from lines ``key shape dtype value``, and metadata from lines ``#key value``."""
    tensors: dict[str, Held] = {}
    metadata: dict[str, str] = {}
    left = LARGEST
    for line in data.decode("utf-8", "replace").split("\n")[:200]:
        if line.startswith("#"):
            key, _, value = line[1:].partition(" ")
            metadata[key] = value
            continue
        key, sizes, dtype, value = [*line.split("\t"), "", "F32", "0.5"][:4]
        shape = tuple(int(size) for size in sizes.split(",") if size.isascii() and size.isdigit())[:6]
        count = int(np.prod([min(size, LARGEST) for size in shape], dtype=object)) if shape else 1
        left -= count
        if left < 0 or max(shape, default=0) > LARGEST or dtype not in SIZES:
            continue
        tensors[key] = Held(_values(count, _number(value)).reshape(shape).astype(numpy_dtype(dtype)))
    return tensors, metadata


def _values(count: int, scale: float) -> np.ndarray:
    with np.errstate(all="ignore"):
        return scale * np.cos(np.arange(count, dtype=np.float64))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.5


def _delta(layer: lm.layers.Layer) -> "np.ndarray | None":
    try:
        with np.errstate(all="ignore"):
            return np.asarray(layer.delta(), np.float64).reshape(-1)
    except lm.errors.NoFactorsError:
        return None


def _close(found: "np.ndarray | None", wanted: np.ndarray) -> bool:
    if found is None or not np.isfinite(wanted).all():
        return True
    largest = max(float(np.abs(wanted).max(initial=0)), 1e-30)  # below it float32 is not to be held to its digits
    return found.shape == wanted.shape and float(np.abs(found - wanted).max(initial=0)) <= 2e-2 * largest


def seeds() -> Iterator[tuple[str, bytes]]:
    """Return the first inputs: small files of every kind and dialect, a recipe, a configuration."""
    for kind in ("lora", "tucker", "loha", "lokr", "full", "dora"):
        for architecture in ("sdxl", "flux"):
            lora = random_lora(architecture, kind=kind, rank=2, only=_one())
            for dialect in WRITTEN:
                try:
                    path = lm.save(lora, SCRATCH / "seed.safetensors", dialect=dialect)
                except lm.errors.LoRAMergeError:
                    continue
                yield "detector", _lines(path)
                yield "converter", _lines(path)
                if kind in ("lora", "dora"):
                    yield "reader", _raw(path)
    for i, family in enumerate(FAMILIES):
        for j in range(len(NAMING)):
            yield "family", bytes([i, j, i + j, 3 * i, *range(2 * len(family))])
    yield "recipe", RECIPE
    yield "recipe", recipe.__doc__.partition("\n\n")[2].encode() if recipe.__doc__ else b""
    yield (
        "config",
        b'conv_in\n{"unet.lora_alpha": 4, "unet.r": 2, "unet.alpha_pattern": {"attn1.to_q": 2, "^a.*q$": 1}}',
    )
    yield "config", b'a.b\n{"lora_alpha": 4, "use_rslora": true, "alpha_pattern": {"(a|b)+": 1e9, "\\\\d.": -2}}'
    yield from (
        (name, bytes(range(start, 256, 7))) for name in ("coefficients", "metadata") for start in range(64, 192, 8)
    )


RECIPE = b"""method = "ties"
rank = "max"
exclude = ["text_encoder*", "OUT03"]
architecture = "sdxl"
max_error = "1%"
[options]
density = 0.3
[[loras]]
path = "person.safetensors"
weight = "lbw:1,0,0,0,1,1,1,1,1,1,1,1"
sha256 = "00"
[[loras]]
hub = "someone/barca-lora-sdxl"
revision = "main"
weight = { "*" = 0.5, text_encoder = 0 }
[output]
path = "both.safetensors"
to = "kohya"
dtype = "fp16"
allow_lossy = true
[ranks]
"unet.conv_in" = 4
"""


def _one() -> Callable[[str, tuple[int, ...]], bool]:
    seen: set[str] = set()

    def chosen(module: str, shape: tuple[int, ...]) -> bool:
        kind = f"{module.partition('.')[0]}{len(shape)}"
        small = len(shape) > 1 and int(np.prod(shape)) < 1_000_000 and kind not in seen
        seen.update([kind] if small else [])
        return small

    return chosen


def _lines(path: Path) -> bytes:
    with lm.open(path) as lora:
        assert lora.origin
        rows = [f"{k}\t{','.join(map(str, t.shape))}\t{t.dtype}\t0.5" for k, t in lora.origin.tensors.items()]
        return "\n".join([*rows, *(f"#{k} {v}" for k, v in lora.metadata.items())]).encode()


def _raw(path: Path) -> bytes:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return b"\0" + data[8 : 8 + length] + b"\0\0"


def main() -> None:
    name, corpus = sys.argv[1], Path(sys.argv[2])
    if name == "seeds":
        for i, (target, data) in enumerate(seeds()):
            (corpus / target).mkdir(parents=True, exist_ok=True)
            (corpus / target / f"seed-{i}").write_bytes(data)
        return
    words = SCRATCH / "words"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in _words()))
    found = Path("found") / name
    found.mkdir(parents=True, exist_ok=True)
    known: Counter[str] = Counter()

    def once(data: bytes) -> None:
        try:
            attempt(TARGETS[name], data)
        except Exception as error:
            _note(error, data, found, known)

    own = [f"-dict={words}", "-timeout=60", "-rss_limit_mb=1500", f"-artifact_prefix={found}/fault-"]
    atheris.Setup([sys.argv[0], str(found), str(corpus / name), *own, *sys.argv[3:]], once)
    atheris.Fuzz()


def _note(error: Exception, data: bytes, found: Path, known: Counter[str]) -> None:
    """Keep the first inputs of every fault, distinguished by where it was raised, and go on."""
    import traceback

    frames = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    place = f"{type(error).__name__} " + next((f for f in reversed(frames) if "loramerge" in f), frames[-1])
    known[place] += 1
    if known[place] <= KEPT:
        path = found / f"fault-{sum(min(count, KEPT) for count in known.values())}"
        path.write_bytes(data)
        print(f"\nFAULT {place}: {str(error)[:200]}\n  in {path}\n  " + "\n  ".join(frames[-4:]), flush=True)


def _words() -> list[str]:
    from loramerge.files.dialects.suffixes import SHARED, STYLES

    suffixes = [*SHARED, *(suffix for roles in STYLES.values() for suffix in roles.values())]
    return [
        *suffixes,
        *CODES.values(),
        '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}',
        "__metadata__",
        *recipe_text.KEYS,
    ]


def _escaped(word: str) -> str:
    return word.replace("\\", "\\\\").replace('"', '\\"')


if __name__ == "__main__":
    main()
