"""Train the miniature's judge: an encoder of DINOv2's architecture that tells the attributes of drawings.

pip install torch diffusers transformers tokenizers safetensors numpy pillow

python -m examples.virtual_tryon.train_scorer --device cuda --minutes 3
python -m examples.virtual_tryon.train_scorer --device cpu --minutes 15
"""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import cards, judge, muon
from .judge import ATTRIBUTES, Judge, encoder, new_heads, normalised
from .model import HELD_OUT_SEED, RESOLUTION, keep_memory, quiet
from .rendering import label_data
from .train_base import fill

SHIFT = 4
"""Largest shift of a picture in training, in pixels."""
NOISE = 6.0
"""Standard deviation of the noise that training adds, in bytes."""


CONFUSED = ("beard", "emblem")
"""Attributes whose confusions are in the card."""


def arguments(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train_scorer", description="Train the miniature's judge.")
    add = parser.add_argument
    add("--out", type=Path, default=Path("build/miniature/scorer"), help="folder of the judge (default: %(default)s)")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--minutes", type=float, required=True, help="of training")
    add("--start", type=Path, help="go on from this judge, with a new optimiser and this run's schedule")
    add("--resolution", type=int, default=RESOLUTION, help="(default: %(default)s)")
    add("--processes", type=int, default=None, help="that draw (default: 1 on a CPU, all cores with CUDA)")
    add("--batch", type=int, default=None, help="(default: 64 on a CPU, 512 with CUDA)")
    add("--pictures", type=int, default=None, help="to draw (default: 20000 on a CPU, 120000 with CUDA)")
    add("--held-out", type=int, default=2_000, help="pictures never trained on (default: %(default)s)")
    add("--rate", type=float, default=0.02, help="Muon's learning rate; Adam's is a tenth of it (default: %(default)s)")
    add("--seed", type=int, default=0)
    options = parser.parse_args(given)
    usual = {"processes": (1, os.cpu_count() or 1), "batch": (64, 512), "pictures": (20_000, 120_000)}
    fill(options, usual)
    return options


def main(given: list[str] | None = None) -> None:
    options = arguments(sys.argv[1:] if given is None else given)
    quiet()
    keep_memory()
    if options.device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    seen, unseen = data(options)
    made = beginning(options)
    steps = fit(made, *(torch.from_numpy(np.array(part)).to(options.device) for part in seen), options)
    centre(made, seen[0][:4_000])
    judge.save(made, options.out)
    told = pairs(made, *unseen)
    right = {name: sum(true == found for true, found in each) / len(each) for name, each in told.items() if each}
    print("  ".join(f"{name} {value:.3f}" for name, value in right.items()), flush=True)
    recipe = {
        "pictures seen": f"{steps * options.batch:,} in {steps:,} steps of {options.batch}",
        "optimiser": f"Muon, {options.rate:g}; Adam at a tenth of it for vectors, patches and heads; linear to 0",
        "augmentation": f"mirrored, shifted by up to {SHIFT} pixels, noise of {NOISE:g} of 255",
        "torch": torch.__version__,
    }
    text = cards.SCORER.format(
        millions=sum(p.numel() for p in made.encoder.parameters()) / 1e6,
        pictures=options.pictures,
        seed=options.seed,
        recipe=cards.table(recipe),
        accuracy=cards.table({name: cards.share(value) for name, value in right.items()}, head=("attribute", "right")),
        confusion="\n\n".join(cards.confusion(told[name]) for name in CONFUSED),
    )
    cards.write(text, options.out)


def beginning(options: argparse.Namespace) -> Judge:
    """Return the judge that training begins with."""
    if options.start:
        return judge.load(options.start, device=options.device)
    return Judge(encoder=encoder(options.resolution).to(options.device), heads=new_heads(128).to(options.device))


def data(options: argparse.Namespace) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return pictures and labels to train on, and those held out."""
    folder = options.out.with_name(options.out.name + ".training")
    parts = (("seen", options.pictures, options.seed), ("unseen", options.held_out, options.seed + HELD_OUT_SEED))
    return [
        label_data(
            folder / name, count, ATTRIBUTES, resolution=options.resolution, seed=seed, processes=options.processes
        )
        for name, count, seed in parts
    ]


def fit(made: Judge, pictures: Tensor, labels: Tensor, options: argparse.Namespace) -> int:
    """Train for the given time; return the number of steps."""
    parameters = [*made.encoder.parameters(), *made.heads.parameters()]
    whole = nn.ModuleDict({"encoder": made.encoder, "heads": made.heads})
    ends = ("heads", "patch_embeddings", "token")
    optimizer = muon.Muon(muon.groups(whole, rate=options.rate, adam_rate=options.rate / 10, ends=ends))
    started, step = time.monotonic(), 0
    losses: list[Tensor] = []
    made.encoder.train()
    while (done := (time.monotonic() - started) / (60 * options.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = group["usual"] * min(1.0, (step + 1) / 100) * max(0.01, 1 - done)
        chosen = torch.randint(0, len(pictures), (options.batch,), device=pictures.device)
        loss = error(made, altered(pictures[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.detach())
        step += 1
        if step % 100 == 0:
            print(f"step {step}  {100 * done:.1f} %  loss {float(torch.stack(losses).mean()):.3f}", flush=True)
            losses = []
    made.encoder.eval()
    return step


def altered(pictures: Tensor) -> Tensor:
    """Mirror, shift and add noise at random; return bytes as floats, shape ``(n, height, width, 3)``."""
    if torch.rand(()) < 0.5:
        pictures = pictures.flip(2)
    down, right = (int(v) for v in torch.randint(-SHIFT, SHIFT + 1, (2,)))
    height, width = pictures.shape[1:3]
    framed = F.pad(pictures.movedim(-1, 1).float(), (SHIFT,) * 4, mode="replicate").movedim(1, -1)
    moved = framed[:, SHIFT + down : SHIFT + down + height, SHIFT + right : SHIFT + right + width]
    return moved + NOISE * torch.randn_like(moved)


def error(made: Judge, pictures: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy over the attributes, each over the pictures in which it can be seen."""
    embedded = made.encoder(normalised(pictures)).last_hidden_state[:, 0]
    parts = [
        F.cross_entropy(head(embedded), labels[:, i], ignore_index=-1, reduction="sum")
        / (labels[:, i] >= 0).sum().clamp(min=1)
        for i, head in enumerate(made.heads.values())
    ]
    return torch.stack(parts).mean()


@torch.no_grad()
def centre(made: Judge, pictures: np.ndarray) -> None:
    """Subtract the mean embedding in the last normalisation, and add it to the heads' biases."""
    mean = made.embed(pictures).mean(0).to(made.encoder.device)
    made.encoder.layernorm.bias -= mean
    for head in made.heads.values():
        head.bias += head.weight @ mean


def pairs(made: Judge, pictures: np.ndarray, labels: np.ndarray) -> dict[str, list[tuple[str, str]]]:
    """Return each attribute's true values with those found, over the pictures in which it can be seen."""
    told = made.attributes(np.array(pictures))
    return {
        name: [(values[label], t[name]) for t, label in zip(told, labels[:, i].tolist(), strict=True) if label >= 0]
        for i, (name, values) in enumerate(ATTRIBUTES.items())
    }


if __name__ == "__main__":
    main()
