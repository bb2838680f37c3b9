"""Metadata of a trained LoRA: ModelSpec, kohya's ``ss_`` entries, and every setting."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from ..._version import __version__
from ...files.architectures.labels import label_of
from ...files.storage.texts import as_json
from .settings import TrainSettings

KEY = "loramerge.training"
"""Key of the training record: all settings, the base model, the data's SHA-256, versions."""

LIBRARIES = ("torch", "diffusers", "peft", "transformers")


def described(
    settings: TrainSettings,
    about: Mapping[str, Any],
    architecture: str | None,
    steps: int,
    name: str,
    trigger: str | None,
) -> dict[str, str]:
    """Return the metadata for a file's header.

    Args:
        settings: The training settings.
        about: The base model, its precision, the data and the number of processes.
        architecture: Name of the family.
        steps: Number of steps done.
        name: The LoRA's title.
        trigger: The trigger word.
    """
    training = {
        "loramerge": __version__,
        "libraries": {library: version(library) for library in LIBRARIES},
        "settings": settings.described() | {"steps": steps},
        "trained_on": dict(about),
    }
    found = {
        "format": "pt",
        **_specification(about, architecture, name, trigger),
        **_kohya(settings, about, architecture, steps),
        KEY: as_json(training),
    }
    return {key: value for key, value in found.items() if value}


def _specification(
    about: Mapping[str, Any], architecture: str | None, name: str, trigger: str | None
) -> dict[str, str]:
    """Return entries of https://github.com/Stability-AI/ModelSpec, without a date: the same run gives the same file."""
    side = about["data"]["resolution"]
    velocity = about["prediction"] == "v_prediction"
    label = label_of(architecture)
    family = label.specifications[0] if label else architecture or ""
    if label and label.v2 == "True":
        family += "-768-v" if velocity else "-512"
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{family}/lora" if family else "",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": {"v_prediction": "v", "epsilon": "epsilon"}.get(about["prediction"], ""),
        "modelspec.trigger_phrase": trigger or "",
    }


def _kohya(settings: TrainSettings, about: Mapping[str, Any], architecture: str | None, steps: int) -> dict[str, str]:
    """Return the entries that kohya-ss/sd-scripts, train_network.py, writes."""
    data, text = about["data"], about["text_encoders"]
    label = label_of(architecture)
    pictures = data["images"]
    batch = settings.batch_size * about["processes"]
    found = {
        "ss_network_module": label.module if label else "networks.lora",
        "ss_network_dim": settings.rank,
        "ss_network_alpha": f"{settings.scale * settings.rank:g}",
        "ss_network_dropout": settings.dropout or None,
        "ss_base_model_version": label.versions[0] if label else architecture,
        "ss_sd_model_name": about["base"],
        "ss_learning_rate": settings.learning_rate,
        "ss_unet_lr": settings.learning_rate,
        "ss_text_encoder_lr": settings.learning_rate if text else None,
        "ss_lr_scheduler": settings.schedule,
        "ss_lr_warmup_steps": settings.warm_up,
        "ss_optimizer": f"torch.optim.adamw.AdamW(weight_decay={settings.weight_decay:g})",
        "ss_max_grad_norm": settings.max_grad_norm,
        "ss_max_train_steps": settings.steps,
        "ss_steps": steps,
        "ss_num_train_images": pictures[0]["count"],
        "ss_num_reg_images": sum(place["count"] for place in pictures[1:]),
        "ss_prior_loss_weight": settings.prior_weight if settings.prior is not None else None,
        "ss_batch_size_per_device": settings.batch_size,
        "ss_total_batch_size": batch * settings.accumulate,
        "ss_gradient_accumulation_steps": settings.accumulate,
        "ss_epoch": steps * batch * settings.accumulate // pictures[0]["count"],
        "ss_resolution": f"({data['resolution']}, {data['resolution']})",
        "ss_min_snr_gamma": settings.snr_gamma,
        "ss_mixed_precision": {"bfloat16": "bf16", "float16": "fp16"}.get(
            about["autocast"] or about["precision"], "no"
        ),
        "ss_cache_latents": True,
        "ss_seed": settings.seed,
    }
    return {key: str(value) for key, value in found.items() if value is not None}
