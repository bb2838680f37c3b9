"""Write the study's data as image folders: concept sets, mixed sets, and the pictures that a perfect merge would draw.

    pip install numpy pillow

    python -m examples.virtual_tryon.make_sets --out build/miniature/sets

Each folder has its pictures and a ``metadata.jsonl``: one line a picture with ``file_name``, ``text`` (the caption) and
``attributes`` (what can be seen in it).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from PIL import Image

from .world import CONCEPTS, SCENES, Example, concept_set, draw, labels, mixed_set, truth

MIXED = {"profile_mixed": ("profile", "barca"), "barca_mixed": ("barca", "profile")}
"""The study's mixed sets: whose pictures, and whose three are added."""
MERGES = (
    ("profile", "barca"),
    ("profile", "white_shirt"),
    ("profile", "stanford"),
    ("profile", "disney"),
    ("profile2", "barca"),
    ("profile", "barca", "scarf"),
    ("profile", "barca", "scarf", "wall"),
)
"""Concepts whose perfect merge is drawn."""


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="make_sets", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/miniature/sets"), help="(default: %(default)s)")
    parser.add_argument("--resolution", type=int, default=96, help="pixels a side (default: %(default)s)")
    parser.add_argument("--count", type=int, default=12, help="pictures of a concept (default: %(default)s)")
    parser.add_argument("--truths", type=int, default=8, help="true pictures of each prompt (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args(sys.argv[1:] if given is None else given)
    for name, examples in sets(options.count, seed=options.seed).items():
        write(examples, options.out / name, options.resolution)
    for merge in MERGES:
        write(
            truths(merge, options.truths, seed=options.seed),
            options.out / "truth" / "+".join(merge),
            options.resolution,
        )
    print(f"{len(CONCEPTS) + len(MIXED)} sets and {len(MERGES)} truths in {options.out}")


def sets(count: int = 12, *, seed: int = 42) -> dict[str, list[Example]]:
    """Draw every concept's pictures, and the mixed sets."""
    plain = {name: concept_set(concept, count, seed=seed) for name, concept in CONCEPTS.items()}
    mixed = {name: mixed_set(CONCEPTS[own], CONCEPTS[other], count, seed=seed) for name, (own, other) in MIXED.items()}
    return plain | mixed


def truths(merge: Sequence[str], count: int, *, seed: int = 42) -> list[Example]:
    """Draw the pictures of a perfect merge of these concepts, ``count`` per prompt of the study."""
    concepts = [CONCEPTS[name] for name in merge]
    return [truth(concepts, scene, seed=seed + i) for scene, i in product(SCENES, range(count))]


def write(examples: Sequence[Example], folder: Path, resolution: int) -> None:
    """Write an image folder, as Hugging Face's trainers read it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, example in enumerate(examples):
        name = f"{i:03d}.png"
        Image.fromarray(draw(example.picture, resolution)).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": example.text, "attributes": labels(example.picture)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
