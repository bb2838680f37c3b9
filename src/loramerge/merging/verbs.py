"""The verbs of merging: `plan`, `merge` and `resize`."""

import operator
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from ..devices import check_device
from ..errors import DialectError, MergeError, OptionError, check_callable, within
from ..files.architectures import ARCHITECTURES
from ..files.dialects import DIALECTS
from ..files.families import common, of_one_family
from ..files.lora import LoRA, without
from ..files.reading import Source, is_list, open, own
from ..files.writing import check_growth
from ..tensors import FLOATS, code, computed, fits_half
from .methods import Method, check_options, find
from .plans import Plan
from .ranks import Rank, budget
from .rules import Scope
from .running import Kept
from .spending import spent
from .steps import common_extras, steps_of
from .weights import Weights, resolve

if TYPE_CHECKING:
    from ..checkpoints.models import Checkpoint
    from ..files.storage.writer import Progress


def plan(
    loras: Sequence[LoRA | Source],
    *,
    weights: Weights = None,
    method: Method | str = "linear",
    rank: Rank = "sum",
    scope: Scope | None = None,
    exclude: Sequence[str] = (),
    device: str | None = None,
    max_error: float | str | None = None,
    energy: float | str | None = None,
    max_size: int | str | None = None,
    base: "Checkpoint | str | os.PathLike[str] | None" = None,
    progress: "Progress | None" = None,
    allow_growth: bool = False,
    **options: Any,
) -> Plan:
    """Plan a merge; the arguments are those of `merge`.

    Only headers are read, unless a budget is given: then every module is merged once to see
    what each rank brings, and ``progress`` is called with the number of modules done and of all.

    Raises:
        MergeError: Families or shapes differ, or a layer has no low-rank form.
        OptionError: A weight, the rank, the method or an option is wrong.
    """
    with ExitStack() as stack:
        given = [lora if isinstance(lora, LoRA) else stack.enter_context(open(lora)) for lora in _listed(loras)]
        model = None if base is None else _opened(base, given, stack)
        limit = budget(max_error, energy, max_size)
        opened = given
        rank = int(rank) if isinstance(rank, str) and re.fullmatch("[0-9]{1,9}", rank) else rank
        check_callable(progress=progress)
        left_out = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        if left_out:
            opened = without(opened, left_out)
            if not any(opened):
                raise OptionError(f"Nothing is left to merge: every module matches {' or '.join(left_out)}.")
        if not any(opened):
            raise MergeError("Nothing to merge: give at least one LoRA with a module.")
        if device is not None:
            check_device(device)
        chosen = find(method)
        checked = check_options(chosen, options)
        if chosen.count not in (None, len(opened)):
            raise OptionError(f"The method {chosen.name} merges {chosen.count} LoRAs, got {len(opened)}.")
        opened, architecture = of_one_family(opened)
        resolved = resolve(opened, chosen.weights if weights is None else weights, scope, model, exclude=left_out)
        weigh = None if resolved.deferred else resolved.of  # norms and learned weights aren't known from headers
        steps = steps_of(opened, chosen, checked, rank, model, weigh)
        if not steps:
            raise MergeError(_nothing(chosen, opened))
        if resolved.columns and chosen.name != "linear":
            raise OptionError(f"Learned coefficients are weights of the method linear; {chosen.name} takes numbers.")
        for module in () if resolved.deferred else steps:
            found = resolved.of(module)
            if chosen.allows:
                with within(module):
                    chosen.allows([found[i] for i in steps[module].inputs])
        planned = Plan(
            loras=tuple(opened),
            architecture=architecture,
            method=chosen,
            options=checked,
            weights=resolved,
            rank=rank if isinstance(rank, str) else operator.index(rank),
            steps=steps,
            name=" + ".join(lora.name for lora in opened),
            dialect=_dialect_for([lora.dialect for lora in opened], architecture),
            dtype=_dtype([opened[i] for i in sorted({i for step in steps.values() for i in step.inputs})]),
            device=device,
            extras=common_extras(opened[:1] if chosen.of_first else opened, weigh),
            base=model,
            given=tuple(given),
            exclude=left_out,
            allow_growth=allow_growth,
        )
        planned = spent(planned, limit, progress) if limit else planned
        stack.pop_all()  # what is open stays open for the plan
        return planned


def merge(
    loras: Sequence[LoRA | Source],
    *,
    weights: Weights = None,
    method: Method | str = "linear",
    rank: Rank = "sum",
    scope: Scope | None = None,
    exclude: Sequence[str] = (),
    device: str | None = None,
    max_error: float | str | None = None,
    energy: float | str | None = None,
    max_size: int | str | None = None,
    base: "Checkpoint | str | os.PathLike[str] | None" = None,
    progress: "Progress | None" = None,
    allow_growth: bool = False,
    **options: Any,
) -> LoRA:
    """Merge LoRAs of one model family into one, whatever tool made each.

    Args:
        loras: LoRAs, or what `load` takes.
        weights: One weight per LoRA: a number (which may be negative), a table of patterns such as
            ``{"*": 0.8, "text_encoder": 0}``, or ``"lbw:1,0,…"``; or a rule for all: ``"sum"`` is 1
            each, ``"uniform"`` 1/N each, ``"sqrt"`` 1/√N each, ``"l2"`` each LoRA's share of the norms,
            ``"equal"`` equal norms, ``"energy"`` and ``"energy-sum"`` keep the mean or the sum of
            ‖ΔWᵢ‖².  By default the method's own rule: ``"sum"`` for ``linear`` and ``subtract``,
            ``"uniform"`` for the others.
        method: Name of a merge method; ``"package.module:name"`` for one that isn't loramerge's own, or the `Method`
            itself.
        rank: ``"sum"`` is exact, ``"max"`` is the largest of the inputs' ranks, a number is that
            rank; below the sum, the result is the nearest one in Frobenius norm.
        scope: What a rule on norms takes them over: ``"module"`` (if None, for ``"l2"``), ``"component"``, or
            ``"whole"`` (for the others).
        exclude: Glob patterns of modules to leave out.
        device: The device to compute on, such as ``"cuda"``; by default the CPU, with numpy.
        max_error: Choose each module's rank so that the error of all together, ‖ΔW − kept‖ / ‖ΔW‖,
            is at most this: ``0.01`` or ``"1%"``.  At most one of the three budgets can be given.
        energy: The same for the share of ‖ΔW‖² that is kept, which is at least this: ``0.999``.
        max_size: The same for the size of the file in the LoRA's dialect: bytes, or ``"150MB"``.
        base: The base model, a checkpoint or its path.  With it DoRA layers merge too: their ΔW is
            dense and cut to the rank.  Whole differences of a weight need no base, but a number
            as the rank.
        progress: Called with the number of modules done and of all; with a budget this happens twice, while the
            ranks are chosen and while the merge is made.
        allow_growth: Allow a result more than ten times as large as the inputs, as exact sums of LoKrs and LoHas
            can be.
        **options: The options of the method.

    Returns:
        The merged LoRA, in memory.  To stream one to a file, save ``plan(…).lora()``.

    Raises:
        MergeError: Families or shapes differ, or a layer has no low-rank form.
        OptionError: A weight, the rank, the method or an option is wrong.
        NumberError: A value is NaN or infinite.

    Example:
        >>> from loramerge.testing import random_lora
        >>> person, jersey = random_lora("sd15", rank=4, seed=1), random_lora("sd15", rank=8, seed=2)
        >>> merge([person, jersey], weights=[0.7, 0.5]).summary("rank")
        'rank 12'
    """
    with ExitStack() as stack:
        opened = opened_in(stack, _listed(loras))
        planned = plan(
            opened,
            weights=weights,
            method=method,
            rank=rank,
            scope=scope,
            exclude=exclude,
            device=device,
            max_error=max_error,
            energy=energy,
            max_size=max_size,
            base=base,
            progress=progress,
            allow_growth=allow_growth,
            **options,
        )
        return small_enough(planned).in_memory(progress)


def resize(
    lora: LoRA | Source,
    *,
    rank: Rank = "sum",
    max_error: float | str | None = None,
    energy: float | str | None = None,
    max_size: int | str | None = None,
    exclude: Sequence[str] = (),
    base: "Checkpoint | str | os.PathLike[str] | None" = None,
    device: str | None = None,
    progress: "Progress | None" = None,
) -> LoRA:
    """Make the best fit to one LoRA at smaller ranks, as a merge of one.

    Args:
        lora: A LoRA, or what `load` takes.
        rank: The rank of every module, at most its own.
        max_error: As for `merge`.
        energy: As for `merge`.
        max_size: As for `merge`.
        exclude: As for `merge`: these modules are not in the result.
        base: As for `merge`.
        device: As for `merge`.
        progress: As for `merge`.

    Raises:
        MergeError: A layer has no low-rank form.
        OptionError: The rank or the budget is wrong, or can't be met.

    Example:
        >>> from loramerge.testing import random_lora
        >>> resize(random_lora("sd15", rank=8), rank=3).summary("rank")
        'rank 3'
    """
    if rank in ("sum", "max") and max_error is energy is max_size is None:
        raise OptionError("How small? Give rank, max_error, energy or max_size.")
    return merge(
        [lora],
        weights=[1.0],
        rank=rank,
        max_error=max_error,
        energy=energy,
        max_size=max_size,
        exclude=exclude,
        base=base,
        device=device,
        progress=progress,
    )


def small_enough(planned: Plan, kept: Kept | None = None) -> LoRA:
    """Return the result of a plan, before it is computed; the arguments of `Plan.lora` follow the plan.

    Raises:
        OptionError: It would be far larger than the LoRAs.
    """
    made = planned.lora(kept)
    # Plain LoRAs never grow so much; what the dialect can't hold may be saved in another.
    if any(layout.kind != "lora" or layout.has_core for lora in planned.given for layout in lora.layouts.values()):
        with suppress(DialectError):
            check_growth(made, planned.size, made.dialect)
    return made


def opened_in(stack: ExitStack, loras: "Sequence[LoRA | Source]") -> list[LoRA]:
    """Return the LoRAs; those that are given otherwise are open until the stack ends, and only what is merged is read."""
    return [lora if isinstance(lora, LoRA) else stack.enter_context(open(own(lora))) for lora in loras]


def _opened(base: "Checkpoint | str | os.PathLike[str]", loras: Sequence[LoRA], stack: ExitStack) -> "Checkpoint":
    """Return the base model; one that is given as a path is open until the stack ends."""
    from ..checkpoints.models import Checkpoint, open_checkpoint

    return base if isinstance(base, Checkpoint) else stack.enter_context(open_checkpoint(base, likely=common(loras)))


def _dialect_for(given: Sequence[str], architecture: str | None) -> str:
    """Choose the dialect of a merge: the first LoRA's, or one that can be written if that can only be read."""
    first = given[0]
    if DIALECTS[first].writes or (DIALECTS[first].can_write(first) and len(set(given)) == 1):
        return first
    if architecture is None:
        return next((name for name in given if DIALECTS[name].writes), first)
    return "kohya" if ARCHITECTURES[architecture].native else "diffusers-peft"


def _nothing(method: Method, loras: Sequence[LoRA]) -> str:
    """Say why a merge has no module."""
    if method.of_first and not loras[0]:
        return f"Nothing to merge: {method.name} changes the first LoRA, and {loras[0].name} has no module."
    first = f" of the first LoRA, which {method.name} changes," if method.of_first else ""
    return f"Nothing to merge: the weight{first} is 0 in every module. Way out: another weight."


def _dtype(loras: Sequence[LoRA]) -> str:
    """Choose the dtype of a result: that of the LoRAs; of float16 and bfloat16 the one that holds all values."""
    codes = {code for lora in loras for code in _dtypes(lora)}
    if not codes & {"F16", "BF16"} or codes & {"F32", "F64"}:
        return computed(list(codes))
    return "F16" if "BF16" not in codes or ("F16" in codes and all(map(_fits_half, loras))) else "BF16"


def _dtypes(lora: LoRA) -> list[str]:
    """Return the dtype that a LoRA would be saved in, or those of its tensors.

    The tensors of a merge are float32 until it is saved, so they don't say its dtype.
    """
    if lora.dtype:
        return [lora.dtype]
    return [
        found if (found := code(t)) in FLOATS else "F32"
        for layer in lora.layouts.values()
        for t in layer.tensors().values()
    ]


def _fits_half(lora: LoRA) -> bool:
    """Return whether float16 holds a LoRA's bfloat16 values with all their digits; small values in ``up`` can be scaled."""
    roles = {
        m: [r for r, t in layout.tensors().items() if (lora.dtype or code(t)) == "BF16"]
        for m, layout in lora.layouts.items()
    }
    for module in filter(roles.__getitem__, lora):
        tensors = lora[module].tensors()
        if not all(fits_half(tensors[role], role != "up") for role in roles[module]):
            return False
    return True


def _listed(loras: object) -> "Sequence[LoRA | Source]":
    if not is_list(loras):
        raise OptionError(f"Give a list of LoRAs, such as [a, b]; got a {type(loras).__name__}.")
    return loras
