"""The leaderboard on tiny untrained models: its measures obey their laws, and anyone's method takes part."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import StableDiffusionXLPipeline

from loramerge.errors import OptionError
from study import stand_ins
from virtual_tryon.study import drift, leaderboard, noise, stages
from virtual_tryon.study.job import Job
from virtual_tryon.study.leaderboard import AGAINST, ENTRIES, MEASURES, Entry

OWN = """
from loramerge.merging.methods import combination

@combination("first", source="a test")
def first(products, weights):
    return [1.0] + [0.0] * (len(weights) - 1)
"""
KEPT = tuple(entry for entry in ENTRIES if entry.name in ("average", AGAINST))
FAINT = Entry("faint", "nearly nothing", weights=(1e-9, 1e-9))


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> tuple[Entry, ...]:
    file = tmp_path_factory.mktemp("own") / "ranked_method.py"
    file.write_text(OWN)
    return (*KEPT, FAINT, leaderboard.of_ones_own(str(file)))


@pytest.fixture(scope="module")
def job(
    folder: Path,
    miniature: StableDiffusionXLPipeline,
    entries: tuple[Entry, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> Job:
    place = tmp_path_factory.mktemp("leaderboard")
    scorer = stand_ins.scorer(place / "scorer", miniature.vae.config.sample_size)
    given = stand_ins.mini(folder, scorer)
    given = replace(given, training=replace(given.training, learning_rate=0.05))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(leaderboard, "PAIRS", dict(list(leaderboard.PAIRS.items())[:2]))
        made = leaderboard.protocol(given, entries, repeats=2, seeds=2)
    made = replace(made, prompts={pair: prompts[:2] for pair, prompts in made.prompts.items()})
    job = Job(protocol=made, out=place / "out", families=(leaderboard.FAMILY,))
    wanted = [stage for stage in stages.STAGES if stage.name != "report"]
    stages.run(job, stages=[*wanted, stages.NOISE])
    return job


def test_a_merge_of_nothing_is_as_far_from_each_lora_as_the_base(job: Job) -> None:
    for group in job.groups:
        fits, joints = (noise.read(job, group, what) for what in (noise.FIT, noise.JOINT))

        assert fits[f"{group}.faint"] == pytest.approx(1, abs=1e-6)
        assert fits[f"{group}.average"] != pytest.approx(1, abs=1e-5)
        assert joints[f"{group}.average"] != pytest.approx(joints[f"{group}.faint"], abs=1e-5)
        assert joints[f"{group}.faint"] > 0


def test_a_merge_of_nothing_leaves_other_pictures_as_the_base_draws_them(job: Job) -> None:
    for group in job.groups:
        found = drift.read(job, group)

        assert found[f"{group}.faint"].mean == pytest.approx(0, abs=1e-6)
        assert found[f"{group}.average"].mean > 1e-4


def test_every_entry_has_every_measure_of_every_pair(
    job: Job, entries: tuple[Entry, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaderboard, "PAIRS", dict.fromkeys(job.groups, ()))

    report, lines = leaderboard.table(job, entries)

    rows = list(csv.DictReader(io.StringIO(lines)))
    assert len(rows) == len(entries) * len(MEASURES) * len(job.groups)
    (section,) = report.sections
    (table,) = [part for part in section.parts if not isinstance(part, str)]
    assert {row[0] for row in table.rows} == {entry.label for entry in entries}
    assert [path.name for path in leaderboard.write(job, entries)] == [
        f"leaderboard.{kind}" for kind in ("html", "md", "csv")
    ]


def test_there_are_eight_pairs_and_the_base_of_comparison_is_among_the_entries() -> None:
    assert len(leaderboard.PAIRS) == 8
    assert AGAINST in [entry.name for entry in ENTRIES]
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)


@pytest.mark.parametrize(
    ("text", "message"),
    [("nowhere.py", "there is no file"), ("mymethods", "wanted my.py"), ("{folder}/two_methods.py", "found one, two")],
)
def test_what_is_no_method_is_told(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "two_methods.py").write_text(
        OWN.replace("first", "one") + OWN.replace("first", "two").replace('"two"', '"second"')
    )

    with pytest.raises(OptionError, match=message):
        leaderboard.of_ones_own(text.format(folder=tmp_path))
