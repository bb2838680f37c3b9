"""Write model cards: description, training data, recipe and accuracy."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def table(rows: Mapping[str, Any], *, head: tuple[str, str] = ("", "")) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(lines)


def curve(history: Sequence[Mapping[str, float]], *, rows: int = 10) -> str:
    """Return some of a training's losses as a table, evenly spaced up to the last."""
    chosen = [history[len(history) * i // rows - 1] for i in range(1, rows + 1)] if len(history) > rows else history
    return table({f"{line['samples']:,}": f"{line['loss']:.3f}" for line in chosen}, head=("pictures", "loss"))


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


BASE = """# The miniature base: a text-to-image model of SDXL's architecture

A model of {millions:.1f} million parameters at {resolution} × {resolution} pixels that draws cartoons of people in clothes. It exists so
that LoRA training, merging, generation and scoring can be shown and tested in minutes without a GPU. It is of no other
use: it knows {words} tokens and one world.

```python
pipe = StableDiffusionXLPipeline.from_pretrained(FOLDER, dtype=torch.float32)
```

Every class is diffusers' or transformers' own. Sample with `DPMSolverMultistepScheduler`, 20 steps, guidance 2. The
autoencoder (`vae`) has 12 × 12 × 12 latents of mean 0 and variance 1; `train_autoencoder.py` made it.

## Data
{pictures:,} pictures drawn by `examples/virtual_tryon/world` from seed {seed} with {captions} captions each: persons, wardrobes, seven
scenes, exactly captioned, a quarter of the things under random identifiers (`qtb-person`, `kmb47_jersey`). No photograph,
no person's likeness, no text or image of others. **Never seen**: the study's concepts (psq-person, mvr-person,
barca24_jersey, oxford33_shirt, stanford11_sweater, disney28_sweater, rix52_scarf, utw64_wall), nor mohawks, pigtails,
teal or pink hair, goatees, red glasses, crests, letters, castles, buttons, red with blue, plain white shirts.

## Recipe
{recipe}

Written by `{command}`.

Mean loss of fifty steps, on the way (`training.json` has all):

{curve}

## How good it is
{results}

![samples](samples.png)

Rows: guidance 1, 2 and 4. Columns: eight prompts that it should obey, then the study's five, whose two names mean nothing
to it yet. One seed, nothing selected.

{accuracy}
"""
SCORER = """# The miniature's judge: an encoder of DINOv2's architecture

`Dinov2Model`, {millions:.2f} million parameters, trained on {pictures:,} drawings of `examples/virtual_tryon/world` (seed {seed}) to tell
their attributes. The CLS embedding is the miniature's score space: its mean over drawings is taken off, so that cosine
0 is "like any drawing". The heads (`heads.safetensors`, `attributes.json`) tell hair, pattern, scene and so on. It has seen
held-out values one by one, as teal hair or a crest, and no concept as a whole.

{recipe}

Accuracy on drawings never trained on:

{accuracy}

What it takes the kinds of beards and emblems for, in percent of each row:

{confusion}
"""


def confusion(pairs: Sequence[tuple[str, str]]) -> str:
    """Return a table of pairs of a true value and the one that was found, in percent of each row."""
    found = Counter(pairs)
    totals = Counter(true for true, _ in pairs)
    names = sorted({name for pair in pairs for name in pair})
    rows = [
        [true, *(f"{100 * found[true, name] / totals[true]:.0f}" if found[true, name] else "" for name in names)]
        for true in sorted(totals)
    ]
    lines = [["", *names], ["---"] * (len(names) + 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(text: str, folder: Path) -> None:
    (folder / "README.md").write_text(text)
