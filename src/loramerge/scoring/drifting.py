"""Drift: how far a LoRA changes pictures that ask for none of what it was trained on."""

import os
from collections.abc import Iterable, Mapping

from ..errors import OptionError, check_callable
from ..files.storage.paths import path_of
from ..files.storage.writer import Progress
from .encoders import Embed, Encoder, encoder_of
from .scores import Cluster, Files, Row, Scores, Shot, Vectors, check_shots, clustering, key_of, shots_of, unit

DRIFT = "drift"
"""Name of the measure in tables, in the place of a reference set's."""


def drift(
    settings: Mapping[str, Files] | Iterable[Shot],
    encoder: Encoder | Embed,
    *,
    base: str = "none",
    cluster: Cluster | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Compare each setting's pictures with the base model's pictures of the same prompt and seed.

    A picture's drift is 1 − cos(e, e₀), in [0, 2], with its embedding e and that of the base's picture e₀: 0 if the
    LoRA changes nothing.  For prompts that ask for none of the LoRAs' concepts it is what a merge costs elsewhere, as
    PEFT's comparison of methods on pictures measures it: https://github.com/huggingface/peft/tree/main/method_comparison.

    Args:
        settings: As in `loramerge.scoring.score`; one of them is the base alone.
        encoder: As there.
        base: Name of the setting without a LoRA.
        cluster: As there.
        cache: As there.
        progress: As there.

    Returns:
        Scores against one reference, ``"drift"``, of all settings but the base; both metrics are the same.

    Raises:
        FileError: As `loramerge.scoring.score`.
        OptionError: There is no setting of that name, or a picture has no counterpart in it.
    """
    check_callable(progress=progress)
    known = encoder_of(encoder)
    shots = list(shots_of(settings) if isinstance(settings, Mapping) else settings)
    check_shots(shots)
    names = list(dict.fromkeys(shot.setting for shot in shots))
    first = {key_of(shot): shot.path for shot in shots if shot.setting == base}
    others = [shot for shot in shots if shot.setting != base]
    if not first or not others:
        raise OptionError(
            f"Drift is measured from {base!r}, by other settings. Settings: {', '.join(names) or 'none at all'}."
        )
    for shot in others:
        if key_of(shot) not in first:
            raise OptionError(
                f"{shot.path}: {base!r} has no picture of the same prompt and seed. Way out: the same prompts and seeds in "
                "every setting, as generate draws them."
            )
    vectors = Vectors(known, None if cache is None else path_of(cache), progress)
    vectors.total = len({shot.path for shot in others} | {first[key_of(shot)] for shot in others})
    theirs = unit(vectors([first[key_of(shot)] for shot in others], None))
    ours = unit(vectors([shot.path for shot in others], None))
    changed = 1 - (ours * theirs).sum(1)
    rows = [Row(shot, DRIFT, float(d), float(d)) for shot, d in zip(others, changed, strict=True)]
    return Scores(known.name, tuple(rows), clustering(cluster, others))
