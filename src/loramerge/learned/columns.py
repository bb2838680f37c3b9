"""ZipLoRA by gradient descent: coefficients with which one merged LoRA acts on each LoRA's data as that LoRA does.

Shah et al., 2023, https://arxiv.org/abs/2311.13600, for any number of LoRAs.  A step makes two
passes of the model, however many LoRAs there are: all teachers (each LoRA alone on its own data) without
gradients in one batch, all students (the merge) in another.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import MergeError, NumberError, OptionError, within
from ..files.architectures.blocks import block
from ..files.lora import LoRA
from ..files.metadata import RECIPE
from ..files.storage.texts import parsed
from ..merging.coefficients import Coefficients
from .attach import Attachment, Models, Site, attach, fingerprints, frozen
from .batches import Batch, join, seen, weighed
from .calibration import Draw, Predict, calibrate, seeded
from .gates import TEMPERATURE, Activation, BlockGates, activated, balance
from .least_squares import RIDGE, check_sound, column_solution, columns, costs_of, rank_solution
from .penalties import crossings, penalty
from .presets import PRESETS, Settings, settings
from .problems import problem
from .result import assemble, plan_sum
from .state import check_together, resumed, save_state

__all__ = ["PRESETS", "Learned", "Settings", "Step", "join", "mole", "settings", "ziplora"]


@dataclass(frozen=True)
class Step:
    """The result of one step."""

    step: int
    total: int
    fits: tuple[float, ...]
    """Each LoRA's term of the loss."""
    penalty: float
    loss: float


@dataclass
class Learned:
    """The result of learning."""

    lora: LoRA
    """The merge: an ordinary LoRA of rank Σr in every module that the LoRAs share."""
    coefficients: Coefficients | None
    """The same as weights of an ordinary merge of these LoRAs; None for the parametrisations ``down`` and ``rank``."""
    history: list[Step] = field(default_factory=list)
    """The steps of this run, without those before the checkpoint that it resumed from."""
    patterns: tuple[dict[str, float], ...] | None = None
    """For ``gates="block"``, each LoRA's weight by block: ``merge(loras, weights=learned.patterns)`` is `lora`."""


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
    on_step: Callable[[Step], bool | None] | None = None,
    reduce: Callable[[Sequence[Tensor]], None] | None = None,
    shard: int = 0,
    identity: Mapping[str, Any] | None = None,
) -> Learned:
    """Learn the merge of LoRAs on a model.

    Args:
        predict: The model as a function of a batch: the noise, velocity or flow that it predicts,
            with the batch as the first axis.
        models: The components that it runs, by name; their parameters get no gradients.
        loras: Any number, of any ranks.  Modules that only one of them has stay as they are.
        draw: Draws each LoRA's data.
        settings: How to learn.
        weights: Weight of each LoRA's term in the loss; 1 by default.
        checkpoint: File of the state; if it exists, learning goes on from it.
        every: Steps between two saved states; the last state is saved too.
        on_step: Called after every step, and after the save if one is due; False stops learning.
        reduce: Averages tensors over processes in place, when several learn together.
        shard: The number of this process among those, from 0: each learns from data of its own, begins with the
            same coefficients, and has a checkpoint of its own.
        identity: What else the run depends on, such as the base model and hashes of the data: a checkpoint must
            agree with it, and it is copied into the result's metadata.

    Raises:
        MergeError: The LoRAs don't fit the model or each other, share no module, or one of them
            changes nothing.
        NumberError: The loss became NaN or infinite; the last good state is in the checkpoint.
        OptionError: A weight is missing or below 0, or the checkpoint is of another run, or at another step than
            the other processes'.
        FileError: The checkpoint can't be read or written.
    """
    if settings.gates == "input":
        raise OptionError(
            "Gates that follow the picture (gates='input') fit in no LoRA file. Ways out: gates='block', or mole(), whose "
            "gates the composition mole draws with."
        )
    planned = plan_sum(loras)
    with _running(predict, models, loras, draw, settings, weights, every, shard, identity) as run:
        history = run.learn(checkpoint, every, on_step, reduce)
        options = {**asdict(settings), "weights": run.weights}
        lora = assemble(planned, run.factors(), "ziplora", options, run.about)
        return Learned(lora, run.coefficients(parsed(lora.metadata[RECIPE], RECIPE)), history, run.patterns())


def mole(
    predict: Predict,
    models: Models,
    loras: Sequence[LoRA],
    draw: Draw,
    settings: Settings = PRESETS["mole"],
    *,
    weights: Sequence[float] | None = None,
    checkpoint: Path | None = None,
    every: int = 10,
    on_step: Callable[[Step], bool | None] | None = None,
    reduce: Callable[[Sequence[Tensor]], None] | None = None,
    shard: int = 0,
    identity: Mapping[str, Any] | None = None,
) -> BlockGates:
    """Learn MoLE's gates, which follow the picture and the step: the composition ``mole`` draws with them.

    Wu et al., 2024, https://arxiv.org/abs/2404.13628.  Arguments and errors are those of `ziplora`; ``settings.gates``
    counts as ``"input"``.  LoRAs act in the denoiser only.
    """
    chosen = replace(settings, gates="input")
    plan_sum(loras)
    with _running(predict, models, loras, draw, chosen, weights, every, shard, identity) as run:
        run.learn(checkpoint, every, on_step, reduce)
        about = {"settings": asdict(chosen), "weights": run.weights, "learned_on": run.about}
        return replace(run.gates.on(), provenance=about)


@contextmanager
def _running(
    predict: Predict,
    models: Models,
    loras: Sequence[LoRA],
    draw: Draw,
    settings: Settings,
    weights: Sequence[float] | None,
    every: int,
    shard: int,
    identity: Mapping[str, Any] | None,
) -> "Iterator[_Run]":
    """Attach LoRAs to a model inside the block, to learn how they are merged."""
    if every < 1 or shard < 0:
        raise OptionError(f"ZipLoRA: every must be a number from 1 and shard one from 0; got {every} and {shard}.")
    shares = shares_of(weights, len(loras))
    with frozen(models), attach(models, loras) as attachment:
        yield _Run(predict, models, loras, draw, settings, shares, attachment, shard, dict(identity or {}))


def shares_of(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return the weight of each LoRA's term in the loss.

    Raises:
        OptionError: One is missing or below 0, or all are 0.
    """
    found = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(found) != count:
        raise OptionError(f"Weights given: {len(found)}, LoRAs: {count}.")
    if not all(0 <= weight < math.inf for weight in found) or not any(found):
        raise OptionError(f"weights must be non-negative and not all zero, got {found}.")
    return found


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
        shard: int,
        about: Mapping[str, Any],
    ) -> None:
        self.predict, self.models, self.loras, self.draw = predict, models, loras, draw
        self.settings, self.weights, self.attachment = settings, weights, attachment
        self.shard, self.about = shard, about
        self.architecture = next((lora.architecture for lora in loras if lora.architecture), None)
        self.present: dict[str, list[int]] = {}
        """The LoRAs in a module, or in all modules of its block if these share a gate."""
        for module, site in attachment.sites.items():
            self.present[self._group(module)] = sorted({*self.present.get(self._group(module), ()), *site.present})
        # What only one LoRA has stays as it is: nothing competes with it.
        self.sites = {m: site for m, site in attachment.sites.items() if len(self.present[self._group(m)]) > 1}
        self.competing = sorted({i for site in self.sites.values() for i in site.present})
        if not self.sites:
            raise MergeError(
                f"{', '.join(lora.name for lora in loras)} share no module of the model: there is nothing to learn. "
                "Way out: a merge with weights 1, which is exact."
            )
        self.generator = seeded(settings.seed, shard)
        self.scales: list[float] = []
        self.parameters: dict[str, nn.Parameter] = {}
        self.crossings: dict[str, Tensor] = {}
        if settings.penalty == "columns":
            self.crossings = {m: crossings(s.up, s.down, list(s.slices.values())) for m, s in self.sites.items()}
        if settings.gates == "input" and any(module.startswith("text") for module in self.sites):
            raise OptionError("Gates that follow the picture are the denoiser's. Way out: text_encoders=False.")

    def _group(self, module: str) -> str:
        """Return what shares a gate with a module: itself, or its block."""
        return module if self.settings.gates == "module" else block(module, self.architecture)

    def learn(
        self,
        checkpoint: Path | None,
        every: int,
        on_step: Callable[[Step], bool | None] | None,
        reduce: Callable[[Sequence[Tensor]], None] | None,
    ) -> list[Step]:
        """Take the steps that are left, and return them."""
        given = self.settings
        identity = self._identity() if checkpoint else {}
        optimizer, reached = self._begin(checkpoint, identity)
        if reduce:
            check_together(reached, reduce, "without checkpoints, a new run")
            if not reached:  # they are equal already if all devices round alike
                reduce([parameter.detach() for parameter in self.parameters.values()])

        def keep() -> None:
            if checkpoint:
                save_state(checkpoint, identity, reached, self.parameters, optimizer, self.generator, self.scales)

        history: list[Step] = []
        while reached < given.steps:
            before = self.generator.get_state()
            done = self._step(optimizer, reached, reduce)
            if not self._sound(done):
                self.generator.set_state(before)
                keep()
                raise NumberError(
                    f"ZipLoRA: the loss is {done.loss} at step {done.step}, or its gradients are not finite. Ways "
                    f"out: a smaller learning rate than {given.lr:g}, with another checkpoint if there is one; float32 "
                    "instead of float16."
                )
            if done.penalty < given.stop_below:
                self.generator.set_state(before)
                break
            optimizer.step()
            reached += 1
            history.append(done)
            if reached % every == 0:
                keep()
            if on_step and on_step(done) is False:
                break
        keep()
        return history

    def _begin(self, checkpoint: Path | None, identity: Mapping[str, Any]) -> tuple[torch.optim.Optimizer, int]:
        """Set up the parameters, from a checkpoint if there is one; return the optimiser and the steps done."""
        state = resumed(checkpoint, identity, self.settings.steps)
        start = state.tensors if state else self._start()
        homes = {name: site.down.device for m, site in self.sites.items() for name in (m, self._group(m))}
        anywhere = next(iter(homes.values()))
        self.parameters = {
            name: nn.Parameter(value.to(homes.get(name, anywhere), torch.float32)) for name, value in start.items()
        }
        if self.settings.gates == "input":
            weights = {name: value for name, value in self.parameters.items() if name != TEMPERATURE}
            present = {module: self.present[self._group(module)] for module in weights}
            kind = cast(Activation, self.settings.parametrisation)
            marks = fingerprints(self.loras)
            self.gates = BlockGates(weights, self.parameters[TEMPERATURE], present, kind, self.architecture, marks)
        optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=self.settings.lr, weight_decay=self.settings.weight_decay
        )
        if state:
            state.restore(optimizer, self.generator)
            self.scales = state.scales
        elif self.settings.loss == "normalised":
            self.scales = self._effects()
        return optimizer, state.step if state else 0

    def _sound(self, done: Step) -> bool:
        """Return whether the loss and all gradients are finite."""
        norms = [p.grad.norm() for p in self.parameters.values() if p.grad is not None]
        return math.isfinite(done.loss) and bool(torch.stack(norms).isfinite().all())

    def _start(self) -> dict[str, Tensor]:
        given, count = self.settings, len(self.loras)
        if given.gates == "input":
            return self._first_modules()
        if given.gated:
            return {self._group(m): torch.zeros(count) for m in self.sites}
        by_rank = given.parametrisation == "rank"
        if given.init == "lsq":
            found = self._closed_form()
        else:
            first = 1.0 if given.init == "ones" else 1.0 / count
            shapes = {m: s.owner.shape if by_rank else (count, s.columns) for m, s in self.sites.items()}
            found = {m: torch.full(shape, first) for m, shape in shapes.items()}
        if given.parametrisation != "down":
            return found
        return {m: site.down.float().cpu() * found[m][site.owner.cpu()] for m, site in self.sites.items()}

    def _first_modules(self) -> dict[str, Tensor]:
        """Return zeros for the first module of each block that runs, and for the temperature; the model runs once."""
        order: dict[str, Site] = {}
        self.attachment.listeners.append(lambda module, site, _x: order.setdefault(module, site))
        self._teach(*self._data(torch.Generator().manual_seed(self.settings.seed + 1)))
        self.attachment.listeners.clear()
        first: dict[str, str] = {}
        for module in order:
            if module in self.sites:
                first.setdefault(self._group(module), module)
        sizes = {module: len(order[module].present) * order[module].up.shape[0] for module in first.values()}
        count = len(self.loras)
        return {m: torch.zeros(size, count) for m, size in sizes.items()} | {TEMPERATURE: torch.zeros(())}

    def _closed_form(self) -> dict[str, Tensor]:
        """Return the least-squares factors per column, or per unit of rank."""
        given = self.settings
        by_rank = given.parametrisation == "rank"
        # Calibration attaches hooks of its own: these here must not add to the outputs that it sees.
        with self.attachment.silent():
            moments = calibrate(
                self.predict,
                self.models,
                self.loras,
                self.draw,
                kind="core" if by_rank else "gram",
                batches=given.calibration,
                batch_size=given.batch_size,
                seed=given.seed,
            )
        found = {}
        for module in self.sites:
            p = problem(self.loras, module, moments)
            with within(module):
                if by_rank:
                    m = rank_solution(p, RIDGE["rank"], 1.0)
                    loss = p.core_loss(torch.diag(m))
                else:
                    m = column_solution(p, RIDGE["column"], 1.0)
                    loss = p.loss(columns(p, m))
                check_sound(m, costs_of(p, loss), "sum")
            found[module] = m.float().cpu()
        return found

    def _effects(self) -> list[float]:
        """Measure the mean ‖εᵢ − ε_base‖² of each LoRA on its own data, the unit of the normalised loss."""
        count = len(self.loras)
        totals, sizes = [0.0] * count, [0.0] * count
        generator = torch.Generator().manual_seed(self.settings.seed + 1)
        for _ in range(self.settings.calibration):
            joint, rows = self._data(generator)
            with_lora = weighed(self._teach(joint, rows).float(), joint)
            base = weighed(self._teach(joint, torch.full_like(rows, -1)).float(), joint)
            for i, (changed, part) in enumerate(zip(self._parts(with_lora), self._parts(base), strict=True)):
                totals[i] += float((changed - part).square().mean())
                sizes[i] += float(part.square().mean())
        for lora, total, size in zip(self.loras, totals, sizes, strict=True):
            if not math.isfinite(total):
                raise NumberError(
                    f"ZipLoRA: the model's outputs with and without {lora.name} differ by {total}. "
                    "Way out: float32 or bfloat16."
                )
            if total <= 1e-12 * size:
                raise MergeError(
                    f"The LoRA {lora.name} changes nothing on its own data: there is nothing to preserve of it. "
                    "Ways out: prompts with its trigger word, or a merge without it."
                )
        return [total / self.settings.calibration for total in totals]

    def _data(self, generator: torch.Generator) -> tuple[Batch, Tensor]:
        """Draw one batch with examples of every LoRA; return it and the LoRA of each row."""
        size, count = self.settings.batch_size, len(self.loras)
        batches = []
        begin = generator.get_state()
        for i in range(count):
            if self.settings.shared_noise:
                generator.set_state(begin)
            batches.append(self.draw(i, generator, size))
        return join(batches), torch.arange(count).repeat_interleave(size)

    def _teach(self, joint: Batch, rows: Tensor) -> Tensor:
        self.attachment.only(rows).gates = None
        with torch.no_grad():
            taught = self.predict(seen(joint))
        self.attachment.check_all_ran()
        return taught

    def _step(
        self, optimizer: torch.optim.Optimizer, step: int, reduce: Callable[[Sequence[Tensor]], None] | None
    ) -> Step:
        """Take one step up to its gradients."""
        joint, rows = self._data(self.generator)
        teacher = self._teach(joint, rows)
        # The teacher goes first: checkpointed blocks run again in backward, and must find the student's state.
        self.attachment.all()
        if self.settings.gates == "input":
            self.attachment.gates = self.gates
        else:
            self.attachment.downs = {m: self._down(m) for m in self.sites}
        student = self.predict(seen(joint))
        fits = self._fits(weighed(student.float() - teacher.float(), joint))
        coupling = self._coupling()
        loss = sum((w * f for w, f in zip(self.weights, fits, strict=True)), fits[0].new_zeros(()))
        loss = loss + self.settings.lam * coupling
        optimizer.zero_grad()
        cast(Any, loss).backward()
        if reduce:
            reduce([p.grad for p in self.parameters.values() if p.grad is not None])
        numbers = tuple(float(f.detach()) for f in fits)
        return Step(step + 1, self.settings.steps, numbers, float(coupling.detach()), float(loss.detach()))

    def _columns(self, module: str) -> Tensor:
        """Return the coefficients m, ``(N, in·kh·kw)``."""
        if self.settings.parametrisation == "column":
            return self.parameters[module]
        return self._gate(self._group(module))[:, None].expand(-1, self.sites[module].columns)

    def _gate(self, group: str) -> Tensor:
        """Return the gates of a module or a block, ``(N,)``."""
        kind = cast(Activation, self.settings.parametrisation)
        return activated(self.parameters[group], kind, self.present[group])

    def _down(self, module: str) -> Tensor:
        if self.settings.parametrisation == "down":
            return self.parameters[module]
        site = self.sites[module]
        if self.settings.parametrisation == "rank":
            return site.down.float() * self.parameters[module][:, None]
        return site.down.float() * self._columns(module)[site.owner]

    def _fits(self, difference: Tensor) -> list[Tensor]:
        parts = self._parts(difference)
        if self.settings.loss == "norm":
            return [part.norm() for part in parts]
        squares = [part.square().mean() for part in parts]
        if self.settings.loss == "mse":
            return squares
        return [square / scale for square, scale in zip(squares, self.scales, strict=True)]

    def _parts(self, values: Tensor) -> Sequence[Tensor]:
        """Split an output of the model into each LoRA's rows."""
        size, count = self.settings.batch_size, len(self.loras)
        if values.shape[0] != size * count:
            raise MergeError(f"predict gave {values.shape[0]} rows for a batch of {size * count}.")
        return values.chunk(count)

    def _coupling(self) -> Tensor:
        given = self.settings
        if given.penalty == "none":
            return torch.zeros(())
        if given.penalty == "balance":
            found = [gate.mean(0) for gate in self.gates.opened.values()] if given.gates == "input" else None
            return balance(torch.stack(found or [self._gate(group) for group in self.parameters])[:, self.competing])
        terms = [
            penalty(given.penalty, self._columns(m)[site.present], self.crossings.get(m))
            for m, site in self.sites.items()
        ]
        total = torch.stack(terms).sum()
        return total / len(terms) if given.mean_penalty else total

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the learned ``up`` and ``down`` of every module that the LoRAs share."""
        return {m: (site.up, self._down(m).detach()) for m, site in self.sites.items()}

    def patterns(self) -> tuple[dict[str, float], ...] | None:
        """Return each LoRA's weight by block; None if that isn't what was learned."""
        if self.settings.gates != "block":
            return None
        gates = {group: self._gate(group).tolist() for group in self.parameters}
        return tuple(
            {group: gates[group][i] if group in gates else 1.0 for group, there in self.present.items() if i in there}
            for i in range(len(self.loras))
        )

    def coefficients(self, recipe: Mapping[str, Any]) -> Coefficients | None:
        """Return the same as weights of an ordinary merge; None if it isn't one."""
        if not self.settings.by_column:
            return None
        columns = {m: self._columns(m).detach().cpu().contiguous().numpy() for m in self.sites}
        return Coefficients.of(columns, self.loras, [1.0] * len(self.loras), recipe)

    def _identity(self) -> dict[str, Any]:
        """Return what a checkpoint must agree with to go on from it; the number of steps may differ."""
        kept = {k: v for k, v in asdict(self.settings).items() if k != "steps"}
        marks = fingerprints(self.loras)
        return {**self.about, "settings": kept, "LoRAs": marks, "weights": self.weights, "shard": self.shard}
