"""``train`` as a user runs it, on a tiny model that diffusers saved."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from commands import done, run
from PIL import Image

import loramerge as lm
from loramerge import LoRA
from loramerge.diffusion import TrainSettings, load, train_lora
from loramerge.errors import LoRAMergeError

QUICK = ("--rank", "2", "--steps", "3", "--lr", "0.01", "--device", "cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.images(tmp_path_factory.mktemp("data") / "photos", tiny.PROMPTS[0])


def same(a: LoRA, b: LoRA) -> bool:
    pairs = [zip(a[m].factors(), b[m].factors(), strict=True) for m in a]
    return set(a) == set(b) and all(np.array_equal(x, y) for pair in pairs for x, y in pair)


def test_train_writes_what_the_function_returns(base: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "person.safetensors"
    more = ("--trigger", "psq-person", "--snr-gamma", "5", "-s", "schedule=cosine", "-s", "warm_up=1", "--no-flip")
    shown = done("train", photos, "-b", base, "-o", out, *QUICK, *more)
    settings = TrainSettings(
        rank=2, steps=3, learning_rate=0.01, snr_gamma=5.0, schedule="cosine", warm_up=1, flip=False
    )

    found = lm.load(out)
    assert same(found, train_lora(load(base, device="cpu"), photos, settings=settings))
    assert (found.dialect, found.metadata["modelspec.title"]) == ("diffusers", "person")
    assert found.metadata["modelspec.trigger_phrase"] == "psq-person"
    assert json.loads(found.metadata["loramerge.training"])["trained_on"]["base"] == base.name
    assert str(tmp_path) not in str(found.metadata)
    assert "Hint" not in shown
    assert "step 3/3  loss" in shown
    assert "loss, first 1" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["person.safetensors"]


def test_train_writes_any_dialect_and_dtype(base: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "person.safetensors"
    done("train", photos, "-b", base, "-o", out, *QUICK, "--to", "kohya", "--dtype", "float16", "-q")

    found = lm.load(out)
    assert found.dialect == "kohya"
    assert {layer.dtype for layer in found.layouts.values()} == {"F16"}
    assert len(found.metadata["sshs_model_hash"]) == 64


def test_train_takes_every_option_of_memory_and_prior(base: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "person.safetensors"
    people = tiny.images(tmp_path / "people", None, seed=3)
    prior = ("--prior", people, "--prior-prompt", "a person", "-s", "prior_weight=0.5")
    options = ("--text-encoders", "--gradient-checkpointing", "--precision", "bf16", "--targets", "all", "--alpha", "1")
    done("train", photos, "-b", base, "-o", out, *QUICK, *prior, *options, "--batch-size", "2", "-s", "accumulate=2")

    told = json.loads(lm.load(out).metadata["loramerge.training"])
    assert [place["count"] for place in told["trained_on"]["data"]["images"]] == [2, 2]
    assert told["settings"]["prior_weight"] == 0.5
    assert any(module.startswith("text_encoder_2.") for module in lm.load(out))


def test_train_draws_on_the_way(base: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "person.safetensors"
    drawing = ("--validate", tiny.PROMPTS[0], "--validate-every", "2", "--validate-steps", "1")
    done("train", photos, "-b", base, "-o", out, *QUICK, *drawing, "-q")

    pictures = sorted(tmp_path.glob("*.png"))
    assert [path.name for path in pictures] == ["person-000002-0.png", "person-000003-0.png"]
    assert Image.open(pictures[0]).size == (tiny.SIDE, tiny.SIDE)
    assert list(lm.load(out))


def test_train_goes_on_after_ctrl_c_to_the_same_bits(base: Path, photos: Path, tmp_path: Path) -> None:
    out, state = tmp_path / "person.safetensors", tmp_path / "person.state.safetensors"
    quick = (*QUICK[:2], *QUICK[4:], "--every", "1")

    def press() -> None:
        while not state.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    stopped = run("train", photos, "-b", base, "-o", out, *quick, "--steps", "100000")
    assert stopped.exit_code == 130
    assert f"The state is in {state}; the same command goes on from there." in stopped.output
    assert not out.exists()
    reached = int(stopped.output.rpartition("Interrupted after ")[2].split()[0])

    done("train", photos, "-b", base, "-o", out, *quick, "--steps", str(reached + 2), "-q")
    whole = tmp_path / "whole.safetensors"
    done("train", photos, "-b", base, "-o", whole, *quick, "--steps", str(reached + 2), "-q")

    assert same(lm.load(out), lm.load(whole))
    assert not state.exists()


def test_train_keeps_a_state_that_was_asked_for(base: Path, photos: Path, tmp_path: Path) -> None:
    state = tmp_path / "kept.safetensors"
    shared = ("train", photos, "-b", base, "-o", tmp_path / "a.safetensors", *QUICK, "--checkpoint", state)

    done(*shared)
    assert state.exists()
    assert "No step was left to do" in done(*shared)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("-s", "steps"), "wanted NAME=VALUE"),
        (("-s", "pace=3"), "Unknown setting 'pace'. Available: accumulate, schedule"),
        (("-s", "rank=3"), "has an option of its own: --rank"),
        (("-s", "accumulate=two"), "accumulate is a whole number, got 'two'"),
        (("-s", "schedule=often"), "schedule must be one of constant, linear, cosine"),
        (("--rank", "0"), "rank must be a whole number from 1, got 0"),
        (("--to", "xlabs"), "The dialect xlabs is read, not written"),
        (("--prior", "nowhere"), "No such directory of images: nowhere"),
    ],
)
def test_mistakes_are_told_before_the_model_is_read(
    more: tuple[Any, ...], message: str, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(LoRAMergeError, match=message):
        done("train", photos, "-b", tmp_path / "nowhere", "-o", tmp_path / "a.safetensors", *more)
    assert not list(tmp_path.iterdir())


def test_captions_without_the_trigger_are_only_hinted_at(base: Path, photos: Path, tmp_path: Path) -> None:
    shown = done("train", photos, "-b", base, "-o", tmp_path / "a.safetensors", *QUICK, "--trigger", "sks")

    assert "Hint: 2 of 2 captions lack the trigger 'sks'" in shown
