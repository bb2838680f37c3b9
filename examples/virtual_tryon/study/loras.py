"""The stages ``train`` and ``merge``: one LoRA per set, and one per setting."""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import loramerge as lm
from loramerge import LoRA
from loramerge.errors import LoRAMergeError
from loramerge.files import file_digest, make_folder
from loramerge.scoring import captioned, digest

from . import bases
from .job import Job, needed
from .ledger import fingerprint, versions
from .protocol import Setting

LIBRARIES = ("torch", "diffusers", "peft", "transformers")


def train(job: Job, name: str) -> bool:
    """Train the LoRA of a set, resuming from its checkpoint if there is one."""
    from loramerge.diffusion import TrainSettings, train_lora

    protocol, target = job.protocol, job.lora_file(name)
    folder = needed(job.set_folder(name), "data")
    found = fingerprint(
        protocol.training,
        job.base_digest,
        digest(captioned(folder)),
        job.device,
        versions(*LIBRARIES),
    )
    if job.ledger.has(f"loras/{name}", found, [target]):
        return False
    make_folder(target.parent)
    checkpoint = target.with_name(f"{name}-{found[:8]}.checkpoint")
    given = asdict(protocol.training)
    denoiser = bases.denoiser(protocol.base, job.device, checkpointing=given.pop("checkpointing"))
    settings = TrainSettings(**given)
    lora = train_lora(denoiser, folder, settings=settings, checkpoint=checkpoint, every=100, name=name)
    with job.ledger.making(f"loras/{name}", found):
        lm.save(lora, target)
    _remove(checkpoint)
    return True


def _remove(checkpoint: Path) -> None:
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint)
    checkpoint.unlink(missing_ok=True)


def load(job: Job, name: str) -> LoRA:
    """Load the LoRA of a set, or an existing one that the protocol names."""
    return lm.load(job.given(name) or needed(job.lora_file(name), "train"), architecture=job.protocol.base.architecture)


def given(job: Job) -> Iterator[LoRA]:
    """Open the existing LoRAs that the protocol names, one after the other.

    Raises:
        LoRAMergeError: One is missing, or isn't a LoRA.
    """
    for name in job.loras:
        source = job.given(name)
        if source:
            yield _opened(name, source, job.protocol.base.architecture)


def _opened(name: str, source: str, architecture: str) -> LoRA:
    try:
        return lm.open(source, architecture=architecture)
    except LoRAMergeError as error:
        whose = "of a setting" if name == source else f"of {name}"
        raise type(error)(f"The protocol's LoRA {whose}: {error}") from None


def merged(job: Job, setting: Setting) -> LoRA | None:
    """Load the LoRA of a setting; None for the base alone."""
    if not setting.loras:
        return None
    if not setting.merges:
        return load(job, setting.loras[0])
    return lm.load(needed(job.merge_file(setting), "merge"), architecture=job.protocol.base.architecture)


def merge(job: Job, setting: Setting) -> bool:
    """Merge the LoRAs of a setting; return False for the base alone, or one unchanged LoRA."""
    if not setting.merges:
        return False
    loras, target = [load(job, name) for name in setting.loras], job.merge_file(setting)
    how = (setting.method, setting.weights, setting.options, setting.learn)
    found = fingerprint(
        how,
        _code(setting.method),
        [lora.sha256 for lora in loras],
        versions(),
        _data(job, setting) if setting.learn else None,
    )
    if job.ledger.has(f"merges/{setting.name}", found, [target]):
        return False
    make_folder(target.parent)
    lora = _learned(job, setting, loras) if setting.learn else _computed(setting, loras)
    with job.ledger.making(f"merges/{setting.name}", found):
        lm.save(lora, target)
    return True


def _code(method: str) -> str | None:
    """Hash the file of a method that isn't loramerge's own."""
    module, colon, _ = method.partition(":")
    if not colon:
        return None
    with suppress(ImportError, ValueError):  # the merge says so
        spec = find_spec(module)
        return file_digest(Path(spec.origin)) if spec and spec.origin else None
    return None


def _computed(setting: Setting, loras: list[LoRA]) -> LoRA:
    weights = list(setting.weights) if isinstance(setting.weights, tuple) else setting.weights
    return lm.merge(loras, weights=weights, method=setting.method, **setting.options)


def _data(job: Job, setting: Setting) -> Any:
    """Return what a learned merge depends on besides the LoRAs."""
    sets = [digest(captioned(needed(job.set_folder(name), "data"))) for name in setting.loras]
    return job.base_digest, sets, job.protocol.training, job.device, versions(*LIBRARIES)


def _learned(job: Job, setting: Setting, loras: list[LoRA]) -> LoRA:
    """Learn a merge on the base, from the pictures that the LoRAs were trained on."""
    from loramerge.diffusion import from_images, within_memory

    training = job.protocol.training
    denoiser = bases.denoiser(job.protocol.base, job.device, checkpointing=training.checkpointing)
    denoiser.check(loras)
    folders = [job.set_folder(name) for name in setting.loras]
    examples = int(setting.options.get("batch_size", 1))
    with within_memory(training.resolution or denoiser.resolution, examples, len(loras)):
        draw = from_images(denoiser, folders, resolution=training.resolution, flip=training.flip)
        denoiser.release()
        learn = _by_gradient if setting.learn == "ziplora" else _in_closed_form
        return learn(denoiser, loras, draw, {"seed": training.seed, **setting.options})


def _by_gradient(denoiser: Any, loras: list[LoRA], draw: Any, options: dict[str, Any]) -> LoRA:
    from loramerge.learned import settings, ziplora

    return ziplora(denoiser.predict, denoiser.models, loras, draw, settings(**options)).lora


def _in_closed_form(denoiser: Any, loras: list[LoRA], draw: Any, options: dict[str, Any]) -> LoRA:
    from loramerge.learned import calibrate, lsq

    kind: Any = "gram" if options.get("granularity") in ("column", "full") else "core"
    given = {key: options.pop(key) for key in ("batches", "batch_size", "seed") if key in options}
    moments = calibrate(denoiser.predict, denoiser.models, loras, draw, kind=kind, **given)
    return lsq(loras, moments, **options)[0]
