"""Notes on readers, when a file is written, say what `tools/readers` measured with their own code."""

import importlib.util
import json
import lzma
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from loramerge.files.architectures import ARCHITECTURES
from loramerge.files.dialects import DIALECTS
from loramerge.files.dialects.base import table
from loramerge.files.dialects.readers import dropped
from loramerge.testing import random_layer

HERE = Path(__file__).parent
MEASURED: dict[str, Any] = json.loads((HERE.parent / "docs/reference/readers.json").read_text(encoding="utf-8"))
TOOLS: dict[str, Any] = json.loads(lzma.decompress((HERE / "data/families.json.xz").read_bytes()))
LAYER = random_layer((4, 4), rank=1)
SCRIPTS = HERE.parent / "tools/readers"
WRITTEN = [d.name for d in DIALECTS.values() if d.writes and d.name != "peft"]


@cache
def judging() -> ModuleType:
    spec = importlib.util.spec_from_file_location("judging", SCRIPTS / "judging.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verdicts(*readers: str) -> list[tuple[str, str, str, str, list[Any]]]:
    return [
        (reader, family, model, dialect, verdict)
        for reader in readers
        for family, models in MEASURED[reader]["rows"].items()
        for model, dialects in models.items()
        for dialect, verdict in dialects.items()
    ]


@pytest.mark.parametrize(("reader", "family"), [(r, f) for r in ("ComfyUI", "diffusers") for f in MEASURED[r]["rows"]])
def test_a_family_was_tried_in_every_dialect_that_has_names_for_it(reader: str, family: str) -> None:
    tried = {dialect for _, f, _, dialect, _ in verdicts(reader) if f == family}

    assert tried == {d for d in WRITTEN if table(DIALECTS[d].names, ARCHITECTURES[family])}


@pytest.mark.parametrize(
    ("reader", "family", "dialect", "verdict"), [(r, f, d, v) for r, f, _, d, v in verdicts("ComfyUI", "diffusers")]
)
def test_as_many_layers_are_said_to_be_left_out_as_were(
    reader: str, family: str, dialect: str, verdict: list[Any]
) -> None:
    a, (taken, modules, _) = ARCHITECTURES[family], verdict
    layers = [m for m, s in a.shapes.items() if judging().is_layer(m, s) and not m.startswith("text_encoder")]

    rows = dropped(dialect, family, dict.fromkeys(layers, LAYER))

    said = {module for drop, found in rows if drop.reader == reader for module in found}
    assert len(said) == (modules - taken if taken else len(layers))


@pytest.mark.parametrize(
    ("reader", "family", "lost"),
    [(r, f, v[2]) for r, f, _, d, v in verdicts("musubi-tuner", "sd-scripts") if d == "kohya"],
)
def test_kohyas_trainers_take_every_layer_of_the_blocks_in_kohya(reader: str, family: str, lost: str) -> None:
    assert not re.search(r"(^|, |: )(\w*blocks|layers|all)\b", lost)


@pytest.mark.parametrize(
    ("reader", "family"), [(r, f) for r in ("ai-toolkit", "OneTrainer") for f in MEASURED[r]["rows"]]
)
def test_each_of_the_other_trainers_takes_nearly_all_of_some_dialect(reader: str, family: str) -> None:
    """ai-toolkit makes no LoRA of embeddings, of kernels of three axes and of the gates of experts."""
    found = [taken / modules for _, f, _, _, (taken, modules, _) in verdicts(reader) if f == family]

    assert max(found) > 0.95


@pytest.mark.parametrize("name", [name for name in TOOLS if name.endswith(("__musubi", "__sdscripts"))])
def test_kohya_has_the_names_that_kohyas_trainers_write(name: str) -> None:
    stems = {key.partition(".")[0] for key in TOOLS[name]["keys"] if key.startswith("lora_unet_")}

    assert stems
    assert stems <= table(DIALECTS["kohya"].names, ARCHITECTURES[TOOLS[name]["family"]]).keys()
