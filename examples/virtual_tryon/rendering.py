"""Draw pictures in bulk, in several processes, into arrays in a folder."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from . import model
from .tokenizer import MAX_LENGTH
from .world import Picture, caption, draw, labels, sample

CAPTIONS = 4
"""Captions per picture, each leaving out other attributes."""
CHUNK = 250

Given = TypeVar("Given")
Made = TypeVar("Made")


def shown(seed: int, index: int, *, wide: bool = False) -> tuple[Picture, list[str]]:
    """Return picture ``index`` of a data set and its captions, which don't depend on the other pictures."""
    random = np.random.default_rng([seed, 2, index])
    picture = sample(random, wide=wide)
    return picture, [caption(picture, random) for _ in range(CAPTIONS)]


def picture_data(folder: Path, count: int, *, resolution: int, seed: int, processes: int) -> np.ndarray:
    """Return the pictures of a captioned data set, uint8, drawn once and then read from its folder.

    Shape ``(count, resolution, resolution, 3)``; picture i is that of :func:`shown`.
    """
    pictures = ("pictures", np.uint8, (count, resolution, resolution, 3))
    with arrays(folder, pictures) as (made, files):
        if not made:
            work = partial(draw_chunk, resolution=resolution, seed=seed)
            for at, drawn in in_parallel(work, chunks(count), processes):
                files[0][at : at + len(drawn)] = drawn
    return files[0]


def latent_data(start: Path, folder: Path, count: int, *, seed: int, processes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return latents and token ids of a captioned data set, made once and then read from its folder.

    Args:
        start: Folder of the untrained pipeline, whose autoencoder and tokenizers are used.
        folder: Where the arrays are kept; the pictures go to ``folder / "drawn"``.
        count: Of pictures.
        seed: Of the data set.
        processes: Draw and encode at the same time.

    Returns:
        Latents, float16, shape ``(count, channels, height, width)``, and token ids, uint16, shape
        ``(count, CAPTIONS, 2, MAX_LENGTH)``, of both tokenizers.
    """
    vae = model.load(start).vae
    size, side = vae.config.sample_size, vae.config.sample_size // model.PATCH
    picture_data(folder / "drawn", count, resolution=size, seed=seed, processes=processes)
    latents = ("latents", np.float16, (count, vae.config.latent_channels, side, side))
    tokens = ("tokens", np.uint16, (count, CAPTIONS, 2, MAX_LENGTH))
    with arrays(folder, latents, tokens) as (made, files):
        if not made:
            work = partial(encode_chunk, start=start, drawn=folder / "drawn" / "pictures.npy", seed=seed)
            for at, (z, ids) in in_parallel(work, chunks(count), processes):
                files[0][at : at + len(z)], files[1][at : at + len(z)] = z, ids
    return files[0], files[1]


def label_data(
    folder: Path, count: int, values: dict[str, list[str]], *, resolution: int, seed: int, processes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return pictures of the wider world, uint8, and the index of each attribute's value, int64, -1 if unseen."""
    pictures = ("pictures", np.uint8, (count, resolution, resolution, 3))
    numbers = ("labels", np.int64, (count, len(values)))
    with arrays(folder, pictures, numbers) as (made, files):
        if not made:
            work = partial(label_chunk, values=values, resolution=resolution, seed=seed)
            for at, (drawn, labelled) in in_parallel(work, chunks(count), processes):
                files[0][at : at + len(drawn)], files[1][at : at + len(drawn)] = drawn, labelled
    return files[0], files[1]


@contextmanager
def arrays(folder: Path, *specifications: tuple[str, type, tuple[int, ...]]) -> Iterator[tuple[bool, list[np.ndarray]]]:
    """Open arrays on disk; return whether an earlier run has filled them, which a marker file says."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / "complete"
    wanted = repr([(name, shape) for name, _, shape in specifications])
    made = mark.exists() and mark.read_text() == wanted
    mode = "r" if made else "w+"
    files = [
        np.lib.format.open_memmap(folder / f"{n}.npy", mode, *(() if made else (d, s))) for n, d, s in specifications
    ]
    yield made, files
    if not made:
        for file in files:
            file.flush()
        mark.write_text(wanted)


def chunks(count: int) -> list[range]:
    return [range(at, min(at + CHUNK, count)) for at in range(0, count, CHUNK)]


def in_parallel(work: Callable[[range], Made], jobs: list[range], processes: int) -> Iterable[tuple[int, Made]]:
    """Yield the start of each job and its result, in order."""
    starts = [job.start for job in jobs]
    if processes == 1:
        yield from zip(starts, map(work, jobs), strict=True)
        return
    with multiprocessing.get_context("spawn").Pool(processes, ready) as pool:
        yield from zip(starts, pool.imap(work, jobs), strict=True)
        pool.close()
        pool.join()


def ready() -> None:
    """Prepare a drawing process."""
    torch.set_num_threads(1)
    model.quiet()


def draw_chunk(job: range, *, resolution: int, seed: int) -> np.ndarray:
    return np.stack([draw(shown(seed, index)[0], resolution) for index in job])


@torch.no_grad()
def encode_chunk(job: range, *, start: Path, drawn: Path, seed: int) -> tuple[np.ndarray, np.ndarray]:
    pipeline = model.load(start)
    pictures = model.as_tensor(np.array(np.load(drawn, mmap_mode="r")[job.start : job.stop]))
    texts = [text for index in job for text in shown(seed, index)[1]]
    ids = torch.stack(model.token_ids(pipeline, texts), 1)
    latents = pipeline.vae.encode(pictures).latent_dist.mode() * pipeline.vae.config.scaling_factor
    return latents.half().numpy(), ids.numpy().astype(np.uint16).reshape(len(job), CAPTIONS, 2, MAX_LENGTH)


def label_chunk(
    job: range, *, values: dict[str, list[str]], resolution: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    found = [shown(seed, index, wide=True)[0] for index in job]
    numbers = [label_numbers(labels(picture), values) for picture in found]
    return np.stack([draw(picture, resolution) for picture in found]), np.array(numbers)


def label_numbers(named: dict[str, str | None], values: dict[str, list[str]]) -> list[int]:
    return [-1 if (value := named[name]) is None else known.index(value) for name, known in values.items()]
