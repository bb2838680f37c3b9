"""Train the miniature's autoencoder, an ``AutoencoderKL`` of diffusers, on the drawn world.

python -m examples.virtual_tryon.train_autoencoder --minutes 40
python -m examples.virtual_tryon.train_autoencoder --minutes 20 --go-on --decoder-only --scorer build/miniature/scorer

The second command goes on with the decoder alone: the latents stay what they are, so a base trained on them stays valid.
"""

import argparse
import copy
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed
import torch.multiprocessing
from diffusers import AutoencoderKL
from torch import Tensor, nn

from . import judge, model, muon
from .autoencoder import LATENT_CHANNELS, untrained
from .judge import Judge
from .rendering import picture_data

NOISE = 0.5
"""Largest standard deviation of the noise on latents in training; latents themselves have variance one."""
DETAIL = 4.0
"""The extra weight of the error at edges and in faces, beside flat colours."""
PERCEPTUAL = 0.5
"""Weight of the judge's features."""
FLAT = 0.4
"""Share of the training at the full learning rate; then it falls in a straight line."""


def arguments(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train_autoencoder", description="Train the miniature's autoencoder.")
    add = parser.add_argument
    add(
        "--out", type=Path, default=Path("build/miniature/vae"), help="folder of the autoencoder (default: %(default)s)"
    )
    add("--minutes", type=float, required=True, help="of training")
    add("--go-on", action="store_true", help="train the autoencoder of --out further, with a schedule of its own")
    add("--decoder-only", action="store_true", help="leave the encoder as it is")
    add("--scorer", type=Path, help="a folder of train_scorer: its features are compared too")
    add("--resolution", type=int, default=model.RESOLUTION, help="pixels a side (default: %(default)s)")
    add("--pictures", type=int, default=6_000, help="to draw (default: %(default)s)")
    add("--held-out", type=int, default=256, help="pictures never trained on (default: %(default)s)")
    add("--batch", type=int, default=8, help="(default: %(default)s)")
    add("--rate", type=float, default=0.02, help="Muon's learning rate; Adam's is a tenth of it (default: %(default)s)")
    add("--processes", type=int, default=1, help="that draw and train, one thread each (default: %(default)s)")
    add("--checkpoint-minutes", type=float, default=5.0, help="(default: %(default)s)")
    add("--seed", type=int, default=0)
    return parser.parse_args(given)


class Autoencoding(nn.Module):
    """An autoencoder in training: latents are brought to mean 0 and variance 1 by batch statistics."""

    def __init__(self, vae: AutoencoderKL, *, settled: bool) -> None:
        super().__init__()
        self.vae = vae
        self.norm = nn.Identity() if settled else nn.BatchNorm2d(LATENT_CHANNELS, affine=False, momentum=0.02)

    def latents(self, pictures: Tensor) -> Tensor:
        found: Tensor = self.norm(self.vae.quant_conv(self.vae.encoder(pictures))[:, :LATENT_CHANNELS])
        return found

    def decoded(self, latents: Tensor) -> Tensor:
        found: Tensor = self.vae.decoder(self.vae.post_quant_conv(latents))
        return found

    @torch.no_grad()
    def settle(self) -> None:
        """Fold the statistics into the last layer of the encoder, whose latents then have no spread."""
        if isinstance(self.norm, nn.Identity):
            return
        scale = (self.norm.running_var + self.norm.eps).rsqrt()
        last = self.vae.quant_conv
        last.weight[:LATENT_CHANNELS] *= scale[:, None, None, None]
        last.bias[:LATENT_CHANNELS] = (last.bias[:LATENT_CHANNELS] - self.norm.running_mean) * scale
        last.weight[LATENT_CHANNELS:] = 0
        last.bias[LATENT_CHANNELS:] = -30
        self.norm = nn.Identity()


def main(given: list[str] | None = None) -> None:
    options = arguments(sys.argv[1:] if given is None else given)
    model.quiet()
    data(options)
    if options.processes == 1:
        work(0, options)
    else:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29613")
        torch.multiprocessing.spawn(work, (options,), nprocs=options.processes)


def data(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Return the pictures to train on, and those held out."""
    folder = options.out.with_name(options.out.name + ".training")
    parts = (("seen", options.pictures, options.seed), ("unseen", options.held_out, options.seed + model.HELD_OUT_SEED))
    seen, unseen = (
        picture_data(folder / name, count, resolution=options.resolution, seed=seed, processes=options.processes)
        for name, count, seed in parts
    )
    return seen, unseen


def work(rank: int, options: argparse.Namespace) -> None:
    """Train, in one process of several."""
    model.quiet()
    model.keep_memory()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    if options.processes > 1:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=options.processes)
    seen, unseen = data(options)
    vae = (
        AutoencoderKL.from_pretrained(options.out, dtype=torch.float32)
        if options.go_on
        else untrained(options.resolution)
    )
    training = Autoencoding(vae, settled=options.decoder_only)
    if options.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    torch.manual_seed(1_000 * options.seed + rank)
    fit(training, seen, judge.load(options.scorer) if options.scorer else None, options, rank)
    if rank == 0:
        for noise, decibels in quality(save(training, options.out), unseen).items():
            print(f"PSNR with noise of {noise:g} on the latents: {decibels:.2f} dB", flush=True)
    if options.processes > 1:
        torch.distributed.destroy_process_group()


def save(training: Autoencoding, folder: Path) -> AutoencoderKL:
    """Write the autoencoder as it stands, in fp16, and return it in fp32."""
    made = copy.deepcopy(training).eval()
    made.settle()
    made.vae.half().save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)
    return made.vae.float()


def fit(
    training: Autoencoding, pictures: np.ndarray, features: Judge | None, options: argparse.Namespace, rank: int
) -> None:
    """Train for the given time."""
    training.train()
    groups = muon.groups(training, rate=options.rate, adam_rate=options.rate / 10, ends=("conv_in", "conv_out"))
    optimizer = muon.Muon(groups, rank=rank, world=options.processes)
    parameters = [p for p in training.parameters() if p.requires_grad]
    started = saved = time.monotonic()
    done, step, errors = 0.0, 0, []
    while done < 1:
        factor = min(1.0, (step + 1) / 50) * min(1.0, max(0.02, (1 - done) / (1 - FLAT)))
        for group in optimizer.param_groups:
            group["lr"] = group["usual"] * factor
        chosen = torch.from_numpy(pictures[np.sort(torch.randint(len(pictures), (options.batch,)).numpy())])
        wanted = model.as_tensor(chosen.flip(2) if torch.rand(()) < 0.5 else chosen)
        error = loss(training, wanted, features)
        optimizer.zero_grad()
        error.backward()
        done = agree(parameters, (time.monotonic() - started) / (60 * options.minutes), options.processes)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        errors.append(error.item())
        step += 1
        if rank == 0 and step % 200 == 0:
            print(f"step {step}  {100 * done:.1f} %  loss {sum(errors) / len(errors):.4f}", flush=True)
            errors = []
        if rank == 0 and time.monotonic() - saved > 60 * options.checkpoint_minutes:
            save(training, options.out)
            saved = time.monotonic()
    training.eval()


@torch.no_grad()
def agree(parameters: list[nn.Parameter], share: float, world: int) -> float:
    """Average gradients, and the share of time that is over, so that all processes end together."""
    if world == 1:
        return share
    given = [p for p in parameters if p.grad is not None]
    flat = torch.cat([*(p.grad.flatten() for p in given), torch.tensor([share])]) / world
    torch.distributed.all_reduce(flat)
    for parameter, part in zip(given, flat[:-1].split([p.numel() for p in given]), strict=True):
        parameter.grad = part.view_as(parameter)
    return float(flat[-1])


def loss(training: Autoencoding, pictures: Tensor, features: Judge | None) -> Tensor:
    """Return the weighted absolute and squared error from noised latents, and the judge's error if there is a judge."""
    latents = training.latents(pictures)
    noise = NOISE * torch.rand(len(pictures), 1, 1, 1) ** 2
    found = training.decoded(latents + noise * torch.randn_like(latents))
    difference = (found - pictures).abs()
    error = (detail(pictures) * (difference + difference**2)).mean()
    return error if features is None else error + PERCEPTUAL * perceptual(features, found, pictures)


def detail(pictures: Tensor) -> Tensor:
    """Weigh pixels by how far they are from the mean around them, ``(n, 1, height, width)`` with mean 1."""
    around = nn.functional.avg_pool2d(pictures, 7, stride=1, padding=3, count_include_pad=False)
    edges = (pictures - around).abs().mean(1, keepdim=True).clamp(max=0.5) * 2
    weight = 1 + DETAIL * edges
    return weight / weight.mean()


def perceptual(features: Judge, found: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean squared error of the judge's hidden states, each normalised."""

    def states(pictures: Tensor) -> list[Tensor]:
        scaled = ((pictures + 1) / 2 - judge.MEAN) / judge.SPREAD
        hidden = features.encoder(scaled, output_hidden_states=True).hidden_states
        return [nn.functional.layer_norm(state, state.shape[-1:]) for state in hidden[1:4]]

    with torch.no_grad():
        goal = states(wanted)
    errors = [((a - b) ** 2).mean() for a, b in zip(states(found), goal, strict=True)]
    return torch.stack(errors).mean()


@torch.no_grad()
def quality(vae: AutoencoderKL, pictures: np.ndarray) -> dict[float, float]:
    """Return the mean peak signal-to-noise ratio in decibels, by the noise on the latents."""
    found: dict[float, list[Tensor]] = {0.0: [], 0.2: [], 0.4: []}
    for at in range(0, len(pictures), 64):
        wanted = model.as_tensor(np.array(pictures[at : at + 64]))
        latents = vae.encode(wanted).latent_dist.mode()
        for noise, parts in found.items():
            random = torch.Generator().manual_seed(at)
            noised = latents + noise * torch.randn(latents.shape, generator=random)
            made = vae.decode(noised).sample.clamp(-1, 1)
            parts.append(10 * torch.log10(4 / ((made - wanted) ** 2).mean((1, 2, 3))))
    return {noise: float(torch.cat(parts).mean()) for noise, parts in found.items()}


if __name__ == "__main__":
    main()
