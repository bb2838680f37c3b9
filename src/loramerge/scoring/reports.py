"""Files of scores: JSON with everything, CSV tables for spreadsheets."""

import csv
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..files.storage.paths import path_of
from ..files.storage.scratch import make_folder
from ..files.storage.texts import as_json
from ..files.storage.writer import write_text
from .bootstrap import Interval
from .scores import Metric, Row, Scores

METRICS: tuple[Metric, ...] = ("cosine", "pairwise")


def save_scores(all_scores: Sequence[Scores], folder: str | os.PathLike[str]) -> list[Path]:
    """Write ``scores.json``, ``scores.csv``, ``differences.csv`` and ``images.csv``.

    Args:
        all_scores: One per encoder.
        folder: Created if it is missing.

    Raises:
        FileError: It can't be written.
    """
    folder = make_folder(path_of(folder))
    data = [to_dict(scores) for scores in all_scores]
    texts = {
        "scores.json": as_json(data, 1),
        **{f"{name}.csv": _csv([row for entry in data for row in _lines(entry, name)]) for name in TABLES},
    }
    for name, text in texts.items():
        write_text(folder / name, text + "\n" * (not text.endswith("\n")))
    return [folder / name for name in texts]


TABLES = ("scores", "differences", "images")


def to_dict(scores: Scores) -> dict[str, Any]:
    """Return scores, differences and images as plain data."""
    return {
        "encoder": scores.encoder,
        "cluster": scores.cluster,
        "scores": [_both(scores.mean, s, r) for s in scores.settings for r in scores.references],
        "differences": [
            _both(scores.difference, s, other, r) for s, other in scores.paired() for r in scores.references
        ],
        "images": [_image(row) for row in scores.rows],
    }


def _both(measure: Callable[..., Interval], *names: str) -> dict[str, Any]:
    """Return one row of a table: names, then both metrics with their intervals."""
    found = {metric: measure(*names, metric) for metric in METRICS}
    labels = ("setting", "reference") if len(names) == 2 else ("setting", "minus", "reference")
    figures = {
        f"{metric}{suffix}": value
        for metric, i in found.items()
        for suffix, value in (("", i.mean), ("_low", i.low), ("_high", i.high))
    }
    any_one = found["cosine"]
    return {**dict(zip(labels, names, strict=True)), **figures, "images": any_one.values, "clusters": any_one.clusters}


def _image(row: Row) -> dict[str, Any]:
    shot = row.shot
    return {
        "setting": shot.setting,
        "prompt": shot.prompt,
        "seed": shot.seed,
        "file": str(shot.path),
        "reference": row.reference,
        "cosine": row.cosine,
        "pairwise": row.pairwise,
    }


def _lines(entry: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [{"encoder": entry["encoder"], **line} for line in entry[name]]


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
