"""Whole runs of both presets on tiny untrained models: what is done is kept, and done again it is the same."""

import csv
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import StableDiffusionXLPipeline
from markupsafe import escape

import loramerge as lm
from adapters import toys
from loramerge.errors import LoRAMergeError
from loramerge.scoring.png import recipe_in
from loramerge.testing import random_lora, relative_error
from study import stand_ins
from virtual_tryon.study import caveats, command, drawing, loras, reading, sets, stages
from virtual_tryon.study.job import Job
from virtual_tryon.study.ledger import Ledger
from virtual_tryon.study.protocol import Scorer, Setting
from virtual_tryon.study.published import TABLE

RESULTS = ("report.html", "report.md", "scores.csv", "pictures.csv")


@pytest.fixture(scope="module")
def mini(folder: Path, miniature: StableDiffusionXLPipeline, tmp_path_factory: pytest.TempPathFactory) -> Job:
    place = tmp_path_factory.mktemp("mini")
    scorer = stand_ins.scorer(place / "scorer", miniature.vae.config.sample_size)
    job = stand_ins.job(stand_ins.mini(folder, scorer), place / "out", "many")
    stages.run(job)
    return job


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Job:
    place = tmp_path_factory.mktemp("paper")
    job = stand_ins.job(stand_ins.paper(place), place / "out", "methods", "weights")
    stages.run(job)
    return job


def work(job: Job, **options: object) -> list[str]:
    """What a run reports of pieces that it had to do, the report aside."""
    said: list[str] = []
    stages.run(job, say=said.append, **options)
    quiet = ("there already", "   0/")  # what was done before, and that a stage begins
    return [line for line in said if not any(part in line for part in quiet) and not line.startswith("report")]


def again(job: Job, tmp_path: Path) -> Job:
    shutil.copytree(job.out, tmp_path / "out")
    return stand_ins.job(job.protocol, tmp_path / "out", *job.families[1:])


def test_a_state_file_that_is_no_text_is_no_result_and_no_wait(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.add("a", "1")
    (tmp_path / "b.json").write_bytes(b"\xff")
    (tmp_path / "c.json").write_text('["fingerprint"]')
    os.mkfifo(tmp_path / "d.json")

    assert [ledger.has(result, "1") for result in "abcde"] == [True, False, False, False, False]


def test_the_papers_preset_runs_from_photographs_to_the_report(paper: Job) -> None:
    page = (paper.out / "report.html").read_text()

    for setting in paper.settings:
        assert setting.family == "weights" or escape(setting.label) in page
    assert all(f"{value:.4f}" in page for row in TABLE.values() for value in row)
    assert page.count("<img") > 2 * len(TABLE)
    assert "Against the truth" not in page


def test_only_the_studys_own_settings_are_shown_beside_what_it_published(paper: Job, mini: Job) -> None:
    theirs, ours = ((job.out / "report.html").read_text() for job in (paper, mini))

    assert all(f"Figure {figure}" in theirs for figure in range(6, 12))
    assert "Figure " not in ours
    assert "as published" not in ours


def told(job: Job) -> str:
    return "\n".join([*caveats.caveats(job, repeats=True), caveats.sizes(job)])


def test_caveats_are_those_of_the_run(mini: Job) -> None:
    study = Job(protocol=reading.read(reading.preset("paper")), out=mini.out, families=("study",))
    theirs, ours = told(study), told(mini)

    assert "another encoder" in ours
    assert "drawn pictures" in ours
    assert "miniature" in ours
    assert "another" not in theirs
    assert "learning rate" not in theirs
    assert "8 pictures of each prompt and setting, where the study drew 1." in theirs
    assert "Encoder and base are the study's" in theirs


@pytest.mark.parametrize(
    ("part", "change", "wanted"),
    [
        ("drawing", {"seeds": 5}, "5 pictures of each prompt and setting"),
        ("scorer", {"model": "facebook/dinov2-large"}, "in the space of facebook/dinov2-large, not of DINOv2 base"),
        ("scorer", {"model": "/models/dinov2-large"}, "because of another encoder; the order can"),
        ("base", {"model": "someone/anime-xl"}, "The base is someone/anime-xl; the study's was SDXL 1.0"),
        ("training", {"steps": 800}, "Trained otherwise than in the study: steps 800 (the study: 400)."),
    ],
)
def test_a_changed_protocol_changes_the_caveats(
    part: str, change: dict[str, object], wanted: str, tmp_path: Path
) -> None:
    protocol = reading.read(reading.preset("paper"))
    job = Job(protocol=protocol, out=tmp_path, families=("study",))
    changed = replace(job, protocol=replace(protocol, **{part: replace(getattr(protocol, part), **change)}))

    assert wanted not in told(job)
    assert wanted in told(changed)


def test_loras_of_ones_own_are_rows_beside_trained_ones_and_are_not_trained(paper: Job, tmp_path: Path) -> None:
    trained = [lm.load(paper.lora_file(name), architecture="sdxl") for name in ("profile", "barca")]
    mine = lm.save(lm.merge(trained, weights=[0.3, 0.4]), tmp_path / "mine.safetensors")
    person = lm.save(trained[0], tmp_path / "person.safetensors", dialect="diffusers-peft")
    rows = (
        replace(paper.protocol.setting("none"), name="none"),
        Setting(name="mine", label="Mine", loras=(str(mine),)),
        Setting(name="half", label="Half", loras=(str(mine),), weights=(0.5,)),
        Setting(name="with", label="With", loras=(str(mine), "barca"), weights=(0.5, 0.5)),
        Setting(name="person", label="The person's", loras=("profile",)),
    )
    concepts = tuple(replace(c, lora=str(person)) if c.name == "profile" else c for c in paper.protocol.concepts)
    job = stand_ins.job(replace(paper.protocol, settings=rows, concepts=concepts, mixed=()), tmp_path / "out")

    stages.run(job)

    assert job.untrained == ("barca",)
    assert [file.name for file in (job.out / "loras").glob("*.safetensors")] == ["barca.safetensors"]
    half = lm.load(job.merge_file(rows[2]), architecture="sdxl")
    own = lm.load(mine, architecture="sdxl")
    assert all(relative_error(half[m].delta(), 0.5 * own[m].delta()) <= 1e-6 for m in own)
    assert "mine.safetensors, barca, profile (person.safetensors)" in (job.out / "report.md").read_text()
    assert recipe_in(job.shots(rows[1])[0].path)["loras"][0]["sha256"] == own.sha256


def test_a_lora_of_ones_own_for_another_model_is_told_before_the_first_picture(paper: Job, tmp_path: Path) -> None:
    wrong = lm.save(random_lora("sd15", rank=1), tmp_path / "wrong.safetensors")
    rows = (paper.protocol.setting("none"), Setting(name="mine", label="Mine", loras=(str(wrong),)))
    job = stand_ins.job(replace(paper.protocol, settings=rows), tmp_path / "out")

    with pytest.raises(LoRAMergeError, match=r"wrong\.safetensors"):
        stages.run(job, only=["generate"])
    assert not list(job.out.rglob("*.png"))


def test_a_method_of_ones_own_goes_to_merge_as_it_is(
    paper: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    monkeypatch.setattr(lm, "merge", lambda loras, **options: seen.append(options) or loras[0])
    row = Setting(
        name="own", label="Own", loras=("profile", "barca"), method="my.methods:equal_norms", options={"sharpness": 2}
    )

    loras.merge(again(paper, tmp_path), (row, 0))

    assert seen == [{"weights": None, "method": "my.methods:equal_norms", "sharpness": 2}]


def test_the_miniature_is_scored_against_the_truth(mini: Job) -> None:
    page = (mini.out / "report.html").read_text()

    assert "Against the truth" in page
    assert "3 LoRAs" in page
    assert "True pictures: all concepts" in page


def test_tables_promise_no_interval_over_too_few_seeds(mini: Job) -> None:
    text = (mini.out / "report.md").read_text()

    assert "where there are 5 or more]. Seeds: 1 of a setting, 2 of true pictures." in text
    assert "interval over 1 seeds" not in text


def test_a_second_run_finds_all_done_and_reports_the_same(paper: Job, mini: Job, tmp_path: Path) -> None:
    for job in (paper, mini):
        before = [(job.out / name).read_bytes() for name in RESULTS]

        assert work(job) == []
        assert [(job.out / name).read_bytes() for name in RESULTS] == before


def test_an_interrupted_run_goes_on_to_the_same_table(paper: Job, tmp_path: Path) -> None:
    job = again(paper, tmp_path)
    first = job.shots(job.protocol.setting("weighted"))[0]
    first.path.unlink()
    job.lora_file("barca").unlink()
    job.merge_file(job.protocol.setting("l2")).unlink()

    done = work(job)

    assert [line.split()[0] for line in done] == ["train", "merge", "generate"]
    assert stand_ins.pixels(first.path) == stand_ins.pixels(paper.shots(paper.protocol.setting("weighted"))[0].path)
    for name in RESULTS:
        assert (job.out / name).read_bytes() == (paper.out / name).read_bytes()


def test_a_lora_of_another_run_that_was_interrupted_is_trained_anew(
    paper: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    job = again(paper, tmp_path)
    faster = replace(job.protocol, training=replace(job.protocol.training, learning_rate=1e-2))
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            stages.run(stand_ins.job(faster, job.out), only=["train"])

    assert len(work(job, only=["train"])) == 1
    for name in paper.untrained:
        assert job.lora_file(name).read_bytes() == paper.lora_file(name).read_bytes()


def test_a_run_from_nothing_in_two_processes_gives_the_same_table(paper: Job, tmp_path: Path) -> None:
    few = replace(paper.protocol, settings=tuple(map(paper.protocol.setting, ("none", "profile", "barca", "l2"))))
    job, before = stand_ins.job(few, tmp_path / "fresh"), stand_ins.job(few, tmp_path / "copy")
    shutil.copytree(paper.out, before.out)

    stages.run(job, processes=2)
    stages.run(before, only=["report"])

    for name in RESULTS:
        assert (job.out / name).read_bytes() == (before.out / name).read_bytes()


def test_another_learning_rate_trains_and_draws_anew_and_leaves_the_base_alone(paper: Job, tmp_path: Path) -> None:
    job = again(paper, tmp_path)
    faster = replace(job.protocol, training=replace(job.protocol.training, learning_rate=1e-2))
    job = stand_ins.job(faster, job.out)

    done = work(job, only=["train", "merge", "generate"])

    assert sum(line.startswith("train") for line in done) == 4
    assert sum(line.startswith("merge") for line in done) == 4
    assert sum(line.startswith("generate") for line in done) == len(TABLE) - 1


def test_pictures_take_the_loras_of_repeated_trainings_in_turn(paper: Job, tmp_path: Path) -> None:
    twice = replace(
        paper.protocol,
        training=replace(paper.protocol.training, repeats=2),
        drawing=replace(paper.protocol.drawing, seeds=4),
        settings=tuple(map(paper.protocol.setting, ("none", "profile", "barca", "l2"))),
    )
    job = stand_ins.job(twice, tmp_path / "out")

    stages.run(job, only=["data", "train", "merge", "generate"])

    loras_, merges = (
        [lm.load(file(of, repeat), architecture="sdxl").sha256 for repeat in (0, 1)]
        for file, of in ((job.lora_file, "profile"), (job.merge_file, twice.setting("l2")))
    )
    assert job.lora_file("profile").read_bytes() == paper.lora_file("profile").read_bytes()
    for setting, hashes in (("profile", loras_), ("l2", merges)):
        assert len(set(hashes)) == 2
        drawn = [recipe_in(shot.path)["loras"][0]["sha256"] for shot in job.shots(twice.setting(setting))]
        assert drawn == hashes * (len(drawn) // 2)
    assert work(job, only=["train", "merge", "generate"]) == []


def test_a_second_encoder_has_columns_of_its_own_and_changes_no_other(mini: Job, tmp_path: Path) -> None:
    other = toys.dinov2(tmp_path / "other")
    shutil.copytree(mini.out, tmp_path / "out")
    job = stand_ins.job(replace(mini.protocol, second=Scorer(model=str(other))), tmp_path / "out", *mini.families[1:])

    stages.run(job, only=["score", "report"])

    with (job.out / "scores.csv").open() as ours, (mini.out / "scores.csv").open() as theirs:
        rows, before = list(csv.DictReader(ours)), list(csv.DictReader(theirs))
    second = [row for row in rows if row["measure"].startswith("second")]
    assert {row["measure"] for row in second} == {"second whole", "second truth"}
    assert [row for row in rows if row not in second] == before
    firsts = {(r["prompts"], r["setting"], r["of"]): r["score"] for r in before if r["measure"] == "whole"}
    assert all(
        r["score"] != firsts[r["prompts"], r["setting"], r["of"]] for r in second if r["measure"] == "second whole"
    )
    assert "by other" in (job.out / "report.html").read_text()


def test_a_half_drawn_batch_is_drawn_as_a_whole(paper: Job, tmp_path: Path) -> None:
    protocol = replace(paper.protocol, drawing=replace(paper.protocol.drawing, seeds=3, batch=2))
    job = stand_ins.job(protocol, tmp_path)
    none = protocol.setting("none")
    drawing.draw(job, none)
    shots = job.shots(none)
    stamps = [shot.path.stat().st_mtime_ns for shot in shots]
    shots[2].path.unlink()  # the last seed of the first prompt; the batch goes on with the second prompt

    assert drawing.draw(job, none)

    changed = [shot.path.stat().st_mtime_ns != stamp for shot, stamp in zip(shots, stamps, strict=True)]
    assert changed == [False, False, True, True, False, False]
    assert not drawing.draw(job, none)


def test_pictures_depend_on_the_precision_and_the_device_that_draw_them(paper: Job) -> None:
    half = replace(paper.protocol, base=replace(paper.protocol.base, dtype="bfloat16"))
    jobs = [paper, replace(paper, device="cuda"), stand_ins.job(half, paper.out)]

    assert len({drawing.depends_on(job, []) for job in jobs}) == 3


def test_a_mixed_set_is_ones_own_pictures_and_three_of_the_other(paper: Job) -> None:
    captions = (paper.set_folder("profile_mixed") / "metadata.jsonl").read_text()

    assert captions.count("psq-person") == 4
    assert captions.count("barca24_jersey") == 3


def test_a_stage_says_which_earlier_one_is_missing(paper: Job, tmp_path: Path) -> None:
    job = stand_ins.job(paper.protocol, tmp_path)

    with pytest.raises(LoRAMergeError, match=r"profile.safetensors is missing. The stage 'train' makes it"):
        loras.merge(job, (job.protocol.setting("weighted"), 0))
    with pytest.raises(LoRAMergeError, match="The stage 'score' makes it"):
        stages.run(job, only=["report"])


def test_what_is_no_picture_in_a_folder_of_photographs_is_said(paper: Job, tmp_path: Path) -> None:
    folder = tmp_path / "photos" / "profile"
    stand_ins.photos(folder, "a psq-person", 0)
    (folder / "IMG_1.heic").touch()
    data = replace(paper.protocol.data, folder=str(tmp_path / "photos"))

    said = sets.left_out(stand_ins.job(replace(paper.protocol, data=data), tmp_path / "out"))

    assert len(said) == 1
    assert "left out are IMG_1.heic" in said[0]


def test_a_caption_without_its_identifier_is_refused(paper: Job, tmp_path: Path) -> None:
    stand_ins.photos(tmp_path / "photos" / "profile", "a psq-person", 0)
    stand_ins.photos(tmp_path / "photos" / "barca", "a football shirt", 4)
    data = replace(paper.protocol.data, folder=str(tmp_path / "photos"))

    with pytest.raises(LoRAMergeError, match=r"does not say 'barca24_jersey'.*4 captions"):
        sets.make(stand_ins.job(replace(paper.protocol, data=data), tmp_path / "out"))


def test_a_prompt_of_which_the_world_knows_no_truth_is_refused(mini: Job) -> None:
    with pytest.raises(LoRAMergeError, match="does not know the truth about 'A psq-person asleep"):
        sets.scene_of("A psq-person asleep.", ["profile"])


def test_true_pictures_are_drawn_twice_from_different_seeds(mini: Job) -> None:
    found = dict(sets.truths(mini, "study"))

    assert {what: len(examples) for what, examples in found.items()} == dict.fromkeys(
        (sets.REFERENCE, sets.TRUE, "profile", "barca", sets.NOTHING), 4
    )
    assert not [a for a in found[sets.REFERENCE] for b in found[sets.TRUE] if a.picture == b.picture]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--base", "./nowhere"], "No miniature base in"),
        (["--preset", "maxi"], "Unknown preset 'maxi'"),
        (["--seeds", "0"], "wanted one or more"),
        (["--data", "photos"], "--data photos: the pictures of 'mini' are drawn"),
        (["--variant", "fp16"], "the miniature has no other files"),
        (["--device", "cuda", "--processes", "2"], "one, or several on a CPU"),
    ],
)
def test_the_command_refuses_before_it_works(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["run", "--out", str(tmp_path / "out"), *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_runs_a_stage_of_a_protocol(
    folder: Path, mini: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--base", str(folder), "--scorer", mini.protocol.scorer.model, "--out", str(tmp_path)]

    assert command.main(["run", *options, "--only", "data"]) == 0
    assert "sets and true pictures" in capsys.readouterr().out
    assert len(list((tmp_path / "sets" / "profile").glob("*.png"))) == 12
