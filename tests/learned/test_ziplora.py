"""ZipLoRA by gradient, held against dense autograd and against the closed form."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loramerge as lm
from dense import World, close
from loramerge.errors import OptionError
from loramerge.files.architectures import ARCHITECTURES
from loramerge.files.lora import LoRA
from loramerge.learned.attach import attach
from loramerge.learned.calibration import calibrate
from loramerge.learned.columns import PRESETS, Learned, Step, settings, ziplora
from loramerge.learned.least_squares import column_solution, lsq
from loramerge.learned.penalties import crossings, penalty
from loramerge.merging.coefficients import Coefficients
from loramerge.testing import relative_error
from toy import LINEAR, Batch, draw, from_factors, lora_for, predict, toy, with_lora


def two(model: nn.Module, **options: object) -> list[LoRA]:
    return [lora_for(model, seed=1, **options), lora_for(model, seed=2, rank=3, **options)]


def learn(model: nn.Module, loras: list[LoRA], preset: str = "default", **changes: object) -> Learned:
    chosen = settings(preset, **{"steps": 3, "calibration": 2, **changes})
    return ziplora(predict(model), {"unet": model}, loras, draw, chosen)


def batch(count: int = 4, dtype: torch.dtype = torch.float32) -> Batch:
    return {k: v.to(dtype) for k, v in draw(0, torch.Generator().manual_seed(7), count).items()}


@pytest.mark.parametrize("module", ["unet.to_q", "unet.conv_in", "unet.down", "unet.shortcut"])
def test_gradients_of_the_factored_layer_are_those_of_the_dense_formula(module: str) -> None:
    model = toy(dtype=torch.float64)
    loras = two(model, modules=[module])
    target = model.get_submodule(module.removeprefix("unet."))
    deltas = [torch.from_numpy(np.array(lora[module].delta())).double() for lora in loras]
    columns = deltas[0][0].numel()
    m = torch.rand(2, columns, dtype=torch.float64, requires_grad=True)

    with attach({"unet": model}, loras, torch.float64) as attachment:
        site = attachment.sites[module]
        attachment.downs = {module: site.down * m[site.owner]}
        factored = model(**batch(dtype=torch.float64)).square().sum()
    weight = target.weight + sum(d * mi.reshape(1, *d.shape[1:]) for d, mi in zip(deltas, m, strict=True))
    changed = torch.func.functional_call(
        model, {f"{module.removeprefix('unet.')}.weight": weight}, kwargs=batch(dtype=torch.float64)
    )
    wanted = changed.square().sum()

    assert factored.item() == pytest.approx(wanted.item(), rel=1e-6)
    (found,) = torch.autograd.grad(factored, m)
    (right,) = torch.autograd.grad(wanted, m)
    assert close(found / right.norm(), right / right.norm(), 1e-6)


@pytest.mark.parametrize("tokens", [1, 200])
@pytest.mark.parametrize("module", ["unet.to_q", "unet.down"])
def test_factors_and_dense_updates_give_the_same(module: str, tokens: int) -> None:
    model = toy()
    lora = lora_for(model, [module], rank=5)
    with attach({"unet": model}, [lora]) as attachment:
        site = attachment.sites[module]
        x = torch.randn(tokens, 6, 8, 8) if module == "unet.down" else torch.randn(tokens, 6)
        rows = torch.zeros(tokens, dtype=torch.long)

        assert close(site(x), site(x, rows=rows), 1e-6)


@pytest.mark.parametrize("kind", ["lora", "tucker", "loha", "loha-tucker", "lokr", "lokr-tucker"])
def test_teachers_by_row_are_the_model_with_one_lora_in_its_weights(kind: str) -> None:
    model = toy()
    loras = [*two(model, kind=kind), lora_for(model, LINEAR, seed=3)]
    data = batch(5)
    owners = [0, 2, -1, 1, 0]
    with attach({"unet": model}, loras) as attachment, torch.no_grad():
        attachment.only(torch.tensor(owners))
        found = model(**data)

    alone = [*(with_lora(model, lora) for lora in loras), model]
    with torch.no_grad():
        for row, owner in enumerate(owners):
            wanted = alone[owner](**{k: v[row : row + 1] for k, v in data.items()})[0]
            assert float((found[row] - wanted).abs().max()) <= 2e-6 * max(1.0, float(wanted.abs().max()))


def test_nothing_is_left_in_the_model() -> None:
    model = toy()
    before = model(**batch())
    learn(model, two(model))

    assert torch.equal(model(**batch()), before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("parametrisation", ["column", "rank", "softmax", "down"])
def test_the_exported_lora_does_what_the_student_did(parametrisation: str, tmp_path: Path) -> None:
    model = toy()
    data, students = batch(2), []

    def watched(given: Batch) -> Tensor:
        found = model(**given)
        if found.requires_grad:
            students.append(given)
        return found

    loras = two(model)
    init = "mean" if parametrisation == "softmax" else "lsq"
    chosen = settings(steps=3, calibration=2, parametrisation=parametrisation, init=init)
    learned = ziplora(watched, {"unet": model}, loras, draw, chosen)
    again = lm.load(lm.save(learned.lora, tmp_path / "learned.safetensors"))
    with attach({"unet": model}, loras) as attachment, torch.no_grad():
        for module, site in attachment.sites.items():
            attachment.downs[module] = torch.from_numpy(np.array(learned.lora[module].factors()[1])).to(site.down)
        student = model(**data)

    assert len(students) == 3
    with torch.no_grad():
        assert float((with_lora(model, again)(**data) - student).abs().max()) <= 1e-5


@pytest.mark.parametrize(("parametrisation", "init"), [("column", "lsq"), ("softmax", "mean")])
def test_the_learned_lora_is_the_merge_with_the_coefficients(parametrisation: str, init: str, tmp_path: Path) -> None:
    model = toy()
    loras = [*two(model), lora_for(model, LINEAR, seed=3)]
    learned = learn(model, loras, parametrisation=parametrisation, init=init)
    path = learned.coefficients.save(tmp_path / "coefficients.safetensors")

    for weights in (learned.coefficients, Coefficients.read(path), str(path)):
        merged = lm.merge(loras, weights=weights)
        assert set(merged) == set(learned.lora)
        assert all(relative_error(merged[m].delta(), learned.lora[m].delta()) <= 1e-6 for m in merged)


def test_factors_by_rank_begin_at_the_closed_form_and_are_fewer() -> None:
    model = toy()
    loras = two(model)
    moments = calibrate(predict(model), {"unet": model}, loras, draw, batches=2, seed=0)
    closed, _ = lsq(loras, moments, granularity="rank")

    begun = learn(model, loras, steps=0, parametrisation="rank", calibration=2)
    learned = learn(model, loras, steps=3, parametrisation="rank", calibration=2)

    shared = [m for m in loras[0] if m in loras[1]]
    assert all(relative_error(begun.lora[m].delta(), closed[m].delta()) <= 1e-5 for m in shared)
    assert any(relative_error(learned.lora[m].delta(), closed[m].delta()) > 1e-3 for m in shared)
    assert learned.coefficients is None
    for m in shared:
        rows = np.concatenate([lora[m].factors()[1] for lora in loras])
        found = learned.lora[m].factors()[1]
        factors = (found * rows).sum(1) / (rows**2).sum(1)
        assert relative_error(found, factors[:, None] * rows) <= 1e-6


def test_coefficients_of_one_give_the_sum_and_of_one_by_n_the_average() -> None:
    model = toy()
    loras = two(model)
    for init, weight in (("ones", 1.0), ("mean", 0.5)):
        learned = learn(model, loras, steps=0, init=init)
        plain = lm.merge(loras, weights=[weight] * 2)

        assert all(relative_error(learned.lora[m].delta(), plain[m].delta()) <= 1e-6 for m in plain)


def test_coefficients_scale_the_columns_of_each_update() -> None:
    model = toy()
    loras = two(model, kind="loha")
    learned = learn(model, loras, init="ones", steps=5, lr=0.1)
    for module, columns in learned.coefficients.columns.items():
        shape = loras[0][module].shape
        m = columns.read().reshape(2, 1, *shape[1:])
        wanted = sum(mi * np.float64(lora[module].delta()) for mi, lora in zip(m, loras, strict=True))

        assert relative_error(learned.lora[module].delta(), wanted) <= 1e-6


def test_modules_that_one_lora_has_stay_as_they_are() -> None:
    model = toy()
    loras = [lora_for(model, seed=1), lora_for(model, ["unet.to_q", "unet.conv_in"], seed=2)]
    learned = learn(model, loras, lr=0.1)

    assert set(learned.coefficients.columns) == {"unet.to_q", "unet.conv_in"}
    for module in set(loras[0]) - set(loras[1]):
        assert relative_error(learned.lora[module].delta(), loras[0][module].delta()) <= 1e-6


def test_swapped_loras_give_the_same_merge() -> None:
    model = toy()
    loras = two(model)
    found = learn(model, loras, loss="mse", init="mean")
    swapped = ziplora(
        predict(model),
        {"unet": model},
        loras[::-1],
        lambda lora, generator, count: draw(1 - lora, torch.Generator().manual_seed(lora), count),
        settings(steps=3, loss="mse", init="mean"),
    )
    again = ziplora(
        predict(model),
        {"unet": model},
        loras,
        lambda lora, generator, count: draw(lora, torch.Generator().manual_seed(1 - lora), count),
        settings(steps=3, loss="mse", init="mean"),
    )

    assert len(found.history) == 3
    assert all(relative_error(swapped.lora[m].delta(), again.lora[m].delta()) <= 1e-4 for m in again.lora)


def test_on_one_linear_layer_learning_converges_to_the_closed_form() -> None:
    world = World(seed=1)
    model = nn.ModuleDict({"x": nn.Linear(world.downs[0].shape[1], world.ups[0].shape[0], bias=False)})
    loras = [
        from_factors({"unet.x": (u.numpy(), d.numpy())}, name=f"lora {i}")
        for i, (u, d) in enumerate(zip(world.ups, world.downs, strict=True))
    ]
    chosen = settings(steps=400, lr=0.05, init="ones", loss="mse", batch_size=len(world.inputs[0]))
    learned = ziplora(
        lambda given: model["x"](given["x"]),
        {"unet": model},
        loras,
        lambda i, g, n: {"x": world.inputs[i].float()},
        chosen,
    )
    optimum = column_solution(world.problem, 0.0, 1.0)

    assert close(torch.from_numpy(learned.coefficients.columns["unet.x"].read()).double(), optimum, 1e-4)


def test_the_closed_form_begins_below_the_sum_and_the_average() -> None:
    model = toy()
    loras = two(model)
    first = {init: learn(model, loras, init=init, batch_size=16).history[0].loss for init in ("lsq", "ones", "mean")}

    assert first["lsq"] < 0.7 * min(first["ones"], first["mean"])


def test_a_model_in_bfloat16_learns_coefficients_in_float32() -> None:
    model = toy(dtype=torch.bfloat16)

    def half(given: Batch) -> Tensor:
        return model(**{key: value.bfloat16() for key, value in given.items()})

    found = ziplora(half, {"unet": model}, two(model), draw, settings(steps=3, calibration=2, lr=1e-4, init="ones"))
    columns = found.coefficients.columns["unet.to_q"].read()

    assert columns.dtype == np.float32
    assert 0 < np.abs(columns - 1).max() < 1e-3  # which bfloat16 can't tell from 1


def test_learning_lowers_the_loss() -> None:
    model = toy()
    history = learn(model, two(model), init="ones", steps=40, lr=0.03, batch_size=8).history

    assert sum(s.loss for s in history[-5:]) < 0.6 * sum(s.loss for s in history[:5])


def test_the_normalised_loss_is_in_units_of_each_loras_own_effect() -> None:
    model = toy()
    loras = two(model)
    plain, normalised = (
        learn(model, loras, init="ones", loss=loss, steps=1).history[0] for loss in ("mse", "normalised")
    )
    generator = torch.Generator().manual_seed(1)
    effects = torch.zeros(2)
    with torch.no_grad():
        for _ in range(2):
            for i, lora in enumerate(loras):
                data = draw(i, generator, 1)
                effects[i] += (with_lora(model, lora)(**data) - model(**data)).square().mean() / 2

    assert [a / b for a, b in zip(plain.fits, normalised.fits, strict=True)] == pytest.approx(
        effects.tolist(), rel=1e-4
    )


def test_softmax_gives_one_factor_a_module_that_sum_to_one() -> None:
    model = toy()
    loras = [*two(model), lora_for(model, LINEAR, seed=3)]
    learned = learn(model, loras, parametrisation="softmax", init="mean", lr=0.1)
    for module, tensor in learned.coefficients.columns.items():
        columns = tensor.read()

        assert np.allclose(columns.sum(0), 1, atol=1e-6)
        assert np.array_equal(columns, np.repeat(columns[:, :1], columns.shape[1], 1))
        assert (columns[2] > 0).all() == (module in loras[2])
        assert columns[0, 0] != pytest.approx(1 / len(loras), abs=1e-4)


def test_false_from_on_step_stops() -> None:
    model = toy()
    seen: list[Step] = []

    def on_step(step: Step) -> bool:
        seen.append(step)
        return step.step < 2

    found = ziplora(predict(model), {"unet": model}, two(model), draw, settings(calibration=2), on_step=on_step)

    assert [step.step for step in seen] == [1, 2]
    assert found.history == seen


def test_learning_stops_when_the_penalty_is_small() -> None:
    model = toy()
    found = learn(model, two(model), "paper", lam=10.0, lr=0.1, stop_below=30.0, steps=200)

    assert 0 < len(found.history) < 200
    assert found.history[-1].penalty >= 30.0


def test_shared_noise_gives_all_loras_the_same_draw() -> None:
    model = toy()
    drawn: list[Tensor] = []

    def noise(lora: int, generator: torch.Generator, count: int) -> Batch:
        found = draw(0, generator, count)
        drawn.append(found["x"])
        return found

    for shared in (True, False):
        drawn.clear()
        ziplora(
            predict(model),
            {"unet": model},
            two(model),
            noise,
            settings(steps=2, init="ones", loss="mse", shared_noise=shared),
        )
        assert torch.equal(drawn[0], drawn[1]) == shared
        assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_learns(preset: str) -> None:
    model = toy()
    found = learn(model, two(model), preset)

    assert len(found.history) == 3
    assert any(not np.allclose(t.read(), 1.0, atol=1e-6) for t in found.coefficients.columns.values())


def test_mkshings_learning_rate_moves_coefficients_by_no_more_than_itself_a_step() -> None:
    model = toy()
    found = learn(model, two(model), "mkshing", steps=20)

    assert max(float(np.abs(t.read() - 1).max()) for t in found.coefficients.columns.values()) <= 20 * 5e-5 * 1.5


@pytest.mark.parametrize("count", [2, 3])
def test_penalties_are_the_published_formulas(count: int) -> None:
    m = torch.randn(count, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    pairs = list(combinations(range(count), 2))
    wanted = {
        "none": 0.0,
        "dot": sum(abs(float((m[i] * m[j]).sum())) for i, j in pairs),
        "absmean": sum(float((m[i] * m[j]).abs().mean()) for i, j in pairs),
        "cos": sum(abs(float(F.cosine_similarity(m[i], m[j], dim=0))) for i, j in pairs),
    }

    for kind, value in wanted.items():
        assert float(penalty(kind, m)) == pytest.approx(value)


def test_crossings_are_inner_products_of_columns() -> None:
    world = World(ranks=(2, 3, 1))
    p = world.problem
    found = crossings(p.up, p.down, list(p.slices))
    wanted = torch.stack([(a * b).sum(0) for a, b in combinations(world.deltas, 2)])

    assert close(found, wanted, 1e-12)
    for size in (1.0, 1e-12, 1e-20):
        assert float(penalty("columns", torch.ones(3, 6, dtype=torch.float64), size * found)) == pytest.approx(3.0)


def test_a_lora_without_the_module_has_no_part_in_its_penalty() -> None:
    model = toy()
    loras = [
        lora_for(model, ["unet.to_q"], seed=1),
        lora_for(model, ["unet.to_q"], seed=2),
        lora_for(model, ["unet.out"]),
    ]
    for kind in ("dot", "absmean", "columns"):
        found = learn(model, loras, "paper", penalty=kind, steps=1)

        # Two LoRAs of three, ones at the start: to_q has 6 columns.
        assert found.history[0].penalty == pytest.approx({"dot": 6.0}.get(kind, 1.0))


def test_on_sdxl_the_papers_penalty_begins_at_the_number_of_columns() -> None:
    columns = [
        shape[1]
        for module, shape in ARCHITECTURES["sdxl"].shapes.items()
        if module.startswith("unet.") and module.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))
    ]
    start = sum(float(penalty("dot", torch.ones(2, n))) for n in columns)

    assert len(columns) == 560
    assert start == 785_920
    assert sum(2 * n for n in columns) == 1_571_840


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": -1}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": "0.1"}, "lr"),
        ({"batch_size": 0}, "batch_size"),
        ({"calibration": 0}, "calibration"),
        ({"init": "zeros"}, "init must be one of lsq, ones, mean"),
        ({"loss": "l1"}, "loss"),
        ({"penalty": "cosine"}, "penalty"),
        ({"parametrisation": "row"}, "parametrisation"),
        ({"lam": 0.1}, "lam needs a penalty"),
        ({"stop_below": 0.1}, "stop_below needs a penalty"),
        ({"penalty": "dot", "parametrisation": "down"}, "not 'down'"),
        ({"penalty": "columns", "parametrisation": "rank"}, "not 'rank'"),
        ({"parametrisation": "softmax"}, "init='mean'"),
        ({"learning_rate": 0.1}, "Unknown setting 'learning_rate'"),
        ({"preset": "ziplora"}, "Unknown preset"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        settings(**changes)


def test_what_loras_add_is_computed_where_the_model_is() -> None:
    model = toy()
    loras = two(model)
    with attach({"unet": model}, loras) as attachment, torch.device("meta"):
        for module, site in attachment.sites.items():
            x = torch.ones(2, *((6, 4, 4) if site.convolution else (site.columns,)), device="cpu")
            x = x[:, :3] if module == "unet.conv_in" else x
            assert site(x).device.type == "cpu"
            assert site(x, rows=torch.tensor([0, -1], device="cpu")).device.type == "cpu"
