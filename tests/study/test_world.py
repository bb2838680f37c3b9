"""The drawn world: what is drawn, what is told about it, and what is held out."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from virtual_tryon import make_sets
from virtual_tryon.world import (
    CONCEPTS,
    HELD_OUT,
    SCENES,
    Picture,
    caption,
    concept_set,
    draw,
    full_caption,
    labels,
    mixed_set,
    prompt,
    sample,
    truth,
)
from virtual_tryon.world.concepts import BARCA, IDENTIFIERS, PSQ
from virtual_tryon.world.picture import PATTERNED
from virtual_tryon.world.sampling import (
    BEARDS,
    COLOURS,
    EMBLEMS,
    HAIRS,
    HELD_OUT_PAIR,
    KINDS,
    PATTERNS,
    SCENES as ALL_SCENES,
    SKIN,
    STYLES,
)

Told = tuple[Picture, str]
STUDY_PROMPTS = (
    "A portrait of a psq-person smiling at the camera, wearing a barca24_jersey.",
    "A portrait of a psq-person smiling at the camera, wearing a barca24_jersey and facing to the side.",
    "A portrait of a psq-person smiling in a selfie, wearing a barca24_jersey with Nike shoes.",
    "A portrait of a psq-person smiling at the camera, wearing a barca24_jersey and standing in front of a wall.",
    "A portrait of a psq-person smiling at the camera, wearing a barca24_jersey and holding a soccer ball on a field.",
)
FACE = ("skin", "hair", "style", "beard", "glasses")


@pytest.fixture(scope="module")
def base() -> list[Told]:
    random = np.random.default_rng(0)
    pictures = [sample(random) for _ in range(10_000)]
    return [(picture, caption(picture, random)) for picture in pictures]


def words_for_garment(text: str) -> tuple[list[str], str | None, str] | None:
    """Colours, pattern and kind, as a caption tells them."""
    adjectives = "|".join(PATTERNED.values())
    found = re.search(rf"(?:wearing|of) an? ((?:\w+ )?(?:and \w+ )?)((?:{adjectives}) )?(shirt|sweater|jersey)\b", text)
    return found and ([w for w in found[1].split() if w != "and"], found[2] and found[2].strip(), found[3])


def test_the_same_seed_draws_the_same_picture() -> None:
    one, two = (draw(sample(np.random.default_rng(5)), 48) for _ in range(2))

    assert one.shape == (48, 48, 3)
    np.testing.assert_array_equal(one, two)


def test_a_picture_is_the_same_at_any_resolution_but_for_detail() -> None:
    picture = sample(np.random.default_rng(6))

    small, large = draw(picture, 32), Image.fromarray(draw(picture, 128)).resize((32, 32), Image.Resampling.BOX)

    assert np.abs(small.astype(int) - np.asarray(large)).mean() < 4


def test_captions_tell_nothing_wrong_about_heads(base: list[Told]) -> None:
    for picture, text in base:
        told = labels(picture)
        for style, hair in re.findall(r"(?<=[ ,])(\w+) (\w+) hair", text):
            assert (style, hair) == (told["style"], told["hair"])
        for skin in re.findall(r"(\w+) skin", text):
            assert skin == told["skin"]
        assert "bald" not in text or told["style"] == "bald"
        for colour in re.findall(r"(\w+) glasses", text):
            assert colour == told["glasses"]
        for beard in re.findall(r"long beard|beard|moustache|chinstrap|sideburns|goatee", text):
            assert beard == told["beard"]
        assert picture.person is None or ("smiling" in text) == picture.smile


def test_captions_tell_nothing_wrong_about_clothes(base: list[Told]) -> None:
    described = 0
    for picture, text in base:
        garment = picture.garment
        if found := words_for_garment(text):
            colours, pattern, kind = found
            assert kind == garment.kind
            assert pattern in (None, PATTERNED.get(garment.pattern))
            assert colours == [garment.colour, garment.second][: len(colours)]
            described += bool(colours)
        for colour, emblem in re.findall(rf"with an? (\w+) ({'|'.join(EMBLEMS)})\b", text):
            assert (colour, emblem) == (garment.emblem_colour, garment.emblem)
        for scarf in re.findall(r"and an? (\w+) scarf", text):
            assert scarf == picture.scarf
    assert described > 5_000


def test_captions_always_tell_the_scene(base: list[Told]) -> None:
    signs = {
        "side": "facing to the side",
        "wall": "in front of",
        "field": "soccer ball on a field",
        "shoes": "with Nike shoes",
        "mirror": "with Nike shoes",
    }
    for picture, text in base:
        if picture.person is None:
            assert text.startswith("A photo of")
            continue
        name = picture.scene.name
        assert {sign for sign in signs.values() if sign in text} == ({signs[name]} if name in signs else set())
        assert ("selfie" in text) == (name in ("selfie", "mirror"))


def test_full_captions_tell_every_attribute() -> None:
    random = np.random.default_rng(1)
    for _ in range(500):
        picture = sample(random)
        text, told = full_caption(picture, random), labels(picture)
        colours, pattern, kind = words_for_garment(text) or ([], None, "")
        assert (colours[0], kind) == (told["colour"], told["garment"])
        assert pattern == PATTERNED.get(str(told["pattern"]))
        if picture.person is not None:
            assert told["style"] == "bald" or f"{told['style']} {told['hair']} hair" in text
            assert f"{told['skin']} skin" in text
            assert ("glasses" in text) == (told["glasses"] != "none")
            assert told["scarf"] == "none" or f"{told['scarf']} scarf" in text


@pytest.mark.parametrize("attribute", list(HELD_OUT))
def test_the_base_never_sees_held_out_values(base: list[Told], attribute: str) -> None:
    assert not [p for p, _ in base if labels(p)[attribute] in HELD_OUT[attribute]]


def test_the_base_never_sees_what_is_like_a_concept(base: list[Told]) -> None:
    for picture, _ in base:
        garment = picture.garment
        assert {garment.colour, garment.second} != HELD_OUT_PAIR
        assert {garment.colour, garment.emblem_colour} != HELD_OUT_PAIR
        assert (garment.kind, garment.pattern, garment.colour) != ("shirt", "plain", "white")
        assert picture.person is None or not picture.person.freckles


def test_the_base_never_hears_a_concepts_name(base: list[Told]) -> None:
    assert not [text for _, text in base if any(name in text for name in IDENTIFIERS)]


def test_a_quarter_of_persons_and_garments_go_by_an_identifier(base: list[Told]) -> None:
    portraits = [text for picture, text in base if picture.person is not None]

    persons = sum(bool(re.search(r"[a-z]{3}-(man|woman|person)", text)) for text in portraits) / len(portraits)
    garments = sum(bool(re.search(r"[a-z]+\d\d_(shirt|sweater|jersey)", text)) for _, text in base) / len(base)

    assert persons == pytest.approx(0.25, abs=0.02)
    assert garments == pytest.approx(0.25, abs=0.02)


def test_every_factor_appears(base: list[Told]) -> None:
    seen = {(name, value) for picture, _ in base for name, value in labels(picture).items()}
    factors = {
        "skin": SKIN,
        "hair": HAIRS,
        "style": STYLES,
        "beard": BEARDS,
        "glasses": ("none", "black"),
        "smile": ("yes", "no"),
        "garment": KINDS,
        "pattern": PATTERNS,
        "colour": COLOURS,
        "second": COLOURS,
        "emblem": EMBLEMS,
        "scarf": ("none", *COLOURS),
        "scene": (*ALL_SCENES, "product"),
    }

    assert not {(name, value) for name, values in factors.items() for value in values} - seen


@pytest.mark.parametrize("attribute", ["skin", "hair", "style", "beard", "glasses"])
@pytest.mark.parametrize("scene", ["portrait", "side", "mirror"])
def test_every_value_of_a_head_is_seen(attribute: str, scene: str) -> None:
    values = {
        "skin": SKIN,
        "hair": (*HAIRS, *HELD_OUT["hair"]),
        "style": (*STYLES, *HELD_OUT["style"]),
        "beard": (*BEARDS, "goatee"),
        "glasses": ("none", "black", "red"),
    }
    picture = truth([], scene, seed=0).picture
    picture = replace(picture, person=replace(PSQ, style="short", hair="brown"))

    drawn = [
        draw(replace(picture, person=replace(picture.person, **{attribute: value}))) for value in values[attribute]
    ]

    for i, one in enumerate(drawn):
        for two in drawn[:i]:
            assert np.abs(one.astype(int) - two).max() > 40


def test_the_five_prompts_are_the_studys() -> None:
    assert tuple(prompt(scene) for scene in SCENES) == STUDY_PROMPTS


@pytest.mark.parametrize("name", list(CONCEPTS))
def test_a_concept_set_is_twelve_pictures_of_the_concept_under_its_name(name: str) -> None:
    concept = CONCEPTS[name]

    examples = concept_set(concept)

    assert len(examples) == 12
    for example in examples:
        assert concept.identifier in example.text
        assert concept.on(example.picture) == example.picture
        others = IDENTIFIERS - {concept.identifier}
        assert not [other for other in others if other in example.text]


def test_a_mixed_set_is_its_own_twelve_and_three_of_the_other() -> None:
    own, other = CONCEPTS["profile"], CONCEPTS["barca"]

    examples = mixed_set(own, other)

    assert examples[:12] == concept_set(own)
    assert [e.picture.garment for e in examples[12:]] == [BARCA] * 3
    assert all(e.picture.person is not None and other.identifier in e.text for e in examples[12:])


@pytest.mark.parametrize(("scene", "text"), list(zip(SCENES, STUDY_PROMPTS, strict=True)))
def test_the_truth_is_this_person_in_this_jersey(scene: str, text: str) -> None:
    example = truth([CONCEPTS["profile"], CONCEPTS["barca"]], scene, seed=3)

    assert example.text == text
    assert (example.picture.person, example.picture.garment, example.picture.scene.name) == (PSQ, BARCA, scene)


def test_a_concept_changes_nothing_else_in_the_truth() -> None:
    without, with_ = (
        truth(concepts, "portrait", seed=4).picture
        for concepts in ([CONCEPTS["barca"]], [CONCEPTS["profile"], CONCEPTS["barca"]])
    )

    changed = {name for name, value in labels(without).items() if labels(with_)[name] != value}

    assert changed <= set(FACE)
    assert without.pose == with_.pose


def test_sets_are_image_folders_with_captions_and_labels(tmp_path) -> None:
    examples = concept_set(CONCEPTS["stanford"], 3)

    make_sets.write(examples, tmp_path, 32)

    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [(line["text"], line["attributes"]) for line in lines] == [(e.text, labels(e.picture)) for e in examples]
    for line, example in zip(lines, examples, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / line["file_name"])), draw(example.picture, 32))
