"""MoLE's gates: those of blocks are weights of a merge, those that follow the input are learned exactly."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import loramerge as lm
from loramerge.errors import FileError, OptionError
from loramerge.files.lora import LoRA
from loramerge.learned.attach import attach, fingerprints
from loramerge.learned.columns import Learned, mole, settings, ziplora
from loramerge.learned.gates import BlockGates, activated, balance, read
from loramerge.testing import random_layer, relative_error
from toy import SAID, Batch, from_factors

BLOCKS = ("blocks.0", "blocks.1")


class Blocks(nn.Module):
    """Two blocks: a convolution, and linear layers behind it."""

    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"conv": nn.Conv2d(3, 3, 3, padding=1), "to_q": nn.Linear(3, 4), "out": nn.Linear(4, 3)})
            for _ in BLOCKS
        )
        self.checkpointing = checkpointing

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        for block in self.blocks:

            def run(x: Tensor, block: Any = block) -> Tensor:
                h = torch.tanh(block["conv"](x) + shift[:, :, None, None])
                tokens = h.flatten(2).movedim(1, -1)
                return x + block["out"](torch.tanh(block["to_q"](tokens))).movedim(-1, 1).reshape(x.shape)

            x = checkpoint(run, x, use_reentrant=False) if self.checkpointing else run(x)
        return x


def blocks(checkpointing: bool = False, dtype: torch.dtype = torch.float32) -> Blocks:
    torch.manual_seed(0)
    return Blocks(checkpointing).to(dtype)


def loras(count: int = 2, *, lacks: str | None = None) -> list[LoRA]:
    """LoRAs of every layer; the last of them may lack a module."""
    shapes = {
        f"transformer.{name}": tuple(m.weight.shape) for name, m in blocks().named_modules() if hasattr(m, "weight")
    }
    return [
        LoRA(
            name=f"lora {i}",
            architecture=None,
            dialect="diffusers",
            metadata=SAID,
            layouts={
                module: random_layer(shape, rank=1 + i, alpha=2.0, seed=17 * i + j)
                for j, (module, shape) in enumerate(shapes.items())
                if not (lacks and i == count - 1 and module.endswith(lacks))
            },
        )
        for i in range(count)
    ]


def draw(lora: int, generator: torch.Generator, count: int) -> Batch:
    return {
        "x": torch.randn(count, 3, 4, 4, generator=generator) + 0.5 - lora,
        "shift": torch.randn(count, 3, generator=generator),
    }


def learn(learner: Any, model: nn.Module, given: list[LoRA], state: Path | None = None, **changes: object) -> Any:
    chosen = settings("mole", **{"steps": 3, "calibration": 2, "lr": 0.1, **changes})
    return learner(lambda batch: model(**batch), {"transformer": model}, given, draw, chosen, checkpoint=state)


KINDS = [("softmax", "mean"), ("sigmoid", "ones")]


@pytest.mark.parametrize(("kind", "init"), KINDS)
def test_gates_of_blocks_are_weights_of_an_ordinary_merge(kind: str, init: str, tmp_path: Path) -> None:
    given = loras(2, lacks="blocks.0.out")
    learned: Learned = learn(ziplora, blocks(), given, parametrisation=kind, init=init)
    assert learned.patterns is not None

    merged = lm.merge(given, weights=learned.patterns)
    lm.save(learned.lora, tmp_path / "gated.safetensors", dialect="diffusers")

    assert all(set(weights) == set(BLOCKS) for weights in learned.patterns)
    assert len({round(value, 6) for weights in learned.patterns for value in weights.values()}) > 3, (
        "nothing was learned"
    )
    for module in merged:
        assert relative_error(learned.lora[module].delta(), merged[module].delta()) < 1e-6
    assert learned.coefficients is not None
    by_columns = lm.merge(given, weights=learned.coefficients)
    assert all(relative_error(by_columns[m].delta(), merged[m].delta()) < 1e-6 for m in merged)


@pytest.mark.parametrize(("kind", "init"), KINDS)
def test_gates_that_do_not_follow_the_input_are_the_merged_file(kind: str, init: str) -> None:
    """Weights of zero leave nothing of the input: one gate for all LoRAs."""
    model, given = blocks(), loras(2)
    gates: BlockGates = learn(mole, model, given, parametrisation=kind, init=init, steps=0)
    batch = draw(0, torch.Generator().manual_seed(3), 2)
    factor = 0.5 if kind == "softmax" else 1.0
    with torch.no_grad():
        base = model(**batch)
        with attach({"transformer": model}, given) as attached:
            attached.gates = gates
            found = model(**batch)
        with attach({"transformer": model}, [lm.merge(given, weights=[factor, factor])]):
            wanted = model(**batch)

    assert float((found - wanted).abs().max()) < 1e-5
    assert float((found - base).abs().max()) > 0.1


@pytest.mark.parametrize(("kind", "init"), KINDS)
def test_gradients_of_gates_that_follow_the_input_are_finite_differences(kind: str, init: str) -> None:
    model, given = blocks(dtype=torch.float64), loras(3, lacks="blocks.0.conv")
    generator = torch.Generator().manual_seed(0)
    learned: BlockGates = learn(mole, blocks(), given, parametrisation=kind, init=init, steps=0)
    weights = {
        m: torch.randn(w.shape, generator=generator, dtype=torch.float64).requires_grad_()
        for m, w in learned.weights.items()
    }
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    gates = BlockGates(weights, temperature, learned.present, learned.activation, None, learned.marks)
    batch = {k: v.double() for k, v in draw(0, generator, 2).items()}

    with attach({"transformer": model}, given, torch.float64) as attached:
        attached.gates = gates

        def loss() -> Tensor:
            predicted = model(**batch).square().mean()
            return predicted + balance(torch.stack([gate.mean(0) for gate in gates.opened.values()]))

        found = torch.autograd.grad(loss(), [*weights.values(), temperature])
        for value, gradient in zip([*weights.values(), temperature], found, strict=True):
            step = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                value += 1e-5 * step
                above = loss()
                value -= 2e-5 * step
                below = loss()
                value += 1e-5 * step
            assert float((above - below) / 2e-5) == pytest.approx(float((gradient * step).sum()), rel=1e-5, abs=1e-8)
            assert float(gradient.abs().max()) > 1e-5


def test_gradient_checkpointing_gives_the_same_gates() -> None:
    plain, saving = (learn(mole, blocks(checkpointing), loras(2)) for checkpointing in (False, True))

    assert float(plain.temperature) != 0
    for module, weight in plain.weights.items():
        assert torch.equal(weight, saving.weights[module])
        assert float(weight.abs().max()) > 0


def test_the_teachers_of_every_step_are_the_loras_alone() -> None:
    model, given = blocks(), loras(2)
    taught: list[tuple[Batch, Tensor]] = []

    def predict(batch: Batch) -> Tensor:
        found = model(**batch)
        if not torch.is_grad_enabled():
            taught.append((batch, found))
        return found

    mole(predict, {"transformer": model}, given, draw, settings("mole", steps=3, lr=0.5, loss="mse"))
    batch, found = taught[-1]
    for i, lora in enumerate(given):
        with torch.no_grad(), attach({"transformer": model}, [lora]):
            alone = model(**{name: value[i : i + 1] for name, value in batch.items()})
        assert float((found[i : i + 1] - alone).abs().max()) < 1e-5


def test_learning_goes_on_from_its_checkpoint_to_the_same_gates(tmp_path: Path) -> None:
    whole = learn(mole, blocks(), loras(2), steps=4)
    for steps in (2, 4):
        rest = learn(mole, blocks(), loras(2), tmp_path / "state.safetensors", steps=steps)

    assert torch.equal(rest.temperature, whole.temperature)
    assert all(torch.equal(weight, whole.weights[module]) for module, weight in rest.weights.items())


def test_one_lora_behind_a_softmax_is_that_lora() -> None:
    model, (only,) = blocks(), loras(1)
    weights = {f"transformer.{name}.conv": torch.randn(3, 1) for name in BLOCKS}
    present = {module: [0] for module in weights}
    gates = BlockGates(weights, torch.zeros(()), present, "softmax", None, fingerprints([only]))
    batch = draw(0, torch.Generator().manual_seed(3), 2)
    with torch.no_grad(), attach({"transformer": model}, [only]) as attached:
        plain = model(**batch)
        attached.gates = gates

        assert float((model(**batch) - plain).abs().max()) < 1e-5


def test_the_balance_is_the_papers_and_lowest_at_equal_shares() -> None:
    gates = torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.2, 0.8]], dtype=torch.float64)
    q = [(0.7 + 0.5 + 0.2) / 3, (0.3 + 0.5 + 0.8) / 3]

    assert float(balance(gates)) == pytest.approx(-float(torch.tensor(q, dtype=torch.float64).log().sum()))
    assert float(balance(torch.full((3, 2), 0.5))) < float(balance(gates))


@pytest.mark.parametrize("gates", ["module", "block"])
def test_a_lora_that_shares_no_gate_has_no_part_in_the_balance(gates: str) -> None:
    model, given = blocks(), loras(3)
    shared = [module for module in given[0] if "0" in module]
    alone = [module for module in given[2] if module not in shared]
    apart = [given[0].select(*shared), given[1].select(*shared), given[2].select(*alone)]
    chosen = settings("mole", gates=gates, steps=2, calibration=2, lr=0.1)

    history = ziplora(lambda b: model(**b), {"transformer": model}, apart, draw, chosen).history

    assert all(math.isfinite(step.penalty) for step in history)


def test_a_heavier_balance_learns_more_equal_gates() -> None:
    """One LoRA's part of the loss counts a hundred times more than the other's."""
    model, given = blocks(), loras(2)

    def spread(lam: float) -> float:
        chosen = settings("mole", steps=20, calibration=2, lr=0.1, lam=lam)
        run = ziplora(lambda b: model(**b), {"transformer": model}, given, draw, chosen, weights=[1.0, 0.01])
        assert run.patterns
        first, second = (sum(each.values()) for each in run.patterns)
        return abs(first - second)

    assert spread(100.0) < 0.5 * spread(0.0)


def test_a_lora_that_a_block_lacks_has_no_share_of_its_gates() -> None:
    found = activated(torch.zeros(2, 3), "softmax", [0, 2])

    assert found.tolist() == [[0.5, 0, 0.5]] * 2
    assert activated(torch.zeros(3), "sigmoid", [0, 2]).tolist() == [1, 0, 1]


def test_gates_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    given = loras(2)
    gates = learn(mole, blocks(), given)
    found = read(gates.save(tmp_path / "gates.safetensors"))

    found.check(given)
    assert found.weights.keys() == gates.weights.keys()
    assert all(torch.equal(weight, gates.weights[module]) for module, weight in found.weights.items())
    assert (float(found.temperature), found.activation) == (float(gates.temperature), gates.activation)
    assert {m: list(those) for m, those in gates.present.items()} == found.present
    with pytest.raises(OptionError, match="another order"):
        found.check(given[::-1])


def test_gates_that_follow_the_input_say_that_no_lora_file_holds_them(tmp_path: Path) -> None:
    gates = learn(mole, blocks(), loras(2), steps=1)
    path = gates.save(tmp_path / "gates.safetensors")

    with pytest.raises(lm.errors.NotALoRAError, match=r"no LoRA file can hold.*--compose mole"):
        lm.load(path)
    with pytest.raises(OptionError, match="gates='block'"):
        learn(ziplora, blocks(), loras(2), gates="input")
    other = lm.save(
        from_factors({"unet.to_q": (torch.ones(2, 1).numpy(), torch.ones(1, 2).numpy())}),
        tmp_path / "x.safetensors",
        dialect="diffusers",
    )
    with pytest.raises(FileError, match="holds no gates"):
        read(other)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parametrisation": "column", "init": "ones"}, "need parametrisation='softmax' or 'sigmoid'"),
        ({"parametrisation": "sigmoid"}, "init='ones'"),
        ({"gates": "picture"}, "gates must be one of"),
        ({"gates": "input", "penalty": "dot"}, "penalty='balance' or 'none'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        settings("mole", **changes)
