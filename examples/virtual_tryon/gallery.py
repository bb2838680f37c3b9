"""Draw the pictures of the README and the docs from a run of the study in miniature, nothing selected.

python -m examples.virtual_tryon.gallery build/study/mini docs

The run must have the settings of ``--extended methods many composed``.
"""

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from loramerge.scoring import Shot, save_sheet

from .study import scores
from .study.job import Job
from .study.reading import preset, read
from .study.sets import TRUE

PLACES = {0: "smiling at the camera", 1: "to the side", 2: "selfie, shoes", 3: "in front of a wall", 4: "ball, field"}
"""The study's prompts, in short."""
STUDY = {
    "none": "base",
    "profile": "person's LoRA",
    "barca": "jersey's LoRA",
    "weighted": "merged: average",
    "ziplora": "merged: ZipLoRA",
    "sum": "merged: sum",
    f":{TRUE}": "drawn truth",
}
THREE = {
    "three_sum": "merged: sum",
    "three_np": "merged: NP-LoRA",
    "three_regions": "composed: regions",
    "three_blend": "composed: blend",
    f":{TRUE}": "drawn truth",
}
FRONT = {"person": "profile", "jersey": "barca", "both": "sum"}
"""Pictures of the docs' first page, and the settings that they are of."""


def main(out: Path, docs: Path) -> None:
    job = Job(protocol=read(preset("mini")), out=out, families=("study", "methods", "many", "composed"))
    study = list(shots(job, "study", STUDY, (0, 3, 4)))
    save_sheet(study, docs / "tutorial" / "study.png", side=192)
    save_sheet(list(shots(job, "scarf", THREE, range(5))), docs / "explanation" / "compose.png", side=144)
    first = {shot.setting: shot.path for shot in study if shot.prompt == PLACES[0]}
    for name, setting in FRONT.items():
        shutil.copyfile(first[STUDY[setting]], docs / "merge" / f"{name}.png")


def shots(job: Job, group: str, rows: Mapping[str, str], columns: Sequence[int]) -> Iterator[Shot]:
    """Yield the picture of seed 0 of each setting and prompt, under short names."""
    prompts = job.protocol.prompts[group]
    for name, label in rows.items():
        found = {(shot.prompt, shot.seed): shot for shot in scores.shots_of(job, (group, name))}
        for column in columns:
            yield replace(found[prompts[column], 0], setting=label, prompt=PLACES[column])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
