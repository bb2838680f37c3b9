"""Draw the same prompts with every merge method: the picture of docs/explanation/methods.md.

The miniature's two LoRAs, a person's and a jersey's, each alone and merged by methods at two pairs of
weights, drawn with the same seeds.  Every method has the defaults of its options, and the rank of the sum.
Pictures that are in the folder already are not drawn again.

    python -m examples.virtual_tryon.methods FOLDER docs/explanation/methods.png
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from diffusers import DPMSolverMultistepScheduler

import loramerge as lm
from loramerge.diffusion import Sampling, Use, generate
from loramerge.scoring import Shot, save_sheet

from . import model

WEIGHTS = Path(__file__).parent / "weights"
METHODS = ("linear", "ties", "knots", "np_lora", "tsv", "iso_cts", "slerp", "model_stock", "dare", "factor_average")
PROMPT = "A portrait of a psq-person smiling at the camera, wearing a barca24_jersey."
PAIRS = ((1.0, 1.0), (0.5, 0.5))
SEEDS = 2


def main(folder: Path, path: Path) -> None:
    loras = [lm.load(WEIGHTS / "loras" / f"{name}.safetensors", architecture="sdxl") for name in ("person", "jersey")]
    model.quiet()
    pipe = model.load(WEIGHTS / "base")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    sampling = Sampling(steps=20, guidance=2.0)
    shots: list[Shot] = []
    for pair in PAIRS:
        settings = dict(merged(loras, pair))
        drawn = generate(pipe, settings, [PROMPT], SEEDS, folder / f"{pair[0]:g}", sampling=sampling)
        shots += [Shot(d.setting, f"weights {pair[0]:g} and {pair[1]:g}", d.seed, d.path) for d in drawn]
    save_sheet(shots, path, side=96, seeds=SEEDS)


def merged(loras: list[lm.LoRA], pair: tuple[float, float]) -> Iterator[tuple[str, list[Use]]]:
    """Yield every row of the sheet: each LoRA alone, and the merges."""
    for name, lora, weight in zip(("person alone", "jersey alone"), loras, pair, strict=True):
        yield name, [Use(lora, weight)]
    for name in METHODS:
        yield name, [Use(lm.merge(loras, weights=pair, method=name), 1.0)]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
