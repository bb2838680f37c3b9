"""The marks by which training runs differ: modules, ranks, and the entries of headers that stay the same during a run."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from ..errors import MergeError, OptionError
from ..files.lora import LoRA
from ..files.metadata import RECIPE, inputs_of
from ..files.storage.texts import as_json, said

Header = Mapping[str, str]

WAY_OUT = "Way out: 'loramerge merge', for LoRAs of several runs."

TRAINING = "loramerge.training"

LONGEST = 100
"""The most characters of two values that a message shows."""

SAME = (
    "ss_session_id",
    "ss_training_started_at",
    "ss_output_name",
    "name",
    "ss_seed",
    "ss_sd_model_hash",
    "ss_new_sd_model_hash",
    "ss_sd_model_name",
    "ss_dataset_dirs",
    "ss_datasets",
    "ss_tag_frequency",
)
"""Entries that all checkpoints of a run have alike, the surest first: kohya's draws a random number at each start.

Sources: kohya-ss/sd-scripts, train_network.py; musubi-tuner, hv_train_network.py; ostris/ai-toolkit, toolkit/metadata.py
"""


def _entries(header: Header) -> dict[str, str]:
    """Return what all checkpoints of a run have alike; empty texts where a header doesn't say it."""
    record = said(header.get(TRAINING))
    settings = record.get("settings")
    lasting = {k: v for k, v in settings.items() if k != "steps"} if isinstance(settings, dict) else None
    return {
        **{key: header.get(key, "") for key in SAME},
        TRAINING: as_json([lasting, record.get("trained_on")]) if record else "",
        "modelspec.title": re.sub(r"\d+", "#", header.get("modelspec.title", "")),  # people put the step there
    }


def check_once(checkpoints: Sequence[object]) -> None:
    """Refuse a checkpoint that is given twice: it would count twice.

    Raises:
        OptionError: One is.
    """
    for first, second in combinations(checkpoints, 2):
        if first is second or _path(first) == _path(second) is not None:
            name = second.name if isinstance(second, LoRA) else second
            raise OptionError(f"{name} is given twice, and would count twice. Way out: each checkpoint once.")


def _path(given: object) -> str | None:
    """Return where a path leads, links followed; None if it isn't one."""
    return os.path.realpath(given) if isinstance(given, str | os.PathLike) else None


def check_one_run(loras: Sequence[LoRA], names: Sequence[str], allow_resumed: bool = False) -> list[str]:
    """Refuse LoRAs that can't be checkpoints of one run; return notes on what can't be told.

    Args:
        loras: The LoRAs.
        names: Their names, for messages.
        allow_resumed: Take LoRAs whose headers are of different runs.

    Raises:
        MergeError: One was merged from several, or their modules, ranks or headers differ.
    """
    for lora, name in zip(loras, names, strict=True):
        parents = [str(entry.get("name")) for entry in inputs_of(said(lora.metadata.get(RECIPE)))]
        if len(parents) > 1:
            raise MergeError(
                f"{name} isn't a checkpoint: it was itself merged from {parents[0]} and {len(parents) - 1} more. Way out: leave "
                "it out, and write averages outside of the run's directory."
            )
        _check_layers(loras[0], lora, names[0], name)
    entries = [_entries(lora.metadata) for lora in loras]
    found = next(_differing(entries, names), None)
    if found is None:
        told = any(all(values) for values in zip(*(each.values() for each in entries), strict=True))
        return [] if told else ["the files' metadata don't say whether they are of one run"]
    if not allow_resumed:
        raise MergeError(
            f"Not checkpoints of one run: {found}. {WAY_OUT} For one that was resumed or renamed, (allow_resumed)."
        )
    return [f"taken for one run, though {found}"]


def _check_layers(first: LoRA, lora: LoRA, first_name: str, name: str) -> None:
    """Refuse two LoRAs with different modules or ranks."""
    for module in {*first} ^ {*lora}:
        has, lacks = (first_name, name) if module in first else (name, first_name)
        raise MergeError(f"Not checkpoints of one run: {has} has the module {module}, {lacks} lacks it. {WAY_OUT}")
    for module in first:
        ranks = first.layout(module).rank, lora.layout(module).rank
        if ranks[0] != ranks[1]:
            raise MergeError(
                f"Not checkpoints of one run: {module} has rank {ranks[0]} in {first_name} and {ranks[1]} in {name}. {WAY_OUT}"
            )


def _differing(entries: Sequence[Mapping[str, str]], names: Sequence[str]) -> Iterator[str]:
    """Yield the entries that two files have, and have different."""
    for key in entries[0]:
        (name, value), *others = [(n, e[key]) for n, e in zip(names, entries, strict=True) if e[key]] or [("", "")]
        for other, its in others:
            if its != value:
                shown = f" ({value} and {its})" if len(value + its) < LONGEST else ""
                yield f"{key} of {name} and {other} differ{shown}"
                break
