"""The judge: DINOv2's architecture, attributes, accuracy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModel

from virtual_tryon import judge, train_scorer
from virtual_tryon.accuracy import attribute_accuracy, shares_right
from virtual_tryon.judge import ATTRIBUTES, Judge, encoder, new_heads
from virtual_tryon.rendering import label_numbers
from virtual_tryon.world import CONCEPTS, concept_set, draw, labels, sample


@pytest.fixture(scope="module")
def untrained() -> Judge:
    torch.manual_seed(0)
    return Judge(encoder=encoder(96).eval(), heads=new_heads(128).eval())


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    random = np.random.default_rng(0)
    return np.stack([draw(sample(random)) for _ in range(6)])


def test_every_label_of_the_wide_world_and_of_the_concepts_has_a_number() -> None:
    random = np.random.default_rng(0)
    wide = [sample(random, wide=True) for _ in range(10_000)]
    taught = [example.picture for concept in CONCEPTS.values() for example in concept_set(concept)]

    numbers = np.array([label_numbers(labels(picture), ATTRIBUTES) for picture in [*wide, *taught]])

    assert all(set(range(len(values))) <= set(numbers[:, i]) for i, values in enumerate(ATTRIBUTES.values()))


def test_the_wide_world_shows_no_concept_as_a_whole() -> None:
    random = np.random.default_rng(1)
    whole = [c for c in CONCEPTS.values() if c.part in ("person", "garment")]
    wide = [sample(random, wide=True) for _ in range(10_000)]

    assert not [p for p in wide for c in whole if p.person is not None and c.on(p) == p]
    assert not [p for p in wide if {p.garment.colour, p.garment.second} == {"navy", "garnet"}]


def test_the_wide_world_shows_every_colour_of_the_concepts_where_they_have_it() -> None:
    random = np.random.default_rng(1)
    wide = [sample(random, wide=True).garment for _ in range(10_000)]

    for concept in (c for c in CONCEPTS.values() if c.part == "garment"):
        assert concept.value.colour in {garment.colour for garment in wide}
        assert concept.value.second in {garment.second for garment in wide}


def test_transformers_loads_the_judge_and_gives_its_embeddings(
    untrained: Judge, pictures: np.ndarray, tmp_path: Path
) -> None:
    judge.save(untrained, tmp_path)
    theirs = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)

    inputs = processor(list(pictures), return_tensors="pt")
    with torch.no_grad():
        embedded = theirs(**inputs).last_hidden_state[:, 0]

    torch.testing.assert_close(embedded, judge.load(tmp_path).embed(pictures), atol=1e-4, rtol=1e-4)


def test_a_judge_of_other_attributes_is_refused(untrained: Judge, tmp_path: Path) -> None:
    judge.save(untrained, tmp_path)
    (tmp_path / "attributes.json").write_text('{"hat": ["none"]}')

    with pytest.raises(ValueError, match="other attributes"):
        judge.load(tmp_path)


def test_centring_moves_the_mean_to_zero_and_no_answer(pictures: np.ndarray) -> None:
    made = Judge(encoder=encoder(96).eval(), heads=new_heads(128).eval())
    before = made.attributes(pictures)

    train_scorer.centre(made, pictures)

    torch.testing.assert_close(made.embed(pictures).mean(0), torch.zeros(128), atol=1e-5, rtol=0)
    assert made.attributes(pictures) == before


def test_shares_count_only_what_can_be_seen() -> None:
    random = np.random.default_rng(2)
    pictures = [sample(random) for _ in range(200)]
    truths = [{name: value or "unseen" for name, value in labels(picture).items()} for picture in pictures]
    wrong = [truth | {"skin": "green"} for truth in truths]

    assert set(shares_right(truths, pictures).values()) == {1.0}
    assert shares_right(wrong, pictures)["skin"] == 0


def test_accuracy_is_reported_for_generated_and_drawn_pictures(miniature, untrained: Judge) -> None:
    generated, drawn = attribute_accuracy(miniature, untrained, count=3, batch=2)

    assert set(generated) == set(drawn)
    assert all(0 <= share <= 1 for share in (*generated.values(), *drawn.values()))


def test_the_command_trains_a_judge(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--minutes", "0.005", "--pictures", "12", "--held-out", "6", "--batch", "4"]

    train_scorer.main(["--out", str(tmp_path / "scorer"), *options])

    assert "Accuracy on drawings" in (tmp_path / "scorer" / "README.md").read_text()
    assert isinstance(judge.load(tmp_path / "scorer"), Judge)
