"""Put a composition to work in a pipeline of diffusers, whose code is not changed."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import MergeError, OptionError
from ...files.storage.digests import file_digest
from ...files.storage.paths import path_of
from ...learned.attach import Attachment, attach
from ..apply import check_bare, check_fits
from . import COMPOSITIONS, attention
from .base import Call, Composition, Drawing, Use
from .layouts import LAYOUTS
from .places import everywhere


@contextmanager
def composed(pipe: Any, uses: Sequence[Use], name: Composition | str = "blend", **options: Any) -> Iterator[None]:
    """Have several LoRAs at work in a pipeline inside the block; the pipeline is as it was afterwards.

    with composed(pipe, [Use(person, words="psq-person"), Use(jersey, words="barca24_jersey")], "regions"):
        pipe("a psq-person in a barca24_jersey").images[0]

    Any call of the pipeline works: image to image, inpainting, ControlNet, any scheduler.  LoRAs of text encoders act
    there at their weights, whatever the composition.

    Args:
        pipe: A pipeline with a UNet or a transformer, without LoRAs of its own.
        uses: LoRAs, at least one, of any dialect.
        name: A composition, or its name: see `COMPOSITIONS`.
        options: Its options.

    Raises:
        OptionError: An option is wrong; the pipeline has LoRAs or a composition already, or a part that torch.compile
            replaced.
        MergeError: A LoRA doesn't fit the model, or has a layer without a low-rank form.
    """
    composition = name if isinstance(name, Composition) else COMPOSITIONS[name]
    chosen = composition.check(options)
    _check(pipe, uses)
    models = {
        component: model
        for component in (*TEXT, *DENOISERS)
        if isinstance(model := getattr(pipe, component, None), nn.Module)
    }
    check_fits(pipe, [use.lora for use in uses])
    for use in uses:
        outside = next((module for module in use.lora if module.partition(".")[0] not in models), None)
        if outside:
            raise MergeError(
                f"{use.lora.name} changes {outside}, where compositions don't act: lora.exclude({outside!r})."
            )
    denoiser: Any = next(models[component] for component in DENOISERS if component in models)
    device = getattr(pipe, "_execution_device", denoiser.device)  # an offloaded model's weights are elsewhere
    with (
        _uncompiled(models.values()),
        attach(models, [use.lora for use in uses], denoiser.dtype, device) as attached,
    ):
        stage = _Stage(pipe, denoiser, uses, attached, lambda call: composition.function(call, **chosen))
        with stage.installed():
            yield


@dataclass(frozen=True)
class Composed:
    """LoRAs that are at work at once by a composition: a setting of `generate`."""

    uses: Sequence[Use]
    composition: str = "blend"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Use]:
        return iter(self.uses)

    def recipe(self) -> dict[str, Any]:
        """Return what a picture depends on beside the LoRAs and their weights."""
        composition = COMPOSITIONS[self.composition]
        options = composition.check(self.options)
        options |= {name: file_digest(path_of(options[name])) for name in composition.files() if options[name]}
        return {
            "composition": {"name": self.composition, "options": options, "uses": [_said(use) for use in self.uses]}
        }


def _said(use: Use) -> dict[str, Any]:
    return {
        "words": use.called,
        "noun": use.noun,
        "box": list(astuple(use.box)) if use.box else None,
        "mask": file_digest(path_of(use.mask)) if use.mask else None,
        "curve": [list(map(float, point)) for point in use.curve],
    }


def check_words(pipe: Any, setting: Composed, prompts: Sequence[str]) -> None:
    """Refuse prompts that lack the words by which LoRAs are to be found.

    Raises:
        OptionError: A LoRA has no words, or a prompt lacks them.
    """
    for use in setting.uses if COMPOSITIONS[setting.composition].placed else ():
        for prompt in prompts if use.found_by_words else ():
            attention.tokens(pipe, prompt, use.required())


TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3")
DENOISERS = ("unet", "transformer")


def _check(pipe: Any, uses: Sequence[Use]) -> None:
    if not uses:
        raise OptionError("Nothing to compose: wanted at least one LoRA.")
    denoiser = next((model for name in DENOISERS if (model := getattr(pipe, name, None)) is not None), None)
    if denoiser is None:
        raise OptionError(f"A {type(pipe).__name__} has neither a unet nor a transformer to compose LoRAs in.")
    if getattr(pipe, "transformer_2", None) is not None:
        raise OptionError(
            f"This {type(pipe).__name__} has two denoisers, and a composition works in one. Way out: from_pretrained(…, "
            "transformer_2=None), and LoRAs for the first."
        )
    if MARK in vars(denoiser):
        raise OptionError("A composition is at work in the pipeline already. Way out: one composition with all LoRAs.")
    check_bare(pipe)
    for name in (*TEXT, *DENOISERS):
        for module in model.modules() if isinstance(model := getattr(pipe, name, None), nn.Module) else ():
            if hasattr(module, "_orig_mod"):
                raise OptionError(
                    f"torch.compile replaced a module of {name} by a compiled one, which ignores what is attached to it. Ways "
                    f"out: pipe.{name}.compile(), or compose without torch.compile."
                )


MARK = "_loramerge_composition"


@contextmanager
def _uncompiled(models: Iterable[nn.Module]) -> Iterator[None]:
    """Run modules that compile() compiled in place as they were before: compiled code ignores what is attached later."""
    name = "_compiled_call_impl"
    with ExitStack() as restored:
        for module in (module for model in models for module in model.modules() if vars(module).get(name)):
            restored.callback(_restore, module, name, vars(module)[name])
            object.__setattr__(module, name, None)
        yield


class _Stage:
    """A pipeline with LoRAs attached, while a composition is at work."""

    def __init__(
        self,
        pipe: Any,
        denoiser: Any,
        uses: Sequence[Use],
        attached: Attachment,
        compose: Callable[[Call], Tensor],
    ) -> None:
        self.pipe, self.denoiser, self.uses, self.attached, self.compose = pipe, denoiser, uses, attached, compose
        self.drawing = Drawing()
        self.encode = pipe.encode_prompt
        self.encoding: Mapping[str, Any] = {}
        self.device = next(iter(attached.sites.values())).up.device
        self.signature = inspect.signature(denoiser.forward)
        self.sample = next(iter(self.signature.parameters))

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Take the place of the methods through which the pipeline draws."""
        scheduler = self.pipe.scheduler
        with ExitStack() as restored:
            for owner, name, ours in (
                (self.denoiser, "forward", self._forward),
                (self.pipe, "check_inputs", self._start),
                (self.pipe, "encode_prompt", self._encode),
                (scheduler, "step", self._step),
                (scheduler, "set_timesteps", self._begin),
            ):
                if not hasattr(owner, name):  # some pipelines check nothing
                    continue
                theirs = getattr(owner, name)
                restored.callback(_restore, owner, name, vars(owner).get(name))
                # Pipelines ask for the signatures: a scheduler that seems to take no generator gets none.
                object.__setattr__(owner, name, functools.wraps(theirs)(functools.partial(ours, theirs)))
            object.__setattr__(self.denoiser, MARK, True)
            restored.callback(delattr, self.denoiser, MARK)
            self._all_in_text()
            yield

    def _all_in_text(self) -> None:
        self.attached.gates = everywhere(torch.tensor([use.weight for use in self.uses], device=self.device))

    def _forward(self, theirs: Callable[..., Any], *args: Any, **named: Any) -> Any:
        bound = self.signature.bind(*args, **named)
        given = dict(bound.arguments)
        rows = len(given[self.sample])
        drawing = self.drawing
        drawing.pictures = drawing.pictures or rows
        if rows not in (drawing.pictures, 2 * drawing.pictures):
            raise OptionError(
                f"The pipeline runs {rows} rows for {drawing.pictures} pictures; wanted one per picture, or two with "
                "guidance. Ways out: no other guidance than the classifier-free one, one picture per prompt."
            )
        listed = isinstance(given[self.sample], list)

        def run(**given: Any) -> Tensor:
            found = theirs(**{**given, "return_dict": False})[0]
            return torch.stack(list(found)) if listed else found

        call = Call(
            run,
            given,
            self.sample,
            self.uses,
            self.attached,
            drawing,
            self._progress(),
            self.pipe,
            self.denoiser,
            self._encoded,
        )
        try:
            found = self.compose(call)
        finally:
            self._all_in_text()
        drawing.calls += 1
        sample: Any = list(found) if listed else found
        if not given.get("return_dict", True):
            return (sample,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=sample)

    def _progress(self) -> float:
        return self.drawing.step / max(1, len(self.pipe.scheduler.timesteps) - self.drawing.first)

    def _begin(self, theirs: Callable[..., Any], *args: Any, **named: Any) -> Any:
        self.drawing.first, self.drawing.step, self.drawing.calls, self.drawing.begun = 0, 0, 0, True
        self.drawing.memory.clear()
        return theirs(*args, **named)

    def _step(
        self, theirs: Callable[..., Any], output: Tensor, timestep: Any, sample: Tensor, *args: Any, **named: Any
    ) -> Any:
        if self.drawing.step == 0:  # before, the progress is 0 whatever follows
            self.drawing.first = _place(self.pipe.scheduler.timesteps, timestep)
        nudge = self.drawing.memory.pop("nudge", None)
        self.drawing.step, self.drawing.calls = self.drawing.step + 1, 0
        return theirs(output, timestep, sample if nudge is None else sample + nudge.to(sample), *args, **named)

    def _start(self, theirs: Callable[..., Any], *args: Any, **named: Any) -> Any:
        self.drawing = Drawing()
        return theirs(*args, **named)

    def _encode(self, theirs: Callable[..., Any], *args: Any, **named: Any) -> Any:
        if self.drawing.begun and not hasattr(self.pipe, "check_inputs"):  # nothing else says that a drawing begins
            self.drawing = Drawing()
        if self.drawing.pictures:  # a negative prompt that is encoded by itself
            return theirs(*args, **named)
        given = inspect.signature(theirs).bind(*args, **named).arguments
        prompt, embeds = given.get("prompt"), given.get("prompt_embeds")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        each = given.get("num_images_per_prompt", given.get("num_videos_per_prompt", 1))
        count = len(prompts) if prompts else len(embeds) if embeds is not None else 0
        self.drawing = Drawing([text for text in prompts for _ in range(each)] if embeds is None else [], count * each)
        self.encoding = given
        layout = LAYOUTS.get(type(self.denoiser).__name__)
        if layout is None or layout.tokenizers or not self.drawing.prompts:
            return theirs(*args, **named)
        with _read(self.pipe.text_encoder) as texts:
            found = theirs(*args, **named)
        self.drawing.ids = [ids for ids in self._told(texts, found[0]) for _ in range(each)]
        return found

    def _told(self, texts: Sequence[tuple[Tensor, Tensor]], seen: Tensor | list[Tensor]) -> list[list[int]]:
        """Return the tokens of each text that the denoiser sees: all, or those that are no padding nor the template's head."""
        if isinstance(seen, Tensor) and texts and len(texts[0][0]) == seen.shape[1]:
            return [ids.tolist() for ids, _ in texts]
        skipped = getattr(self.pipe, "prompt_template_encode_start_idx", 0)
        return [ids[mask].tolist()[skipped:] for ids, mask in texts]

    def _encoded(self, prompts: Sequence[str], lora: int) -> Mapping[str, Tensor]:
        """Encode prompts as the pipeline does, with one LoRA in the text encoders, or with none for a number below zero."""
        weights = torch.tensor([use.weight * (i == lora) for i, use in enumerate(self.uses)])
        self.attached.gates = everywhere(weights.to(self.device))
        own = {"prompt": list(prompts), "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        kept = {key: value for key, value in self.encoding.items() if key in ("device", "clip_skip", "lora_scale")}
        found = self.encode(**kept, **own)
        self._all_in_text()
        return {"prompt": found[0]} | ({"pooled": found[2]} if len(found) > 2 else {})


@contextmanager
def _read(encoder: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Read the tokens of each text that a text encoder gets in its first call inside the block, and which are no padding."""
    found: list[tuple[Tensor, Tensor]] = []

    def read(_module: nn.Module, args: Any, named: Mapping[str, Any]) -> None:
        ids = named.get("input_ids", args[0] if args else None)
        if not found and ids is not None:
            mask = named.get("attention_mask", torch.ones_like(ids)).bool()
            found.extend(zip(ids, mask, strict=True))

    handle = encoder.register_forward_pre_hook(read, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def _place(timesteps: Tensor, timestep: Any) -> int:
    """Return the place of a time step among the scheduler's; 0 if it isn't one of them."""
    at = torch.as_tensor(timestep).flatten()[:1].to(timesteps)
    return int(next(iter((timesteps == at).nonzero()), 0))


def _restore(owner: Any, name: str, before: Any) -> None:
    if before is None:
        object.__delattr__(owner, name)
    else:
        object.__setattr__(owner, name, before)
