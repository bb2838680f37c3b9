"""Train the miniature base from nothing.

    pip install torch diffusers transformers tokenizers safetensors numpy pillow

    python -m examples.virtual_tryon.train_autoencoder --minutes 22
    python -m examples.virtual_tryon.train_base --device cuda --minutes 18
    python -m examples.virtual_tryon.train_base --device cpu --processes 2 --minutes 60

The first run draws the data (a few minutes of all cores, once).  The newest model, its sheet of samples and its card are
in ``--out`` from the first checkpoint on; the same command goes on where the last one stopped.
"""

import argparse
import json
import math
import os
import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.multiprocessing
from diffusers import AutoencoderKL, StableDiffusionXLPipeline

from . import cards, judge, model, text_training
from .accuracy import attribute_accuracy
from .model import quiet
from .rendering import CAPTIONS, latent_data
from .sampling import samples
from .training import LOG, Settings, Training, held_out_loss, save_state


def arguments(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train_base", description="Train the miniature base from nothing, or go on.")
    add = parser.add_argument
    add("--out", type=Path, default=Path("build/miniature/base"), help="folder of the model (default: %(default)s)")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--vae", type=Path, help="folder of train_autoencoder (default: one with random values)")
    add("--start", type=Path, help="go on from the weights of this base, with a new optimiser and this run's schedule")
    add("--text-steps", type=int, default=600, help="of the text encoders alone, before all (default: %(default)s)")
    add(
        "--minutes",
        type=float,
        default=math.inf,
        help="of training in all, over all runs; the learning rate falls to nothing at their end",
    )
    add("--samples", type=float, default=math.inf, help="pictures seen in all, over all runs; whichever ends first")
    add("--pause-after", type=float, default=math.inf, metavar="MINUTES", help="stop this run early, to go on later")
    add(
        "--resolution",
        type=int,
        default=model.RESOLUTION,
        help="pixels a side, a multiple of 32 (default: %(default)s)",
    )
    add(
        "--processes",
        type=int,
        default=None,
        help="that draw, and on a CPU train, one thread each (default: 1 on a CPU, all cores with CUDA)",
    )
    add("--batch", type=int, default=None, help="pictures a step and process (default: 48 on a CPU, 512 with CUDA)")
    add("--pictures", type=int, default=None, help="to draw (default: 30000 on a CPU, 200000 with CUDA)")
    add("--held-out", type=int, default=None, help="pictures never trained on (default: 256 on a CPU, 2048 with CUDA)")
    add("--rate", type=float, default=None, help="Muon's learning rate (default: 0.02)")
    add("--warm-up", type=int, default=200, help="steps (default: %(default)s)")
    add("--checkpoint-minutes", type=float, default=3.0, help="(default: %(default)s)")
    add("--sample-steps", type=int, default=20, help="of the sampler, for the sheet (default: %(default)s)")
    add("--scorer", type=Path, help="a folder of train_scorer: report attribute accuracy in the end")
    add("--seed", type=int, default=0)
    add("--compile", action="store_true", help="torch.compile the UNet")
    add("--fresh", action="store_true", help="forget an earlier run in --out")
    options = parser.parse_args(given)
    if math.isinf(options.minutes) and math.isinf(options.samples):
        parser.error("say how long: --minutes, --samples, or both.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU. Use --device cpu.")
    usual = {
        "processes": (1, os.cpu_count() or 1),
        "batch": (48, 512),
        "pictures": (30_000, 200_000),
        "held_out": (256, 2_048),
        "rate": (0.02, 0.02),
    }
    fill(options, usual)
    return options


def fill(options: argparse.Namespace, usual: dict[str, tuple[Any, Any]]) -> None:
    """Fill in the options that were not given: defaults differ between CPU and CUDA."""
    for name, by_device in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, by_device[options.device == "cuda"])


def main(given: list[str] | None = None) -> None:
    given = sys.argv[1:] if given is None else given
    options = arguments(given)
    quiet()
    model.keep_memory()
    prepare(options)
    workers = options.processes if options.device == "cpu" else 1
    if workers == 1:
        work(0, 1, options, given)
    else:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29611")
        torch.multiprocessing.spawn(work, (workers, options, given), nprocs=workers)


def prepare(options: argparse.Namespace) -> None:
    """Make the untrained model and the data once; refuse to mix runs."""
    folder = state_folder(options)
    if options.fresh and (folder / "checkpoint.pt").exists():
        (folder / "checkpoint.pt").unlink()
    lasting = {name: getattr(options, name) for name in ("resolution", "pictures", "held_out", "seed")}
    file = folder / "data.json"
    if file.exists() and (before := json.loads(file.read_text())) != lasting:
        raise SystemExit(
            f"{options.out} holds a run with {before}, not {lasting}. Choose another --out, or delete {folder}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "start" / "model_index.json").exists():
        model.save(beginning(options), folder / "start", dtype=torch.float32)
    file.write_text(json.dumps(lasting))
    started = time.monotonic()
    data(options)
    print(f"data ready after {time.monotonic() - started:.0f} s", flush=True)


def beginning(options: argparse.Namespace) -> StableDiffusionXLPipeline:
    """Return the pipeline that training begins with."""
    if options.start:
        return model.load(options.start)
    vae = AutoencoderKL.from_pretrained(options.vae, dtype=torch.float32) if options.vae else None
    captions = min(20_000, 50 * options.pictures)
    pipeline = model.build(options.resolution, seed=options.seed, captions=captions, vae=vae)
    if options.text_steps:
        text_training.fit(pipeline, steps=options.text_steps, captions=2 * captions, seed=options.seed)
    return pipeline


def state_folder(options: argparse.Namespace) -> Path:
    return options.out.with_name(options.out.name + ".training")


def data(options: argparse.Namespace) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return latents and tokens to train on, and those held out."""
    folder = state_folder(options)
    start, processes = folder / "start", options.processes
    seen = latent_data(start, folder / "seen", options.pictures, seed=options.seed, processes=processes)
    unseen = latent_data(
        start, folder / "unseen", options.held_out, seed=options.seed + model.HELD_OUT_SEED, processes=processes
    )
    return seen, unseen


def work(rank: int, world: int, options: argparse.Namespace, given: list[str]) -> None:
    """Train, in one process of several."""
    quiet()
    model.keep_memory()
    cuda = options.device == "cuda"
    if cuda:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    else:
        torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    settings = Settings(
        batch=options.batch,
        minutes=options.minutes,
        samples=options.samples,
        rate=options.rate,
        warm_up=options.warm_up,
        seed=options.seed,
        bf16=cuda,
    )
    seen, unseen = data(options)
    start = model.load(state_folder(options) / "start", device=options.device)
    if options.compile:
        torch._dynamo.config.suppress_errors = True
    training = Training(start, *seen, settings, device=options.device, rank=rank, world=world, compiled=options.compile)
    train(training, unseen, options, given)
    if world > 1:
        torch.distributed.destroy_process_group()


def train(
    training: Training, unseen: tuple[np.ndarray, np.ndarray], options: argparse.Namespace, given: list[str]
) -> None:
    """Train to the end or the pause, writing checkpoints."""
    file = state_folder(options) / "checkpoint.pt"
    if file.exists():
        training.restore(torch.load(file, map_location=options.device, weights_only=True))
        say(training, f"going on at step {training.progress.step}")
    begun = saved = training.progress.seconds
    while (done := training.progress.share(training.settings)) < 1:
        step(training, file)
        progress = training.progress
        if progress.step % 100 == 0 and training.history:
            line = training.history[-1]
            say(
                training,
                f"step {progress.step}  samples {progress.samples}  {progress.seconds:.0f} s  {100 * done:.1f} %  loss {line['loss']:.4f}",
            )
        if progress.seconds - begun >= 60 * options.pause_after:
            break
        if progress.seconds - saved >= 60 * options.checkpoint_minutes:
            checkpoint(training, unseen, options, given)
            saved = progress.seconds
    done = training.progress.share(training.settings)
    checkpoint(training, unseen, options, given, last=done >= 1)
    say(training, "finished" if done >= 1 else f"paused at {100 * done:.1f} %: the same command goes on")


def step(training: Training, file: Path) -> None:
    """Do one step; if the loss becomes NaN, go back to the checkpoint with half the learning rate."""
    try:
        training.step()
    except FloatingPointError as error:
        if training.world > 1 or not file.exists():
            raise
        training.restore(torch.load(file, map_location=training.device, weights_only=True))
        training.settings = replace(training.settings, rate=training.settings.rate / 2)
        print(f"{error} Going on from step {training.progress.step} with {training.settings.rate:g}.", flush=True)


def say(training: Training, line: str) -> None:
    if training.rank == 0:
        print(line, flush=True)


def checkpoint(
    training: Training,
    unseen: tuple[np.ndarray, np.ndarray],
    options: argparse.Namespace,
    given: list[str],
    *,
    last: bool = False,
) -> None:
    """Write state, model, samples and card, in the first process."""
    training.log()
    state = training.state()
    if training.rank == 0:
        save_state(state, state_folder(options) / "checkpoint.pt")
        publish(training, unseen, options, given, last=last)
    if training.world > 1:
        torch.distributed.barrier()


def publish(
    training: Training,
    unseen: tuple[np.ndarray, np.ndarray],
    options: argparse.Namespace,
    given: list[str],
    *,
    last: bool,
) -> None:
    """Write the averaged model into a folder of its own."""
    pipeline = training.averaged()
    model.save(pipeline, options.out)
    samples(pipeline, steps=options.sample_steps).save(options.out / "samples.png")
    losses = {
        captions: round(held_out_loss(pipeline, *unseen, captions=captions), 4) for captions in ("own", "other", "none")
    }
    print(
        f"held-out loss with own captions {losses['own']}, with others' {losses['other']}, with none {losses['none']}",
        flush=True,
    )
    right = (
        attribute_accuracy(pipeline, judge.load(options.scorer, device=options.device))
        if last and options.scorer
        else None
    )
    record = {
        **({"before": earlier} if (earlier := before(options)) else {}),
        "settings": finite(asdict(training.settings)),
        "progress": vars(training.progress),
        "held_out_loss": losses,
        "history": training.history,
    }
    if right:
        record["attribute_accuracy"] = {"generated": right[0], "drawn": right[1]}
    (options.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    cards.write(card(training, losses, right, options, given), options.out)


def before(options: argparse.Namespace) -> dict[str, Any] | None:
    """Return the record of the run that made the base which this one begins with, if there is one."""
    file = options.start / "training.json" if options.start else None
    return json.loads(file.read_text()) if file and file.is_file() else None


def finite(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value != math.inf}


def card(
    training: Training,
    losses: dict[str, float],
    right: tuple[dict[str, float], dict[str, float]] | None,
    options: argparse.Namespace,
    given: list[str],
) -> str:
    settings, progress = training.settings, training.progress
    recipe = {
        **({"before": began_with(earlier)} if (earlier := before(options)) else {}),
        "pictures seen": f"{progress.samples:,} in {progress.step:,} steps of {settings.batch * training.world}",
        "time": f"{progress.seconds / 60:.1f} minutes on {device_name(training)}",
        "objective": "velocity, mean squared error, uniform times, zero terminal SNR; 10 % of prompts zeros",
        "optimiser": f"Muon, {settings.rate:g}; Adam at a tenth of it for vectors, embeddings, first and last layer; text encoders × 0.5; gradients cut at 1",
        "rate": f"{settings.warm_up} steps of warm-up, cosine to 1 % over the last {100 * (1 - settings.decay_from):.0f} %",
        "average": "EMA 0.999, of which these weights are the values",
        "precision": "bf16 autocast" if settings.bf16 else "float32",
        "seed": settings.seed,
        "torch": torch.__version__,
    }
    results = {
        "own caption": losses["own"],
        "another picture's caption": losses["other"],
        "no caption": losses["none"],
    }
    accuracy = ""
    if right:
        rows = {name: f"{cards.share(right[0][name])} (drawings: {cards.share(right[1][name])})" for name in right[0]}
        accuracy = (
            "Attributes that the judge (`train_scorer.py`) finds as told, in 512 generated pictures:\n\n"
            + cards.table(rows, head=("attribute", "as told"))
        )
    return cards.BASE.format(
        millions=sum(p.numel() for p in training.parameters) / 1e6,
        resolution=options.resolution,
        words=len(training.pipeline.tokenizer),
        pictures=options.pictures,
        captions=CAPTIONS,
        seed=options.seed,
        recipe=cards.table(recipe),
        command=shlex.join(["python", "-m", "examples.virtual_tryon.train_base", *given]),
        curve=cards.curve([line for line in training.history if line["step"] % LOG == 0]),
        results=f"Loss on {options.held_out} drawings never trained on:\n\n"
        + cards.table(results, head=("told", "loss")),
        accuracy=accuracy,
    )


def began_with(record: dict[str, Any]) -> str:
    """Describe the run that this one went on from."""
    progress, minutes = record["progress"], record["settings"].get("minutes")
    of = f" of {minutes:g}" if minutes else ""
    return f"{progress['samples']:,} pictures in {progress['seconds'] / 60:.1f}{of} minutes, with a schedule of its own"


def device_name(training: Training) -> str:
    if training.device == "cuda":
        return torch.cuda.get_device_name()
    return f"{training.world} CPU {'thread' if training.world == 1 else 'threads'}"


if __name__ == "__main__":
    main()
