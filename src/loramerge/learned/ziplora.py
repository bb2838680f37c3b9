"""ZipLoRA by gradient: coefficients that let one LoRA answer every LoRA's data as that LoRA does.

Shah et al., 2023, https://arxiv.org/abs/2311.13600, for any number of LoRAs.  A step makes two
passes of the model whatever their number: all teachers (each LoRA alone on its own data) without
gradients in one batch, all students (the merge) in another.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..coefficients import Coefficients
from ..errors import NumberError, OptionError
from ..layers import low_rank
from ..lora import LoRA
from .attach import Attachment, Models, Site, attach
from .calibration import Batch, Draw, Predict, calibrate
from .coupling import Penalty, crossings, penalty
from .lsq import column_solution, problem
from .state import load_state, save_state

Loss = Literal["normalised", "norm", "mse"]
Parametrisation = Literal["column", "down"]


@dataclass(frozen=True)
class Settings:
    """How to learn; `PRESETS` has the published ones."""

    steps: int = 50
    lr: float = 1e-2
    batch_size: int = 1
    """Examples of each LoRA in a step."""
    init: Literal["lsq", "ones", "mean"] = "lsq"
    """Coefficients to begin with: the closed form, 1 (the sum), or 1/N (the average)."""
    parametrisation: Parametrisation = "column"
    """What is learned: one factor a column, or the whole ``down`` factors; the rank is the same."""
    loss: Loss = "normalised"
    """normalised: Σ wᵢ ‖ε − εᵢ‖² / mean ‖εᵢ − ε_base‖².  norm: Σ wᵢ ‖ε − εᵢ‖₂, the paper's.  mse: the mean square."""
    penalty: Penalty = "none"
    lam: float = 0.0
    """Weight of the penalty."""
    mean_penalty: bool = True
    """Whether the penalty is averaged over modules; the paper adds up."""
    weight_decay: float = 0.0
    shared_noise: bool = False
    """Whether all LoRAs' examples of a step draw the same noise and timestep."""
    stop_below: float = 0.0
    """Stop once the penalty without its weight is below: the paper stops at 0."""
    calibration: int = 16
    """Batches of each LoRA for the closed form, and for the normalisation."""
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [
            f"{name} must be {wanted}, got {getattr(self, name)!r}"
            for name, wanted, fits in (
                ("steps", "at least 0", self.steps >= 0),
                ("lr", "above 0", self.lr > 0),
                ("batch_size", "at least 1", self.batch_size >= 1),
                ("lam", "at least 0", self.lam >= 0),
                ("calibration", "at least 1", self.calibration >= 1),
            )
            if not fits
        ]
        if wrong:
            raise OptionError(f"ZipLoRA: {'; '.join(wrong)}.")


PRESETS: Mapping[str, Settings] = {
    "default": Settings(),
    "paper": Settings(
        steps=100, init="ones", loss="norm", penalty="dot", lam=0.01, mean_penalty=False, stop_below=1e-3
    ),
    "mkshing": Settings(
        steps=100,
        lr=5e-5,
        init="ones",
        loss="mse",
        penalty="absmean",
        lam=0.01,
        mean_penalty=False,
        weight_decay=1e-4,
        shared_noise=True,
    ),
}
"""``default`` is ours; ``paper`` is equation 3 and appendix A of the paper; ``mkshing`` is
https://github.com/mkshing/ziplora-pytorch with the README's learning rate, which moves a coefficient
by 0.005 at most: it is here to show that it does nothing."""


@dataclass(frozen=True)
class Step:
    """What a step came to."""

    step: int
    total: int
    fits: tuple[float, ...]
    """Each LoRA's term of the loss."""
    penalty: float
    loss: float


@dataclass
class Learned:
    """What was learned."""

    lora: LoRA
    """The merge: an ordinary LoRA of rank Σr in every module."""
    coefficients: Coefficients | None
    """For ``parametrisation="column"``: weights of an ordinary merge of the same LoRAs."""
    history: list[Step] = field(default_factory=list)


def settings(preset: str = "default", **changes: Any) -> Settings:
    """A preset with some settings changed.

    Raises:
        OptionError: The preset or a setting is unknown, or a value is out of range.
    """
    if preset not in PRESETS:
        raise OptionError(f"Unknown preset {preset!r}. Available: {', '.join(PRESETS)}.")
    unknown = [name for name in changes if name not in Settings.__dataclass_fields__]
    if unknown:
        raise OptionError(f"Unknown setting {unknown[0]!r}. Available: {', '.join(Settings.__dataclass_fields__)}.")
    return replace(PRESETS[preset], **changes)


def ziplora(
    predict: Predict,
    models: Models,
    loras: Sequence[LoRA],
    draw: Draw,
    settings: Settings = PRESETS["default"],
    *,
    weights: Sequence[float] | None = None,
    checkpoint: Path | None = None,
    every: int = 10,
    on_step: Callable[[Step], None] | None = None,
    reduce: Callable[[Sequence[Tensor]], None] | None = None,
) -> Learned:
    """Learn the merge of LoRAs on a model.

    Args:
        predict: The model as a function of a batch: the noise, velocity or flow that it predicts.
        models: The components that it runs, by name; their parameters get no gradients.
        loras: Any number, of any ranks.
        draw: Gives data of each LoRA.
        settings: How to learn.
        weights: How much each LoRA's term counts; 1 for all by default.
        checkpoint: Where to keep the state; if it is there, learning goes on from it.
        every: Steps between two states.
        on_step: Called after every step.
        reduce: Averages gradients over processes in place, when several learn together.

    Raises:
        MergeError: The LoRAs don't fit the model.
        NumberError: The loss became NaN or infinite; the last good state is in the checkpoint.
        OptionError: A weight is missing, or the checkpoint is of another run.
    """
    shares = list(weights or [1.0] * len(loras))
    if len(shares) != len(loras):
        raise OptionError(f"Weights given: {len(shares)}, LoRAs: {len(loras)}.")
    with _frozen(models), attach(models, loras) as attachment:
        run = _Run(predict, models, loras, draw, settings, shares, attachment)
        history = run.learn(checkpoint, every, on_step, reduce)
        return run.result(history)


class _Run:
    """One run of learning."""

    def __init__(
        self,
        predict: Predict,
        models: Models,
        loras: Sequence[LoRA],
        draw: Draw,
        settings: Settings,
        weights: Sequence[float],
        attachment: Attachment,
    ) -> None:
        self.predict, self.models, self.loras, self.draw = predict, models, loras, draw
        self.settings, self.weights, self.attachment = settings, weights, attachment
        # What one LoRA has alone stays as it is: nothing competes with it.
        self.sites = {m: site for m, site in attachment.sites.items() if len(set(site.owner.tolist())) > 1}
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.scales: list[float] = []
        self.parameters: dict[str, nn.Parameter] = {}
        self.crossings: dict[str, Tensor] = {}
        if settings.penalty == "columns":
            self.crossings = {m: crossings(s.up, s.down, _slices(s, len(loras))) for m, s in self.sites.items()}

    def learn(
        self,
        checkpoint: Path | None,
        every: int,
        on_step: Callable[[Step], None] | None,
        reduce: Callable[[Sequence[Tensor]], None] | None,
    ) -> list[Step]:
        """Go through the steps that are left."""
        given = self.settings
        state = load_state(checkpoint, self._identity()) if checkpoint and checkpoint.exists() else None
        self._begin(state.tensors if state else None)
        optimizer = torch.optim.AdamW(self.parameters.values(), lr=given.lr, weight_decay=given.weight_decay)
        if state:
            state.restore(optimizer, self.generator)
            self.scales = state.scales
        elif given.loss == "normalised":
            self.scales = self._effects()
        history: list[Step] = []
        for step in range(state.step if state else 0, given.steps):
            done, value = self._step(optimizer, step, reduce)
            if not math.isfinite(value):
                if checkpoint and step:
                    self._save(checkpoint, step, optimizer)
                raise NumberError(
                    f"ZipLoRA: the loss is {value} at step {step + 1}. Ways out: a smaller learning rate than "
                    f"{given.lr:g}, float32 instead of float16, or going on from the checkpoint."
                )
            optimizer.step()
            history.append(done)
            if on_step:
                on_step(done)
            if checkpoint and (step + 1) % every == 0:
                self._save(checkpoint, step + 1, optimizer)
            if given.stop_below and done.penalty < given.stop_below:
                break
        return history

    def _save(self, path: Path, step: int, optimizer: torch.optim.Optimizer) -> None:
        save_state(path, self._identity(), step, self.parameters, optimizer, self.generator, self.scales)

    def _begin(self, found: Mapping[str, Tensor] | None) -> None:
        """The parameters at the start of the run."""
        start = found or self._start()
        self.parameters = {
            m: nn.Parameter(start[m].to(site.down.device, torch.float32)) for m, site in self.sites.items()
        }

    def _start(self) -> dict[str, Tensor]:
        given = self.settings
        if given.init != "lsq":
            value = 1.0 if given.init == "ones" else 1.0 / len(self.loras)
            columns = {m: torch.full((len(self.loras), s.columns), value) for m, s in self.sites.items()}
        else:
            columns = self._closed_form()
        if given.parametrisation == "column":
            return columns
        return {m: site.down.float().cpu() * columns[m][site.owner.cpu()] for m, site in self.sites.items()}

    def _closed_form(self) -> dict[str, Tensor]:
        given = self.settings
        # Its own hooks would see the outputs that these here have added to.
        with _silent(self.attachment):
            moments = calibrate(
                self.predict,
                self.models,
                self.loras,
                self.draw,
                kind="gram",
                batches=given.calibration,
                batch_size=given.batch_size,
                seed=given.seed,
            )
        found = {}
        for module in self.sites:
            p = problem(self.loras, module, moments.modules[module], moments.batches(module), None)
            found[module] = column_solution(p, 0.1, 1.0).float()
        return found

    def _effects(self) -> list[float]:
        """Mean ‖εᵢ − ε_base‖² of each LoRA on its own data: what the loss is measured in."""
        totals = [0.0] * len(self.loras)
        generator = torch.Generator().manual_seed(self.settings.seed + 1)
        with torch.no_grad():
            for _ in range(self.settings.calibration):
                joint, rows = self._data(generator)
                with_lora = self._teach(joint, rows)
                base = self._teach(joint, torch.full_like(rows, -1))
                for i, part in enumerate(_parts((with_lora - base).float(), len(self.loras))):
                    totals[i] += float(part.square().mean())
        if min(totals) <= 0:
            idle = self.loras[totals.index(min(totals))].name
            raise OptionError(f"The LoRA {idle} changes nothing on its own data: is the trigger word in the prompts?")
        return [total / self.settings.calibration for total in totals]

    def _data(self, generator: torch.Generator) -> tuple[Batch, Tensor]:
        """One batch with the examples of every LoRA below each other, and whose each row is."""
        size, count = self.settings.batch_size, len(self.loras)
        batches = []
        begin = generator.get_state()
        for i in range(count):
            if self.settings.shared_noise:
                generator.set_state(begin)
            batches.append(self.draw(i, generator, size))
        return join(batches), torch.arange(count).repeat_interleave(size)

    def _teach(self, joint: Batch, rows: Tensor) -> Tensor:
        device = next(iter(self.attachment.sites.values())).up.device
        self.attachment.only(rows.to(device))
        with torch.no_grad():
            return self.predict(joint)

    def _step(
        self, optimizer: torch.optim.Optimizer, step: int, reduce: Callable[[Sequence[Tensor]], None] | None
    ) -> tuple[Step, float]:
        joint, rows = self._data(self.generator)
        teacher = self._teach(joint, rows)
        # The teacher goes first: checkpointed blocks run again in backward, and must find the student's state.
        self.attachment.all()
        self.attachment.downs = {m: self._down(m) for m in self.sites}
        student = self.predict(joint)
        fits = self._fits(student.float(), teacher.float())
        coupling = self._coupling()
        loss = sum((w * f for w, f in zip(self.weights, fits, strict=True)), fits[0].new_zeros(()))
        loss = loss + self.settings.lam * coupling
        optimizer.zero_grad()
        cast(Any, loss).backward()
        if reduce:
            reduce([p.grad for p in self.parameters.values() if p.grad is not None])
        numbers = tuple(float(f.detach()) for f in fits)
        value = float(loss.detach())
        return Step(step + 1, self.settings.steps, numbers, float(coupling.detach()), value), value

    def _down(self, module: str) -> Tensor:
        site, parameter = self.sites[module], self.parameters[module]
        return parameter if self.settings.parametrisation == "down" else site.down.float() * parameter[site.owner]

    def _fits(self, student: Tensor, teacher: Tensor) -> list[Tensor]:
        parts = _parts(student - teacher, len(self.loras))
        if self.settings.loss == "norm":
            return [part.norm() for part in parts]
        squares = [part.square().mean() for part in parts]
        if self.settings.loss == "mse":
            return squares
        return [square / scale for square, scale in zip(squares, self.scales, strict=True)]

    def _coupling(self) -> Tensor:
        given = self.settings
        first = next(iter(self.parameters.values()))
        if given.penalty == "none" or given.parametrisation == "down":
            return first.new_zeros(())
        terms = [penalty(given.penalty, p, self.crossings.get(m)) for m, p in self.parameters.items()]
        total = sum(terms, first.new_zeros(()))
        return total / len(terms) if given.mean_penalty else total

    def result(self, history: list[Step]) -> Learned:
        """The merge with what was learned."""
        layouts = {}
        columns = {}
        for module, site in self.attachment.sites.items():
            down = site.down.float()
            if module in self.parameters:
                down = self._down(module).detach()
                columns[module] = self.parameters[module].detach().cpu().numpy()
            layouts[module] = low_rank(site.up.float().cpu().numpy(), down.cpu().numpy(), site.shape)
        rest = {m: _summed(self.loras, m) for lora in self.loras for m in lora if m not in layouts}
        order = dict.fromkeys(m for lora in self.loras for m in lora)
        first = self.loras[0]
        merged = LoRA(
            name=" + ".join(lora.name for lora in self.loras),
            architecture=first.architecture,
            dialect=first.dialect,
            layouts={m: layouts.get(m) or rest[m] for m in order},
            dtype=first.dtype,
        )
        coefficients = None
        if self.settings.parametrisation == "column":
            provenance = {"method": "ziplora", "settings": asdict(self.settings)}
            coefficients = Coefficients.of(columns, self.loras, [1.0] * len(self.loras), provenance)
        return Learned(merged, coefficients, history)

    def _identity(self) -> dict[str, Any]:
        """What a state must agree in with the run that goes on from it; more steps are no other run."""
        kept = {k: v for k, v in asdict(self.settings).items() if k != "steps"}
        return {"settings": kept, "loras": [lora.name for lora in self.loras], "weights": list(self.weights)}


def join(batches: Sequence[Batch]) -> Batch:
    """Batches below each other; nested mappings are joined too."""
    first = batches[0]
    return {
        key: join([b[key] for b in batches]) if isinstance(value, Mapping) else torch.cat([b[key] for b in batches])
        for key, value in first.items()
    }


def _parts(values: Tensor, count: int) -> Sequence[Tensor]:
    return values.chunk(count)


def _slices(site: Site, count: int) -> list[slice]:
    return [site.slice(i) for i in range(count)]


def _summed(loras: Sequence[LoRA], module: str) -> Any:
    """A module of a component that the model was not given with: the plain sum."""
    from ..methods.linear import linear

    layers = [lora[module] for lora in loras if module in lora]
    return linear.merge(layers, [1.0] * len(layers))


class _frozen:  # noqa: N801
    """The models' parameters without gradients while it lasts."""

    def __init__(self, models: Models) -> None:
        self.models = models

    def __enter__(self) -> None:
        self.before = [(p, p.requires_grad) for model in self.models.values() for p in model.parameters()]
        for parameter, _ in self.before:
            parameter.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for parameter, before in self.before:
            parameter.requires_grad_(before)


class _silent:  # noqa: N801
    """An attachment that adds nothing while it lasts."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    def __enter__(self) -> None:
        self.attachment.active = False

    def __exit__(self, *_: object) -> None:
        self.attachment.active = True
