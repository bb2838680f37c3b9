"""Learning that is cut off and goes on."""

from pathlib import Path

import numpy as np
import pytest
import torch

import loramerge as lm
from loramerge.errors import FileError, NumberError, OptionError
from loramerge.files.lora import LoRA
from loramerge.learned.columns import PRESETS, Learned, Step, settings, ziplora
from loramerge.learned.state import State
from toy import Batch, draw, lora_for, predict, toy

MODEL = toy()
LORAS = [lora_for(MODEL, seed=1), lora_for(MODEL, seed=2, rank=3)]


def learn(checkpoint: Path | None = None, *, loras: list[LoRA] = LORAS, every: int = 2, **changes: object) -> Learned:
    chosen = settings(**{"steps": 6, "calibration": 2, **changes})
    return ziplora(predict(MODEL), {"unet": MODEL}, loras, draw, chosen, checkpoint=checkpoint, every=every)


def same_bits(a: Learned, b: Learned) -> bool:
    return set(a.lora) == set(b.lora) and all(
        np.array_equal(x, y) for m in a.lora for x, y in zip(a.lora[m].factors(), b.lora[m].factors(), strict=True)
    )


RUNS = [
    *({"preset": preset} for preset in PRESETS),
    {"parametrisation": "down"},
    {"parametrisation": "rank"},
    {"parametrisation": "softmax", "init": "mean"},
]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_run_that_goes_on_ends_at_the_same_bits(run: dict[str, str], tmp_path: Path) -> None:
    straight = learn(**run)
    learn(tmp_path / "state", **run, steps=3)
    resumed = learn(tmp_path / "state", **run)

    assert [step.step for step in resumed.history] == [4, 5, 6]
    assert resumed.history == straight.history[3:]
    assert same_bits(resumed, straight)


@pytest.mark.parametrize("flag", ["fused", "capturable", None])
def test_a_state_goes_on_where_the_optimiser_keeps_its_count_of_steps(flag: str | None) -> None:
    """torch keeps it on the parameter's device, here meta, if the optimiser is fused or capturable, and else on the CPU."""
    parameter = torch.nn.Parameter(torch.ones(2, device="meta"))
    optimizer = torch.optim.AdamW([parameter])
    optimizer.param_groups[0].update({flag: True} if flag else {})
    generator = torch.Generator()

    State(3, {}, {"p": (torch.ones(2), torch.ones(2))}, generator.get_state(), []).restore(optimizer, generator)

    found = optimizer.state[parameter]
    assert found["step"].device.type == ("meta" if flag else "cpu")
    assert flag or found["step"] == 3
    assert {found[name].device.type for name in ("exp_avg", "exp_avg_sq")} == {"meta"}


def test_a_finished_run_is_read_from_its_state(tmp_path: Path) -> None:
    first = learn(tmp_path / "state")
    again = learn(tmp_path / "state")

    assert again.history == []
    assert same_bits(first, again)


def test_a_run_that_stopped_early_stays_where_it_was(tmp_path: Path) -> None:
    run = {"preset": "paper", "lam": 10.0, "lr": 0.1, "stop_below": 60.0, "steps": 100}
    first = learn(tmp_path / "state", **run)
    again = learn(tmp_path / "state", **run)

    assert len(first.history) < 100
    assert again.history == []
    assert same_bits(first, again)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_goes_on_to_the_same_bits(error: type[BaseException], tmp_path: Path) -> None:
    def interrupt(step: Step) -> None:
        if step.step == 4:
            raise error

    with pytest.raises(error):
        ziplora(
            predict(MODEL),
            {"unet": MODEL},
            LORAS,
            draw,
            settings(steps=6, calibration=2),
            checkpoint=tmp_path / "state",
            every=2,
            on_step=interrupt,
        )

    resumed = learn(tmp_path / "state")
    assert [step.step for step in resumed.history] == [5, 6]
    assert same_bits(resumed, learn())


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("bad", [1, 4])
def test_nan_stops_with_the_last_good_state(where: str, bad: int, tmp_path: Path) -> None:
    students = 0

    def turning(given: Batch) -> torch.Tensor:
        nonlocal students
        found = MODEL(**given)
        if found.requires_grad:
            students += 1
            if students == bad:
                if where == "loss":
                    return found * torch.nan
                found.register_hook(lambda gradient: gradient * torch.nan)
        return found

    with pytest.raises(NumberError, match=f"at step {bad}"):
        ziplora(
            turning,
            {"unet": MODEL},
            LORAS,
            draw,
            settings(steps=6, calibration=2),
            checkpoint=tmp_path / "state",
            every=5,
        )

    resumed = learn(tmp_path / "state")
    assert resumed.history[0].step == bad
    assert same_bits(resumed, learn())


@pytest.mark.parametrize("changes", [{"lr": 0.02}, {"seed": 1}, {"loss": "mse"}, {"parametrisation": "down"}], ids=str)
def test_the_state_of_other_settings_is_refused(changes: dict[str, object], tmp_path: Path) -> None:
    learn(tmp_path / "state", steps=2)

    with pytest.raises(OptionError, match=r"of another run, with other settings\."):
        learn(tmp_path / "state", **changes)


def test_the_state_of_other_data_is_refused(tmp_path: Path) -> None:
    def run(data: str, steps: int) -> Learned:
        chosen = settings(steps=steps, calibration=2)
        about = {"base": "toy", "data": data}
        return ziplora(
            predict(MODEL), {"unet": MODEL}, LORAS, draw, chosen, checkpoint=tmp_path / "state", identity=about
        )

    run("these", 1)
    assert run("these", 2).history
    with pytest.raises(OptionError, match=r"of another run, with other data\."):
        run("those", 3)


def test_the_state_of_other_loras_of_the_same_names_is_refused(tmp_path: Path) -> None:
    learn(tmp_path / "state", steps=2)
    other = lora_for(MODEL, seed=5, rank=3, name=LORAS[1].name)

    with pytest.raises(OptionError, match="with other LoRAs"):
        learn(tmp_path / "state", loras=[LORAS[0], other])
    with pytest.raises(OptionError, match="with other LoRAs"):
        learn(tmp_path / "state", loras=LORAS[::-1])


def test_the_same_loras_under_other_names_go_on(tmp_path: Path) -> None:
    learn(tmp_path / "state", steps=2)
    renamed = [lora_for(MODEL, seed=1, name="a"), lora_for(MODEL, seed=2, rank=3, name="b")]

    assert same_bits(learn(tmp_path / "state", loras=renamed), learn())


def test_fewer_steps_than_the_state_has_are_refused(tmp_path: Path) -> None:
    learn(tmp_path / "state", steps=4)

    with pytest.raises(OptionError, match="at step 4, past 3"):
        learn(tmp_path / "state", steps=3)


def test_files_that_hold_no_state_are_refused(tmp_path: Path) -> None:
    learn(tmp_path / "whole", steps=2)
    whole = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-100])
    (tmp_path / "text").write_text("no state")
    (tmp_path / "lacks").write_bytes(whole.replace(b"unet.to_q/first", b"unet.to_q/other"))
    lm.save(LORAS[0], tmp_path / "lora.safetensors")

    for name in ("cut", "text", "lacks", "lora.safetensors"):
        with pytest.raises(FileError, match=name):
            learn(tmp_path / name)


def test_the_state_is_kept_at_the_end_too(tmp_path: Path) -> None:
    learn(tmp_path / "state", steps=5, every=3)

    assert [step.step for step in learn(tmp_path / "state").history] == [6]


@pytest.mark.parametrize("every", [0, -1])
def test_wrong_numbers_of_steps_between_states_are_refused(every: int, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="every"):
        learn(tmp_path / "state", every=every)
