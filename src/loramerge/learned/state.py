"""The state of learning in a file: all that a run needs to go on and get the same bits."""

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FileError, OptionError
from ..files.dialects.write import Group
from ..files.storage.reader import SafetensorsFile
from ..files.storage.texts import as_json, parsed
from ..files.storage.writer import write
from ..tensors import Spec, code

KEY = "loramerge.state"


@dataclass(frozen=True)
class State:
    """A saved state of a run."""

    step: int
    tensors: Mapping[str, Tensor]
    moments: Mapping[str, tuple[Tensor, Tensor]]
    """Adam's two running means, by parameter."""
    generator: Tensor
    scales: list[float]

    def restore(self, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
        """Set an optimiser and a generator to the saved state."""
        generator.set_state(self.generator)
        held = {
            i: {"step": torch.tensor(float(self.step)), "exp_avg": first, "exp_avg_sq": second}
            for i, (first, second) in enumerate(self.moments.values())
        }
        # torch puts each where the optimiser wants it: a fused one has its step on the parameter's device, others on the CPU.
        optimizer.load_state_dict({**optimizer.state_dict(), "state": held})


def save_state(
    path: Path,
    identity: Mapping[str, Any],
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    scales: list[float],
) -> None:
    """Write the state: whole, or not at all."""
    held: dict[str, Tensor] = {"generator": generator.get_state()}
    for name, parameter in parameters.items():
        # Adam has no means before the first step, and of a module that the loss doesn't depend on.
        adam = optimizer.state.get(parameter, {})
        zeros = torch.zeros_like(parameter)
        held |= {
            f"{name}/value": parameter.detach(),
            f"{name}/first": adam.get("exp_avg", zeros),
            f"{name}/second": adam.get("exp_avg_sq", zeros),
        }
    groups = [group_of(key, {key: tensor}) for key, tensor in held.items()]
    said = {"step": step, "identity": identity, "scales": scales, "names": list(parameters)}
    write(path, groups, {"format": "pt", KEY: as_json(said)})


def resumed(checkpoint: Path | None, identity: Mapping[str, Any], steps: int) -> State | None:
    """Return the state to go on from; None if the run begins anew.

    Raises:
        FileError: The checkpoint can't be read, or holds no state.
        OptionError: It is the state of another run, or past the last step.
    """
    state = load_state(checkpoint, identity) if checkpoint and checkpoint.exists() else None
    if state and state.step > steps:
        raise OptionError(f"The checkpoint {checkpoint} is at step {state.step}, past {steps}.")
    return state


def check_together(step: int, reduce: Callable[[Sequence[Tensor]], None], way_out: str) -> None:
    """Refuse processes that go on from different steps: they would wait for each other.

    Raises:
        OptionError: Another process is at another step.
    """
    means = torch.tensor([step, step**2], dtype=torch.float64)
    reduce([means])
    if abs(means[1] - means[0] ** 2) > 0.01:
        raise OptionError(
            f"This process goes on from step {step}, others don't: they average {means[0]:g}. Way out: {way_out}."
        )


def load_state(path: Path, identity: Mapping[str, Any]) -> State:
    """Read the state of the same run.

    Raises:
        FileError: The file can't be read, or holds no state.
        OptionError: It is the state of another run.
    """
    with closing(SafetensorsFile(path)) as file:
        try:
            said = parsed(file.metadata[KEY], str(path))
            wanted, was = parsed(as_json(identity), "the settings"), said["identity"]
            others = [name for name in {**wanted, **was} if wanted.get(name) != was.get(name)]
            names = [] if others else said["names"]
            found = State(
                operator.index(said["step"]),
                {name: tensor(file, f"{name}/value") for name in names},
                {name: (tensor(file, f"{name}/first"), tensor(file, f"{name}/second")) for name in names},
                tensor(file, "generator"),
                list(map(float, said["scales"])),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileError(
                f"{path} holds no state of learning, or not all of it: {error} is missing or wrong."
            ) from None
    if others:
        raise OptionError(
            f"The checkpoint {path} is of another run, with other {' and '.join(others)}. "
            "Ways out: the same ones, or another path."
        )
    return found


def group_of(name: str, tensors: Mapping[str, Tensor]) -> Group:
    """Return tensors as a group to write together."""
    held = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    return Group(name, {key: Spec(tuple(t.shape), code(t)) for key, t in held.items()}, lambda: held)


def tensor(file: SafetensorsFile, key: str) -> Tensor:
    """Read a tensor of a file into a torch tensor of its own."""
    return torch.from_numpy(file[key].read().copy())
