"""Several LoRAs at work at once: laws that hold for every composition, on every kind of denoiser."""

import shutil
from collections.abc import Callable, Sequence
from functools import cache, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, cpu_offload_with_hook
from commands import done, run
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from tiny import attention, denoiser, lora, pipeline
from torch import Tensor

import loramerge as lm
from loramerge.diffusion import (
    COMPOSITIONS,
    Composed,
    Sampling,
    Use,
    applied,
    composed,
    composition,
    from_prompts,
    generate,
    load,
    read_composed,
)
from loramerge.diffusion.composing import places
from loramerge.diffusion.composing.attention import Maps, looking, tokens
from loramerge.diffusion.composing.clora import _masks, contrast
from loramerge.diffusion.composing.layouts import LAYOUTS, layout_of
from loramerge.diffusion.composing.regions import Regions
from loramerge.files import file_digest
from loramerge.learned import mole, settings
from loramerge.scoring import Box
from loramerge.scoring.png import recipe_in
from loramerge.testing import random_layer

FAMILIES = ["sdxl", "sd15", "sd3-medium", "flux"]
UNETS = ["sdxl", "sd15"]
PROMPT = "a psq barca"
EVERYWHERE = Box()
TOLERANCE = 2e-3
"""Of latents of size 40 and effects of the same size: the order of float32 sums differs from PEFT's."""


def changed(module: str) -> bool:
    """In attention, convolutions, feed-forward and modulation layers; no text encoders."""
    return attention(module) or module.endswith(
        ("conv1", "norm1.linear", "net.0.proj", "add_k_proj", "proj_out", "proj_mlp")
    )


@cache
def loras(architecture: str) -> tuple[lm.LoRA, lm.LoRA]:
    first, second = (lora(architecture, seed, only=changed) for seed in (1, 2))
    return first, second


@cache
def pipe_of(architecture: str) -> Any:
    return pipeline(architecture)


def drawn(pipe: Any, seeds: Sequence[int] = (0, 1), prompt: str = PROMPT, **more: Any) -> Tensor:
    longest = {"max_sequence_length": 16} if "Flux" in type(pipe).__name__ else {}
    given = {
        "prompt": [prompt] * len(seeds),
        "height": 32,
        "width": 32,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
    }
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(generator=generators, output_type="latent", **given | longest | more).images


def by(pipe: Any, uses: Sequence[Use], name: str, more: dict[str, Any] | None = None, **options: Any) -> Tensor:
    with composed(pipe, uses, name, **options):
        return drawn(pipe, **more or {})


def by_peft(pipe: Any, pairs: Sequence[tuple[lm.LoRA, float]], **more: Any) -> Tensor:
    with applied(pipe, pairs):
        return drawn(pipe, **more)


def close(one: Tensor, other: Tensor, most: float = TOLERANCE) -> bool:
    return float((one - other).abs().max()) <= most


def worded(architecture: str) -> list[Use]:
    first, second = loras(architecture)
    return [Use(first, words="psq"), Use(second, words="barca")]


def constant(architecture: str, *weights: float) -> list[Use]:
    return [Use(each, weight, curve=[(0, 1)]) for each, weight in zip(loras(architecture), weights, strict=True)]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_all_at_once_at_constant_weights_are_the_merged_file(architecture: str) -> None:
    pipe, (first, second) = pipe_of(architecture), loras(architecture)
    merged = lm.merge([first, second], weights=[0.7, 0.4])
    found = by(pipe, constant(architecture, 0.7, 0.4), "schedule")

    assert close(found, by_peft(pipe, [(merged, 1.0)]))
    assert not close(found, drawn(pipe), 0.5), "the LoRAs have no effect, so the test shows nothing"


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("name", [name for name in COMPOSITIONS if name not in ("schedule", "clora", "mole")])
def test_one_lora_alone_is_that_lora(architecture: str, name: str) -> None:
    pipe, (first, _) = pipe_of(architecture), loras(architecture)
    plain = by(pipe, [Use(first, curve=[(0, 1)])], "schedule")

    assert torch.equal(by(pipe, [Use(first, words="psq")], name), plain)
    assert close(plain, by_peft(pipe, [(first, 1.0)]))


@pytest.mark.parametrize("architecture", ["sdxl", "sd3-medium", "flux"])
def test_gates_that_are_equal_everywhere_are_the_average(architecture: str, tmp_path: Path) -> None:
    """Those of no step: their weights are zero."""
    pipe, both = pipe_of(architecture), loras(architecture)
    model = load(pipe, device="cpu")
    draw = from_prompts(model, both, [PROMPT, PROMPT], steps=1, trajectories=1, resolution=32)
    gates = mole(model.predict, model.models, both, draw, settings("mole", steps=0, loss="mse"))
    found = by(pipe, constant(architecture, 2, 2), "mole", gates=str(gates.save(tmp_path / "gates.safetensors")))

    assert close(found, by(pipe, constant(architecture, 1, 1), "schedule"))
    assert set(gates.present[next(iter(gates.weights))]) == {0, 1}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_regions_of_the_whole_picture_are_the_sum(architecture: str) -> None:
    pipe = pipe_of(architecture)
    whole = [Use(each, box=EVERYWHERE) for each in loras(architecture)]

    assert close(by(pipe, whole, "regions"), by(pipe, constant(architecture, 1, 1), "schedule"))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_blend_with_the_others_in_full_is_the_sum(architecture: str) -> None:
    pipe = pipe_of(architecture)

    assert close(
        by(pipe, worded(architecture), "blend", others=2.0), by(pipe, constant(architecture, 1, 1), "schedule")
    )


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("name", ["blend", "regions", "composite"])
def test_the_order_of_the_loras_does_not_matter(architecture: str, name: str) -> None:
    pipe, uses = pipe_of(architecture), worded(architecture)
    found = by(pipe, uses, name)

    assert close(found, by(pipe, uses[::-1], name))
    assert not close(found, by(pipe, constant(architecture, 1, 1), "schedule"), 0.1)


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("name", ["blend", "regions"])
def test_a_picture_does_not_depend_on_the_pictures_beside_it(architecture: str, name: str) -> None:
    pipe, uses = pipe_of(architecture), worded(architecture)
    both, alone = by(pipe, uses, name), by(pipe, uses, name, {"seeds": [1]})

    assert close(both[1:], alone)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_predictions_blend_at_the_border_of_two_boxes(architecture: str) -> None:
    """One step, so that each half of the picture is the first step of one LoRA alone."""
    pipe, (first, second) = pipe_of(architecture), loras(architecture)
    if architecture == "flux":
        pytest.skip("its latents are packed; the same code as below")
    halves = [Use(first, box=Box(right=0.5)), Use(second, box=Box(left=0.5))]
    once = {"num_inference_steps": 1}
    found = by(pipe, halves, "blend", once, others=0.0)
    middle = found.shape[-1] // 2

    assert close(found[..., :middle], by_peft(pipe, [(first, 1.0)], **once)[..., :middle])
    assert close(found[..., middle:], by_peft(pipe, [(second, 1.0)], **once)[..., middle:])


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_lora_with_an_empty_place_leaves_the_places_to_the_other(architecture: str) -> None:
    """It acts on words too, which belong to no place: the LoRAs of this test leave these alone."""
    pipe = pipe_of(architecture)

    def of_places(module: str) -> bool:
        return (
            module.endswith(("to_q", "conv1", "to_out.0", "proj_out")) and "context" not in module and changed(module)
        )

    first, second = (lora(architecture, seed, only=of_places) for seed in (1, 2))
    mask = np.zeros((8, 8), np.uint8)
    found = by(pipe, [Use(first, box=EVERYWHERE), Use(second, mask=picture(mask))], "regions")

    assert close(found, by_peft(pipe, [(first, 1.0)]), TOLERANCE) or architecture == "flux"


def picture(values: Any) -> str:
    import tempfile

    path = f"{tempfile.mkdtemp()}/mask.png"
    Image.fromarray(values).save(path)
    return path


def test_switch_runs_one_lora_after_the_other_as_peft_does_by_hand() -> None:
    """Zhong et al., algorithm 1, typed again: one adapter is active, and after some steps the next one."""
    pipe, both = pipeline("sdxl"), loras("sdxl")
    steps, every = {"num_inference_steps": 5}, 2
    found = by(pipe, [Use(each) for each in both], "switch", steps, every=every)
    for i, each in enumerate(both):
        pipe.load_lora_weights(each.state_dict("diffusers"), adapter_name=str(i))

    def next_one(pipe: Any, step: int, _time: Any, kept: dict[str, Any]) -> dict[str, Any]:
        pipe.set_adapters([str((step + 1) // every % 2)])
        return kept

    pipe.set_adapters(["0"])
    wanted = drawn(pipe, callback_on_step_end=next_one, **steps)

    assert close(found, wanted)
    assert not close(found, by_peft(pipeline("sdxl"), [(both[0], 1.0)], **steps), 0.1)


def test_composite_is_the_mean_of_predictions_by_peft() -> None:
    """Zhong et al., algorithm 2, typed again: one pass of the denoiser per LoRA, each alone."""
    pipe, both = pipe_of("sd15"), loras("sd15")
    model, plain = denoiser(pipe), {}
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    words = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(1))
    found = []
    with torch.no_grad():
        for each in both:
            with applied(pipe, [(each, 1.0)]):
                found.append(model(noise, 10, words).sample)
        with composed(pipe, [Use(each) for each in both], "composite"):
            plain = model(noise, 10, words, return_dict=False)[0]

    assert close(plain, torch.stack(found).mean(0))


@pytest.mark.parametrize("scheduler", [DDIMScheduler, HeunDiscreteScheduler, EulerAncestralDiscreteScheduler])
def test_every_scheduler_draws_the_same_and_counts_steps(scheduler: Any) -> None:
    pipe, (first, second) = pipeline("sdxl"), loras("sdxl")
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    seen: list[float] = []

    @composition("watched", source="this test", passes="1")
    def watched(call: Any) -> Tensor:
        seen.append(call.progress)
        return call.together()

    wanted = by_peft(pipe, [(first, 1.0), (second, 1.0)])
    with composed(pipe, [Use(first), Use(second)], watched):
        found = drawn(pipe)
        assert torch.equal(drawn(pipe), found)

    assert close(found, wanted)
    half = seen[: len(seen) // 2]
    assert half == [i / len(half) for i in range(len(half))] == seen[len(half) :]


def test_switch_counts_the_two_calls_of_heuns_steps_as_one() -> None:
    pipe, (first, second) = pipeline("sdxl"), loras("sdxl")
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    active: list[int] = []

    @composition("switch", source="this test", passes="1")
    def watched(call: Any, *, every: int = 1) -> Tensor:
        before = call.together
        call.together = lambda weights: active.append(int(weights.argmax())) or before(weights)
        return COMPOSITIONS["switch"].function(call, every=every)

    with composed(pipe, [Use(first), Use(second)], watched):
        drawn(pipe, num_inference_steps=4)

    assert active == [0, 0, 1, 1, 0, 0, 1]


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DDIMScheduler, DDPMScheduler])
def test_an_image_to_image_pipeline_starts_at_its_own_first_step(scheduler: Any) -> None:
    parts = pipe_of("sdxl").components
    pipe = StableDiffusionXLImg2ImgPipeline(**parts | {"scheduler": scheduler.from_config(parts["scheduler"].config)})
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen: list[float] = []

    @composition("watched", source="this test", passes="1")
    def watched(call: Any) -> Tensor:
        seen.append(call.progress)
        return call.together()

    with composed(pipe, [Use(loras("sdxl")[0])], watched):
        pipe(prompt=PROMPT, image=image, strength=0.5, num_inference_steps=8, output_type="latent")

    assert seen == [0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    "more", [{"guidance_scale": 1.0}, {"num_images_per_prompt": 2, "seeds": [0, 1, 2, 3], "prompt": PROMPT}]
)
def test_without_guidance_and_with_several_pictures_per_prompt(more: dict[str, Any]) -> None:
    pipe, uses = pipe_of("sdxl"), worded("sdxl")
    given = dict(more)
    if "num_images_per_prompt" in given:
        seeds = given.pop("seeds")
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with composed(pipe, uses, "blend"):
            found = pipe(
                PROMPT,
                num_images_per_prompt=4,
                generator=generators,
                num_inference_steps=3,
                guidance_scale=3.0,
                height=32,
                width=32,
                output_type="latent",
            ).images
        assert close(found[:2], by(pipe, uses, "blend"))
    else:
        assert close(
            by(pipe, uses, "blend", given, others=2.0), by_peft(pipe, [(use.lora, 1.0) for use in uses], **given)
        )


def test_a_negative_prompt_that_is_run_by_itself_has_no_words_of_the_loras() -> None:
    pipe, uses, more = pipe_of("flux"), worded("flux"), {"negative_prompt": ["bad"] * 2, "true_cfg_scale": 2.0}
    plain = by_peft(pipe, [(use.lora, 1.0) for use in uses], **more)

    assert close(by(pipe, uses, "blend", more, others=2.0), plain)
    assert not close(by(pipe, uses, "regions", more), by(pipe, uses, "regions"), 0.01)


@pytest.mark.parametrize("architecture", UNETS)
def test_attention_is_that_of_diffusers_own_processor(architecture: str) -> None:
    pipe = pipeline(architecture)
    model = denoiser(pipe)
    kept: list[Tensor] = []

    class Kept(AttnProcessor):
        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **named: Any) -> Tensor:
            theirs, attn.get_attention_scores = (
                attn.get_attention_scores,
                lambda *a: kept.append(theirs(*a)) or kept[-1],
            )
            try:
                return super().__call__(attn, hidden_states, *args, **named)
            finally:
                del attn.get_attention_scores

    for name, module in model.named_modules():
        if name.endswith("attn2"):
            module.set_processor(Kept())
    text = torch.randn(2, 24, 16 if architecture == "sdxl" else 8)
    added = {"text_embeds": torch.randn(2, 8), "time_ids": torch.zeros(2, 6)} if architecture == "sdxl" else None
    columns = torch.eye(24)[None, :, 3:5].expand(2, -1, -1)
    passes: list[Maps] = [{}]
    with torch.no_grad(), looking(model, passes, [columns], 2, (1, 8, 8)):
        model(torch.randn(2, 4, 8, 8), 10, text, added_cond_kwargs=added)

    wanted: dict[int, Tensor] = {}
    for probabilities in kept:
        summed = probabilities.unflatten(0, (2, -1)).sum(1)[..., 3:5]
        wanted[summed.shape[1]] = wanted.get(summed.shape[1], 0) + summed
    assert passes[0].keys() == wanted.keys()
    for count, found in passes[0].items():
        torch.testing.assert_close(found, wanted[count], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["sd3-medium", "flux"])
def test_joint_attention_is_the_dense_softmax_of_what_the_model_computes(architecture: str, monkeypatch: Any) -> None:
    """Queries and keys are taken where diffusers hands them to the attention itself."""
    pipe, uses = pipeline(architecture), worded(architecture)
    dense: list[Tensor] = []
    theirs = F.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Tensor:
        dense.append((query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1))
        return theirs(query, key, value, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    read: list[Any] = []

    @composition("read", source="this test", passes="1")
    def reading(call: Any) -> Tensor:
        columns = call.columns()
        dense.clear()
        with call.looking([columns]) as passes:
            found = call.together()
        read.append((passes[0], columns, list(dense)))
        return found

    with composed(pipe, uses, reading):
        drawn(pipe)

    maps, columns, matrices = read[0]
    ((places, found),) = maps.items()
    length = columns.shape[1]
    total = torch.zeros_like(found)
    for matrix in matrices:
        rows = matrix[-len(columns) :].sum(1)
        if rows.shape[1] == places + length and len(matrices) and matrix.shape[-1] == places + length:
            joint = rows[:, :places, places:] if architecture == "sd3-medium" else rows[:, length:, :length]
            total += joint @ columns
    singles = sum("single" in name and name.endswith("attn") for name, _ in denoiser(pipe).named_modules())
    if not singles:
        torch.testing.assert_close(found, total, rtol=1e-4, atol=1e-6)
    else:
        first = matrices[0][-len(columns) :].sum(1)[:, length:, :length] @ columns
        torch.testing.assert_close(found, first, rtol=1e-4, atol=1e-6)


def test_in_regions_a_lora_acts_on_all_words_but_those_of_others() -> None:
    pipe, (first, second) = pipe_of("sdxl"), loras("sdxl")
    uses = [Use(first, 0.5, words="psq"), Use(second, 2.0, words="barca")]
    read: list[Tensor] = []

    @composition("read", source="this test", passes="1")
    def reading(call: Any) -> Tensor:
        found, masks = Regions(call), torch.ones(call.pictures, 2, *call.latents.shape[-2:])
        gate = places.gates(masks, call.weights, found.words(), call.rows, found.grid, layout_of(call.model))
        module = next(name for name in call.attached.sites if name.endswith("attn2.to_k"))
        read.append(gate(module, call.attached.sites[module], call.given["encoder_hidden_states"]))
        return call.together()

    with composed(pipe, uses, reading):
        drawn(pipe)

    wanted = torch.tensor([0.5, 2.0]).repeat(4, 24, 1)
    prompts = slice(2, None)  # the first two rows are those of the negative prompt, whose words are others
    wanted[prompts, tokens(pipe, PROMPT, "barca"), 0] = 0
    wanted[prompts, tokens(pipe, PROMPT, "psq"), 1] = 0
    assert torch.equal(read[0], wanted)


def test_words_come_first_where_the_rows_with_the_prompt_do() -> None:
    words, masks = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.ones(1, 2, 4, 4)
    site = SimpleNamespace(convolution=None)
    for name, row in {"ZImageTransformer2DModel": 0, "UNet2DConditionModel": 1}.items():
        layout = LAYOUTS[name]
        module = "context_refiner.0.attention.to_k" if row == 0 else "attn2.to_k"
        found = places.gates(masks, torch.ones(2), words, 2, (1, 4, 4), layout)(
            f"x.{module}", site, torch.zeros(2, 2, 8)
        )
        assert torch.equal(found[row], words[0])
        assert torch.equal(found[1 - row], torch.ones(2, 2))


def regions_of(uses: Sequence[Use], read: Callable[[Any, Regions], Any], **more: Any) -> list[Any]:
    """Draw one picture, and return what `read` finds in the regions at every call."""
    found: list[Any] = []

    @composition("read", source="this test", passes="1", placed=True)
    def reading(call: Any) -> Tensor:
        regions = Regions(call)
        with regions.looking():
            predicted = call.together()
        found.append(read(call, regions))
        return predicted

    with composed(pipe_of("sdxl"), uses, reading):
        drawn(pipe_of("sdxl"), [0], **more)
    return found


@pytest.mark.parametrize(
    ("left", "right", "middle"),
    [
        (Box(right=0.75), Box(left=0.25), {"acting": [1.0, 0.0], "blending": [1.0, 0.0]}),
        (Box(right=0.25), Box(left=0.75), {"acting": [0.0, 0.0], "blending": [0.5, 0.5]}),
    ],
)
def test_a_hard_border_gives_each_place_to_one_lora_and_to_none_outside_of_all_boxes(
    left: Box, right: Box, middle: dict[str, list[float]]
) -> None:
    first, second = loras("sdxl")
    (found,) = regions_of(
        [Use(first, box=left), Use(second, box=right)],
        lambda _call, regions: {what: getattr(regions, what)(True) for what in middle},
        num_inference_steps=1,
    )
    for what, wanted in middle.items():
        masks = found[what][0]
        assert masks[:, 0, masks.shape[-1] // 2].tolist() == wanted
        assert masks[:, 0, 0].tolist() == [1.0, 0.0]
        assert masks[:, 0, -1].tolist() == [0.0, 1.0]


def test_beside_a_box_a_lora_found_by_words_keeps_out_of_it_and_the_box_holds_from_the_first_step() -> None:
    first, second = loras("sdxl")
    seen: list[Tensor] = []

    def gates(masks: Tensor, weights: Tensor, *_: Any) -> Tensor:
        seen.append(masks * weights[:, None, None])
        return weights

    uses = [Use(first, box=Box(right=0.5)), Use(second, words="barca")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "gates", gates)
        by(pipe_of("sdxl"), uses, "regions", {"num_inference_steps": 4, "seeds": [0]}, warm=0.5)

    assert len(seen) == 4
    for i, masks in enumerate(seen):
        half = masks.shape[-1] // 2
        boxed, worded = masks[0]
        assert boxed[:, :half].min() == 1
        assert boxed[:, half:].max() == 0
        if i < 2:
            assert worded.min() == worded.max() == 1
        else:
            assert worded[:, : half - 1].max() < 1e-6  # attention is read at half the size: a border of one place
            assert worded[:, half + 1 :].min() > 0.99


def test_a_mask_with_a_box_is_the_mask_within_it() -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    found = places.drawn(Box(left=0.5), picture(mask), (8, 8))
    wanted = torch.zeros(8, 8)
    wanted[:4, 4:] = 1
    assert found is not None
    assert torch.equal(found, wanted)


def test_the_second_attention_of_sd35_sees_places_and_no_words() -> None:
    name = "transformer.transformer_blocks.0.attn2.to_k"
    assert not LAYOUTS["SD3Transformer2DModel"].sees_words(name)
    assert LAYOUTS["SD3Transformer2DModel"].sees_words("transformer.transformer_blocks.0.attn.add_k_proj")
    assert LAYOUTS["UNet2DConditionModel"].sees_words(name)

    pipe = pipeline("sd3-medium")
    torch.manual_seed(0)
    config = {k: v for k, v in pipe.transformer.config.items() if not k.startswith("_")}
    model = type(pipe.transformer)(**{**config, "dual_attention_layers": (0,)}).eval()
    pipe.register_modules(transformer=model)
    shape = tuple(model.transformer_blocks[0].attn2.to_k.weight.shape)
    own = lm.LoRA(
        name="own",
        architecture=None,
        dialect="diffusers-peft",
        layouts={name.replace("to_k", part): random_layer(shape, rank=2, alpha=12.0) for part in ("to_k", "to_v")},
    )
    plain = drawn(pipe)
    assert not close(by(pipe, [Use(own, box=EVERYWHERE)], "regions"), plain, 0.01)
    assert torch.equal(by(pipe, [Use(own, mask=picture(np.zeros((8, 8), np.uint8)))], "regions"), plain)


def test_a_curve_may_jump_at_a_progress() -> None:
    use = Use(loras("sdxl")[0], 2.0, curve=[(0, 1), (0.5, 1), (0.5, 0), (1, 0)])
    assert [use.at(x) for x in (0, 0.25, 0.49, 0.5, 0.75, 1)] == [2, 2, 2, 0, 0, 0]
    up = Use(loras("sdxl")[0], curve=[(0, 0), (0.5, 0), (0.5, 1)])
    assert [up.at(x) for x in (0.49, 0.5)] == [0, 1]


def test_words_are_found_every_time_they_occur_and_only_there() -> None:
    pipe = pipe_of("sdxl")
    have = pipe.tokenizer("a psq and a psq").input_ids

    found = tokens(pipe, "a psq and a psq", "psq", 24)

    assert len(found) == 2 * len(pipe.tokenizer("psq", add_special_tokens=False).input_ids)
    assert pipe.tokenizer.decode([have[i] for i in found]).replace(" ", "") == "psqpsq"


def test_contrast_is_nt_xent() -> None:
    """Typed from the formula, pair by pair: -log e^{s_ap/t} / (e^{s_ap/t} + sum over negatives of e^{s_an/t})."""
    vectors = torch.rand(7, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    concept, temperature = torch.tensor([0, 1, 0, 1, 2, 2, 0]), 0.5
    losses = []
    for i, a in enumerate(vectors):
        negatives = [
            torch.exp(torch.cosine_similarity(a, n, 0) / temperature)
            for n, other in zip(vectors, concept, strict=True)
            if other != concept[i]
        ]
        for j, b in enumerate(vectors):
            if concept[j] == concept[i] and i != j:
                s = torch.exp(torch.cosine_similarity(a, b, 0) / temperature)
                losses.append(-torch.log(s / (s + sum(negatives))))

    assert float(contrast(vectors, concept, temperature)) == pytest.approx(float(sum(losses) / len(losses)), rel=1e-12)


@pytest.mark.parametrize(
    ("concept", "temperature", "wanted"),
    [
        ([0, 0, 0, 1, 1, 1], 0.5, 1.1858982084690786),
        ([0, 0, 0, 1, 1, 1], 0.07, 0.6790319919736166),
        ([0, 1, 0, 1, 2, 2], 0.5, 1.5259644530909382),
        ([0, 1, 0, 1, 2, 2], 0.07, 1.7423510752160931),
    ],
)
def test_contrast_is_that_of_pytorch_metric_learning(concept: list[int], temperature: float, wanted: float) -> None:
    """Numbers of its 2.9.0, ``NTXentLoss(temperature)(vectors, concept)``, which brings scikit-learn with it."""
    vectors = torch.arange(1, 31, dtype=torch.float64).reshape(6, 5).mul(0.7).sin().abs()

    assert float(contrast(vectors, torch.tensor(concept), temperature)) == pytest.approx(wanted, rel=1e-13)


def test_masks_of_clora_are_those_of_its_authors() -> None:
    """Their algorithm typed again, picture by picture: one mask per token, united; the base where there is none."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(3, 2, 12, 2, 3, generator=generator) ** 8
    maps[..., 1, 2] = 0  # the second name has two tokens
    wanted = []
    for picture in range(2):
        masks = [torch.zeros(12)]
        for slot, count in ((1, 3), (2, 2)):
            each = [maps[slot, picture, :, slot - 1, token] for token in range(count)]
            masks.append((torch.stack([(a > a.max() * 0.4).float() for a in each]).sum(0) >= 1).float())
        masks[0] = (torch.stack(masks).sum(0) == 0).float()
        wanted.append(torch.stack(masks) / torch.stack(masks).sum(0))

    torch.testing.assert_close(_masks(maps, 0.4), torch.stack(wanted))
    assert 0 < float(torch.stack(wanted)[:, 0].sum()) < 24, "the base has all or nothing, so the test shows little"


@pytest.mark.parametrize("architecture", UNETS)
def test_clora_draws_and_its_descent_lowers_the_contrast(architecture: str) -> None:
    pipe, (first, second) = pipe_of(architecture), loras(architecture)
    uses = [Use(first, words="psq", noun="x"), Use(second, words="barca", noun="y")]
    encodings: list[Any] = []
    theirs = pipe.encode_prompt
    pipe.encode_prompt = wraps(theirs)(lambda *a, **k: encodings.append(k) or theirs(*a, **k))
    plain = by(pipe, uses, "clora")
    del pipe.encode_prompt

    assert len(encodings) == 4, "the pipeline's own, and once per pass: not in every step"

    assert plain.isfinite().all()
    assert close(by(pipe, uses, "clora", step_size=1e-12), plain)
    assert not close(by(pipe, uses, "clora", step_size=20.0), plain)


def test_the_pipeline_is_as_it_was_after_a_composition_an_error_and_an_interruption() -> None:
    pipe, uses = pipeline("sdxl"), worded("sdxl")
    owners = (pipe, pipe.scheduler, denoiser(pipe))
    before, states = drawn(pipe), [dict(vars(owner)) for owner in owners]

    @composition("broken", source="this test", passes="1")
    def broken(call: Any) -> Tensor:
        call.together()
        raise KeyboardInterrupt

    by(pipe, uses, "blend")
    with pytest.raises(KeyboardInterrupt), composed(pipe, uses, broken):
        drawn(pipe)
    with pytest.raises(lm.errors.OptionError, match="doesn't have the words"), composed(pipe, uses, "blend"):
        drawn(pipe, prompt="a cat")

    assert [vars(owner).keys() for owner in owners] == [state.keys() for state in states]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in denoiser(pipe).modules())
    assert torch.equal(drawn(pipe), before)


def wrong(change: Callable[[Any, list[Use]], tuple[Any, list[Use], str, dict[str, Any]]]) -> str:
    pipe = pipeline("sdxl")
    pipe, uses, name, options = change(pipe, worded("sdxl"))
    with pytest.raises(lm.LoRAMergeError) as caught, composed(pipe, uses, name, **options):
        drawn(pipe)
    return str(caught.value)


def compiled(pipe: Any, part: str) -> Any:
    setattr(pipe, part, torch.compile(getattr(pipe, part)))
    return pipe


def with_lora(pipe: Any) -> Any:
    pipe.load_lora_weights(loras("sdxl")[0].state_dict("diffusers"), adapter_name="theirs")
    return pipe


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda pipe, uses: (pipe, [], "blend", {}), "at least one"),
        (lambda pipe, uses: (pipe, [Use(uses[0].lora), uses[1]], "blend", {}), "--words"),
        (lambda pipe, uses: (pipe, uses, "blend", {"other": 1}), "no option 'other'"),
        (lambda pipe, uses: (pipe, uses, "blend", {"others": -1.0}), "others wants a number"),
        (lambda pipe, uses: (pipe, uses, "blending", {}), "Unknown composition"),
        (lambda pipe, uses: (pipe, uses, "schedule", {}), "curve"),
        (lambda pipe, uses: (pipe, uses, "mole", {}), "zip --preset mole --set gates=input"),
        (lambda pipe, uses: (pipe, uses, "mole", {"gates": "nowhere.safetensors"}), "nowhere.safetensors"),
        (lambda pipe, uses: (pipe, [Use(loras("sd15")[0], words="psq")], "blend", {}), "another base model"),
        (lambda pipe, uses: (compiled(pipe, "unet"), uses, "blend", {}), "pipe.unet.compile()"),
        (lambda pipe, uses: (compiled(pipe, "text_encoder_2"), uses, "blend", {}), "pipe.text_encoder_2.compile()"),
        (lambda pipe, uses: (with_lora(pipe), uses, "blend", {}), "LoRAs already"),
        (lambda pipe, uses: (pipe, [Use(uses[0].lora, mask="nowhere.png"), uses[1]], "regions", {}), "nowhere.png"),
        (lambda pipe, uses: (pipe, [Use(uses[0].lora, box=EVERYWHERE), uses[1]], "clora", {}), "finds places by words"),
    ],
)
def test_what_cannot_be_composed_is_refused_by_name(change: Any, said: str) -> None:
    assert said in wrong(change)


@pytest.mark.parametrize("way", [cpu_offload, cpu_offload_with_hook])
@pytest.mark.parametrize("name", ["blend", "regions"])
def test_an_offloaded_model_is_composed_as_one_in_memory(way: Any, name: str) -> None:
    """With cpu_offload the weights are on the meta device between their uses, so that nothing can lean on their place."""
    pipe, uses = pipeline("sdxl"), worded("sdxl")
    wanted = by(pipe, uses, name)
    for part in (pipe.vae, pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        way(part, execution_device="cpu")
    hooked, forward = pipe.unet._hf_hook, pipe.unet.forward

    assert torch.equal(by(pipe, uses, name), wanted)
    assert pipe.unet._hf_hook is hooked
    assert pipe.unet.forward is forward
    if way is cpu_offload:
        assert next(pipe.unet.parameters()).is_meta


def test_a_model_compiled_in_place_runs_as_it_was_inside_the_block_and_is_compiled_behind_it() -> None:
    pipe, uses = pipeline("sdxl"), worded("sdxl")
    wanted = by(pipe, uses, "blend")
    parts = [pipe.unet, pipe.unet.mid_block.attentions[0].transformer_blocks[0]]
    called: list[int] = []
    for i, part in enumerate(parts):
        part._compiled_call_impl = lambda *_, i=i, **__: called.append(i)

    assert torch.equal(by(pipe, uses, "blend"), wanted)
    assert not called
    parts[1](None)
    assert called == [1]


def test_two_compositions_at_once_are_refused() -> None:
    pipe, uses = pipeline("sdxl"), worded("sdxl")
    with composed(pipe, uses, "blend"):
        found = drawn(pipe)
        with pytest.raises(lm.errors.OptionError, match="at work"), composed(pipe, uses, "regions"):
            pass
        assert torch.equal(drawn(pipe), found)


def test_pictures_have_the_composition_in_their_recipe_and_are_drawn_again_when_it_changes(tmp_path: Any) -> None:
    pipe, uses = pipe_of("sdxl"), worded("sdxl")

    def made(options: dict[str, Any]) -> Any:
        settings = {"both": uses, "both+blend": Composed(uses, "blend", options)}
        return generate(pipe, settings, [PROMPT], 1, tmp_path, sampling=Sampling(steps=2, height=32, width=32))

    plain, blended = made({})
    again = [each.reused for each in made({})]
    other = [each.reused for each in made({"others": 0.5})]

    assert again == [True, True]
    assert other == [True, False]
    found = recipe_in(blended.path)
    assert found is not None
    assert found["composition"]["options"] == {"others": 0.5, "hard": False}
    assert found["composition"]["uses"][0]["words"] == "psq"
    assert "composition" not in (recipe_in(plain.path) or {})


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    pairs = zip(loras("sdxl"), ("a", "b"), strict=True)
    return [lm.save(each, tmp_path / f"{name}.safetensors", dialect="kohya") for each, name in pairs]


def command(files: list[Path], base: Path, output: Path, *more: object) -> tuple[object, ...]:
    both = f"both={files[0]}+{files[1]}"
    few = ("-n", 1, "--steps", 2, "--size", 32, "--device", "cpu", "--no-none", "-p", PROMPT, "--architecture", "sdxl")
    return ("generate", "-b", base, "-o", output, "-l", both, *few, *more)


def test_the_command_draws_each_setting_of_several_loras_in_each_composition(
    files: list[Path], base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    placed = ("--words", "psq=person", "--words", "-", "--box", "-", "--box", "0.5,0,1,1")
    done(*command(files, base, out, "--compose", "blend", "--compose", "regions", "-O", "others=0", *placed))

    assert sorted(p.name for p in out.iterdir()) == ["both", "both+blend", "both+regions", "sheet.png"]
    first, second = (next((out / name).iterdir()) for name in ("both+blend", "both+regions"))
    recipe = recipe_in(first) or {}
    assert recipe["composition"]["name"] == "blend"
    assert recipe["composition"]["options"] == {"others": 0.0, "hard": False}
    assert recipe["composition"]["uses"][0] == {
        "words": "psq",
        "noun": "person",
        "box": None,
        "mask": None,
        "curve": [],
    }
    assert recipe["composition"]["uses"][1]["box"] == [0.5, 0, 1, 1]
    assert (recipe_in(second) or {})["composition"]["options"]["warm"] == 0.3


def test_gates_that_zip_learned_draw_by_the_composition_and_are_in_the_recipe(
    files: list[Path], base: Path, tmp_path: Path
) -> None:
    gates, out = tmp_path / "gates.safetensors", tmp_path / "out"
    quick = ("-s", "gates=input", "-s", "steps=1", "-s", "calibration=1", "--sampling-steps", 1, "--trajectories", 1)
    prompts = ("-p", "psq", "-p", "barca")
    said = done("zip", *files, "-b", base, "-o", gates, "--device", "cpu", "--preset", "mole", *prompts, *quick)
    done(*command(files, base, out, "--compose", "mole", "-O", f"gates={gates}"))

    assert "gates for 'generate --compose mole'" in said
    (drawn,) = (out / "both+mole").iterdir()
    assert (recipe_in(drawn) or {})["composition"]["options"]["gates"] == file_digest(gates)
    other = run("zip", *files, "-b", base, "-o", gates, "--preset", "mole", *prompts, *quick, "--coefficients", "c")
    assert "no coefficients" in str(other.exception)


DESCRIBED = """
[compose]
name = "regions"
options = { warm = 0.5 }
[[loras]]
path = "a.safetensors"
weight = 0.5
words = "psq"
noun = "person"
[[loras]]
path = "b.safetensors"
box = [0.5, 0, 1, 1]
mask = "mask.png"
curve = [[0, 1], [0.5, 0]]
"""


def test_a_recipe_with_a_composition_draws_what_the_command_line_does(
    files: list[Path], base: Path, tmp_path: Path
) -> None:
    shutil.copy(picture(np.full((8, 8), 255, np.uint8)), tmp_path / "mask.png")
    (tmp_path / "couple.toml").write_text(DESCRIBED)
    placed = ("--words", "psq=person", "--words", "-", "--box", "-", "--box", "0.5,0,1,1", "--curve", "-")
    masks = ("--curve", "0:1,0.5:0", "--mask", "-", "--mask", tmp_path / "mask.png", "-O", "warm=0.5")
    few = command(
        files, base, tmp_path / "out", "--compose", "regions", *placed, *masks, "-l", tmp_path / "couple.toml"
    )
    done(*(str(word).replace("a.safetensors", "a.safetensors:0.5") for word in few))

    one, other = (next((tmp_path / "out" / name).iterdir()) for name in ("couple", "both+regions"))
    assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))
    assert recipe_in(one) == recipe_in(other)
    result = run("merge", tmp_path / "couple.toml", "-o", tmp_path / "x.safetensors")
    assert "loramerge generate --lora couple.toml" in str(result.exception)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("[compose]", "[composed]", "no [compose]"),
        ("[compose]", 'method = "ties"\n[compose]', "unknown key 'method'"),
        ('"regions"', '"region"', "Did you mean 'regions'"),
        ("warm = 0.5", "warm = 2", "warm wants a number in [0, 1]"),
        ("weight = 0.5", 'weight = "lbw:1"', "one number per LoRA"),
        ("noun", "nuon", "unknown key 'nuon'. Did you mean 'noun'"),
        ("[0.5, 0, 1, 1]", "[0.5, 0, 1]", "box: got [0.5, 0, 1], wanted 4 numbers"),
        ("[0.5, 0, 1, 1]", "[0.5, 0, 2, 1]", "loras 2: box:"),
        ("[0.5, 0]]", "[5, 0]]", "progress from 0 to 1"),
        ('path = "a.safetensors"', 'path = "a.safetensors"\nsha256 = "00"', "has changed"),
        ('path = "a.safetensors"', 'path = "nowhere.safetensors"', "nowhere.safetensors"),
        ('words = "psq"', "words = 3", "words: got 3, a whole number, wanted text"),
        (DESCRIBED[DESCRIBED.index("[[loras]]") :], "", "no LoRA is named"),
        ("[compose]", "[compose", "is not TOML"),
    ],
)
def test_what_a_composition_recipe_has_wrong_is_said(
    files: list[Path], tmp_path: Path, before: str, after: str, said: str
) -> None:
    assert before in DESCRIBED
    (tmp_path / "couple.toml").write_text(DESCRIBED.replace(before, after, 1))

    with pytest.raises(lm.LoRAMergeError) as caught:
        read_composed(tmp_path / "couple.toml", architecture="sdxl")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--compose", "blendd"), "Did you mean"),
        (("--words", "psq"), "give --compose too"),
        (("--compose", "blend", "-O", "every=2"), "no option 'every'"),
        (("--compose", "blend", "-O", "others"), "others"),
        (("--compose", "schedule", "--curve", "2:1"), "a progress from 0 to 1 and a finite factor"),
        (("--compose", "schedule", "--curve", "now"), "wanted PROGRESS:FACTOR"),
        (("--compose", "blend", "--words", "psq", "--words", "dog"), "doesn't have the words 'dog'"),
        (("--compose", "blend", "--box", "0,0,2,1"), "from 0 to 1"),
        (("--compose", "switch", *("--words", "psq") * 3), "--words is given 3 times, and no setting has more than 2"),
    ],
)
def test_wrong_options_of_a_composition_are_said(
    files: list[Path], base: Path, tmp_path: Path, more: tuple[str, ...], said: str
) -> None:
    result = run(*command(files, base, tmp_path / "out", *more))

    assert isinstance(result.exception, lm.LoRAMergeError | SystemExit)
    assert said in f"{result.output}{result.exception}"
    assert not list(tmp_path.glob("out/*/*.png"))


def test_compositions_are_listed_with_their_options_and_costs() -> None:
    text = done("compositions")

    for name, each in COMPOSITIONS.items():
        assert name in text
        assert each.passes in text
        assert all(f"-O {option}=" in text for option in each.options)
