"""Write model cards: description, training data, recipe and accuracy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def table(rows: Mapping[str, Any], *, head: tuple[str, str] = ("", "")) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(lines)


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


BASE = """# The miniature base: a text-to-image model of SDXL's architecture

A model of {millions:.1f} million parameters at {resolution} × {resolution} pixels that draws cartoons of people in clothes. It exists so
that LoRA training, merging, generation and scoring can be shown and tested in minutes without a GPU. It is of no other
use: it knows {words} tokens and one world.

```python
pipe = StableDiffusionXLPipeline.from_pretrained(FOLDER, dtype=torch.float32, trust_remote_code=True)
```

`trust_remote_code` is for `vae/patch_vae.py`, a short file that projects patches on principal components;
`examples/virtual_tryon/model.py: load` does without it. Sample with `DPMSolverMultistepScheduler`, 20 steps, guidance 2.

## Data
{pictures:,} pictures drawn by `examples/virtual_tryon/world` from seed {seed} with {captions} captions each: persons, wardrobes, seven
scenes, exactly captioned, a quarter of the things under random identifiers (`qtb-person`, `kmb47_jersey`). No photograph,
no person's likeness, no text or image of others. **Never seen**: the study's concepts (psq-person, mvr-person,
barca24_jersey, oxford33_shirt, stanford11_sweater, disney28_sweater, rix52_scarf, utw64_wall), nor mohawks, pigtails,
teal or pink hair, goatees, red glasses, crests, letters, castles, buttons, red with blue, plain white shirts.

## Recipe
{recipe}

Written by `{command}`.

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
"""


def write(text: str, folder: Path) -> None:
    (folder / "README.md").write_text(text)
