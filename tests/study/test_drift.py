"""Kept against drift: which merges no other beats, and LoRAs that are trained beside others."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

import loramerge as lm
from loramerge.errors import OptionError
from loramerge.learned.gates import read
from loramerge.scoring import Interval
from study import stand_ins
from virtual_tryon.study import drawing, drift, loras, stages
from virtual_tryon.study.figures import Point, front, plane
from virtual_tryon.study.job import Job
from virtual_tryon.study.protocol import Beside, Drift


def at(across: float, up: float, label: str = "") -> Point:
    return Point(label, Interval(across, None, None, 1, 1), Interval(up, None, None, 1, 1))


@pytest.mark.parametrize("seed", range(5))
def test_a_point_is_on_the_front_if_no_other_is_better_in_both(seed: int) -> None:
    random = np.random.default_rng(seed)
    points = [at(*pair) for pair in random.integers(0, 6, (30, 2)).tolist()]

    kept = front(points)

    pairs = np.array([(p.across.mean, -p.up.mean) for p in points])
    for point, own in zip(points, pairs, strict=True):
        beaten = ((pairs <= own).all(1) & (pairs < own).any(1)).any()
        assert (point in kept) != beaten


def test_the_plane_names_every_point_and_joins_the_front() -> None:
    shown = plane([at(0.1, 0.5, "first"), at(0.2, 0.4, "dominated")], across="drift", up="kept")

    assert all(text in shown for text in ("1  first", "2  dominated", "drift", "kept"))


@pytest.fixture(scope="module")
def job(folder: Path, miniature: StableDiffusionXLPipeline, tmp_path_factory: pytest.TempPathFactory) -> Job:
    place = tmp_path_factory.mktemp("beside")
    scorer = stand_ins.scorer(place / "scorer", miniature.vae.config.sample_size)
    given = stand_ins.mini(folder, scorer)
    given = replace(given, training=replace(given.training, learning_rate=0.05))
    job = stand_ins.job(given, place / "out", "methods", "composed")
    stages.run(job)
    return job


def downs(job: Job, name: str) -> dict[str, np.ndarray]:
    return {
        module: np.asarray(layer.down).reshape(len(layer.down), -1) for module, layer in loras.load(job, name).items()
    }


def test_a_lora_off_another_ones_inputs_is_at_right_angles_to_them_and_one_beside_it_is_not_the_same(job: Job) -> None:
    first, alone, beside, off = (downs(job, name) for name in ("profile", "barca", "barca_beside", "barca_off_rows"))

    def along(mine: np.ndarray, theirs: np.ndarray) -> float:
        rows = np.linalg.qr(theirs.T)[0]
        return float(np.linalg.norm(mine @ rows) / np.linalg.norm(mine))

    assert max(along(off[m], first[m]) for m in first) < 1e-5
    assert min(along(alone[m], first[m]) for m in first) > 1e-2
    assert any(not np.array_equal(alone[m], beside[m]) for m in first)


def test_drift_is_in_the_report_for_settings_with_loras(job: Job) -> None:
    found = drift.read(job, "study")

    assert found.keys() == {"profile", "barca", "weighted", "beside", "off_rows", "gates"}
    assert all(0 <= value.mean <= 2 for value in found.values())
    page = (job.out / "report.html").read_text()
    assert "Kept against drift" in page


def test_gates_are_learned_once_and_pictures_follow_them(job: Job) -> None:
    gates = job.protocol.setting("mole")
    assert not loras.merge(job, (gates, 0))
    before = [stand_ins.pixels(shot.path) for shot in job.shots(gates)]
    assert not drawing.draw(job, gates)

    file = job.merge_file(gates)
    found = read(file)
    for weights in found.weights.values():
        weights.mul_(-20).add_(torch.randn(weights.shape, generator=torch.Generator().manual_seed(0)))
    found.save(file)

    assert drawing.draw(job, gates)
    assert [stand_ins.pixels(shot.path) for shot in job.shots(gates)] != before


def test_a_change_of_the_first_lora_trains_those_beside_it_again(job: Job) -> None:
    kept = [piece for piece in loras.later_trainings(job) if loras.train(job, piece)]
    assert kept == []

    file = job.lora_file("profile")
    lm.save(lm.merge([lm.load(file, architecture="sdxl")], weights=[0.5]), file)

    later = loras.later_trainings(job)
    assert [piece for piece in later if loras.train(job, piece)] == [piece for piece in later if piece[1] == 0]


def test_what_cannot_be_is_told(folder: Path, tmp_path: Path) -> None:
    given = stand_ins.mini(folder, tmp_path)

    with pytest.raises(OptionError, match="asks for psq-person"):
        replace(given, drift=Drift(prompts=("A portrait of a psq-person.",)))
    with pytest.raises(OptionError, match="prompts: got 0"):
        Drift()
    with pytest.raises(OptionError, match="No concept is called 'nobody'"):
        replace(given, beside=(Beside(name="late", own="barca", first="nobody"),))
