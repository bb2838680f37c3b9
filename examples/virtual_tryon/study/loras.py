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
from loramerge.learned import BlockGates
from loramerge.scoring import captioned, digest

from . import bases
from .job import Job, needed
from .ledger import fingerprint, versions
from .protocol import Setting, Training

LIBRARIES = ("torch", "diffusers", "peft", "transformers")


def trainings(job: Job) -> list[tuple[str, int]]:
    """List the sets to train on alone, each with the number of the training."""
    return [(name, repeat) for repeat in job.repeats for name in job.untrained if not job.beside(name)]


def later_trainings(job: Job) -> list[tuple[str, int]]:
    """List those that are trained beside a LoRA of `trainings`."""
    return [(name, repeat) for repeat in job.repeats for name in job.untrained if job.beside(name)]


def merges(job: Job) -> list[tuple[Setting, int]]:
    """List the settings with LoRAs, each with the number of the training."""
    return [(setting, repeat) for repeat in job.repeats for setting in job.settings if setting.loras]


def settings_of(training: Training, repeat: int) -> dict[str, Any]:
    """Return the options of one of the repeated trainings."""
    given = asdict(training) | {"seed": training.seed + repeat}
    del given["repeats"]
    return given


def train(job: Job, piece: tuple[str, int]) -> bool:
    """Train a LoRA of a set, resuming from its checkpoint if there is one."""
    from loramerge.diffusion import TrainSettings, train_lora

    name, repeat = piece
    protocol, target = job.protocol, job.lora_file(name, repeat)
    folder = needed(job.set_folder(name), "data")
    given = settings_of(protocol.training, repeat)
    beside = job.beside(name)
    first = load(job, beside.first, repeat) if beside else None
    found = fingerprint(
        given,
        *([beside, first.sha256] if first else []),
        job.base_digest,
        digest(captioned(folder)),
        job.device,
        versions(*LIBRARIES),
    )
    if job.ledger.has(f"loras/{target.stem}", found, [target]):
        return False
    make_folder(target.parent)
    checkpoint = target.with_name(f"{target.stem}-{found[:8]}.checkpoint")
    denoiser = bases.denoiser(protocol.base, job.device, checkpointing=given.pop("checkpointing"))
    settings = TrainSettings(**given)
    off_rows = beside is not None and beside.off_rows
    lora = train_lora(
        denoiser,
        folder,
        settings=settings,
        checkpoint=checkpoint,
        every=100,
        name=name,
        beside=first,
        off_rows=off_rows,
    )
    with job.ledger.making(f"loras/{target.stem}", found):
        lm.save(lora, target)
    _remove(checkpoint)
    return True


def _remove(checkpoint: Path) -> None:
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint)
    checkpoint.unlink(missing_ok=True)


def load(job: Job, name: str, repeat: int = 0) -> LoRA:
    """Load the LoRA of a set, or an existing one that the protocol names."""
    file = job.given(name) or needed(job.lora_file(name, repeat), "train")
    return lm.load(file, architecture=job.protocol.base.architecture)


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


def merged(job: Job, setting: Setting, repeat: int) -> LoRA | None:
    """Load the LoRA of a setting; None for the base alone."""
    if not setting.loras:
        return None
    if not setting.merges:
        return load(job, setting.loras[0], repeat)
    return lm.load(needed(job.merge_file(setting, repeat), "merge"), architecture=job.protocol.base.architecture)


def merge(job: Job, piece: tuple[Setting, int]) -> bool:
    """Merge the LoRAs of a setting; return False for one unchanged LoRA."""
    setting, repeat = piece
    if not setting.merges:
        return False
    loras, target = [load(job, name, repeat) for name in setting.loras], job.merge_file(setting, repeat)
    how = (setting.method, setting.weights, setting.options, setting.learn)
    found = fingerprint(
        how,
        _code(setting.method),
        [lora.sha256 for lora in loras],
        versions(),
        _data(job, setting, repeat) if setting.learn else None,
    )
    if job.ledger.has(f"merges/{target.stem}", found, [target]):
        return False
    make_folder(target.parent)
    made = _learned(job, setting, loras, repeat) if setting.learn else _computed(setting, loras)
    with job.ledger.making(f"merges/{target.stem}", found):
        made.save(target) if isinstance(made, BlockGates) else lm.save(made, target)
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


def _data(job: Job, setting: Setting, repeat: int) -> Any:
    """Return what a learned merge depends on besides the LoRAs."""
    sets = [digest(captioned(needed(job.set_folder(name), "data"))) for name in setting.loras]
    given = settings_of(job.protocol.training, repeat)
    return job.base_digest, sets, given, job.device, versions(*LIBRARIES)


def _learned(job: Job, setting: Setting, loras: list[LoRA], repeat: int) -> LoRA | BlockGates:
    """Learn a merge, or gates, on the base from the pictures that the LoRAs were trained on."""
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
        return learn(denoiser, loras, draw, {"seed": training.seed + repeat, **setting.options})


def _by_gradient(denoiser: Any, loras: list[LoRA], draw: Any, options: dict[str, Any]) -> LoRA | BlockGates:
    from loramerge.learned import mole, settings, ziplora

    chosen = settings(**options)
    if chosen.gates == "input":
        return mole(denoiser.predict, denoiser.models, loras, draw, chosen)
    return ziplora(denoiser.predict, denoiser.models, loras, draw, chosen).lora


def _in_closed_form(denoiser: Any, loras: list[LoRA], draw: Any, options: dict[str, Any]) -> LoRA:
    from loramerge.learned import calibrate, lsq

    kind: Any = "gram" if options.get("granularity") in ("column", "full") else "core"
    given = {key: options.pop(key) for key in ("batches", "batch_size", "seed") if key in options}
    moments = calibrate(denoiser.predict, denoiser.models, loras, draw, kind=kind, **given)
    return lsq(loras, moments, **options)[0]
