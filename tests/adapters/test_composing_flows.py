"""Compositions on Wan, Qwen-Image, Z-Image and FLUX.2: laws, and attention held against the dense softmax."""

import zlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import flows
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loramerge as lm
from loramerge.diffusion import Use, composed, composition
from loramerge.diffusion.composing.attention import tokens
from loramerge.diffusion.composing.layouts import LAYOUTS, grid_of, layout_of
from loramerge.errors import OptionError
from loramerge.learned.attach import attach
from loramerge.scoring import Box
from loramerge.testing import random_layer

FAMILIES = list(flows.BUILDERS)
PROMPTS = ["a psq barca", "one barca and psq here"]
CALLS: dict[str, dict[str, Any]] = {
    "wan-1.3b": {"num_frames": 5, "guidance_scale": 3.0, "max_sequence_length": 40},
    "qwen-image": {"true_cfg_scale": 3.0, "negative_prompt": ["bad", "bad"]},
    "z-image": {"guidance_scale": 3.0, "height": 16, "width": 24},  # 24 places, filled up to 32
    "flux2-klein-4b": {"guidance_scale": 1.0, "max_sequence_length": 96},
}
UNCONFINED = ("embed", "txt_in", "img_in", "time")


@cache
def pipe_of(family: str) -> Any:
    torch.manual_seed(0)
    pipe = flows.BUILDERS[family]()
    for parameter in pipe.transformer.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def loras(family: str) -> tuple[lm.LoRA, lm.LoRA]:
    def lora(seed: int) -> lm.LoRA:
        layouts = {
            f"transformer.{name}": random_layer(
                tuple(module.weight.shape), rank=2, alpha=1.0, seed=zlib.crc32(f"{seed}{name}".encode())
            )
            for name, module in pipe_of(family).transformer.named_modules()
            if isinstance(module, nn.Linear) and not any(word in name for word in UNCONFINED)
        }
        return lm.LoRA(name=f"lora {seed}", architecture=family, dialect="diffusers-peft", layouts=layouts)

    return lora(1), lora(2)


def drawn(family: str, **more: Any) -> Tensor:
    pipe, count = pipe_of(family), len(PROMPTS)
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    given = {"prompt": list(PROMPTS), "height": 32, "width": 48, "num_inference_steps": 2} | CALLS[family] | more
    found = pipe(generator=generators, output_type="latent", **given)
    return found.frames if family == "wan-1.3b" else found.images


def by(family: str, uses: Sequence[Use], name: Any, more: dict[str, Any] | None = None, **options: Any) -> Tensor:
    with composed(pipe_of(family), uses, name, **options):
        return drawn(family, **(more or {}))


def summed(family: str) -> Tensor:
    """The LoRAs attached to the denoiser's modules, without a composition."""
    with attach({"transformer": pipe_of(family).transformer}, loras(family)):
        return drawn(family)


def worded(family: str) -> list[Use]:
    first, second = loras(family)
    return [Use(first, words="psq"), Use(second, words="barca")]


def close(one: Tensor, other: Tensor, most: float = 2e-3) -> bool:
    return float((one - other).abs().max()) <= most


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_regions_and_blend_with_the_others_in_full_are_the_sum(family: str) -> None:
    whole = [Use(each, box=Box()) for each in loras(family)]
    wanted = summed(family)

    assert close(by(family, whole, "regions"), wanted)
    assert close(by(family, worded(family), "blend", others=2.0), wanted)
    assert not close(drawn(family), wanted, 0.1), "the LoRAs have no effect, so the test shows nothing"
    assert not close(by(family, worded(family), "regions", warm=0.0), wanted, 1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_the_loras_does_not_matter(family: str) -> None:
    found, other = (by(family, worded(family)[::step], "regions", warm=0.0) for step in (1, -1))

    assert close(found, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_lora_alone_is_that_lora_and_the_pipeline_is_as_it_was(family: str) -> None:
    pipe, before = pipe_of(family), drawn(family)
    found = by(family, [Use(loras(family)[0], words="psq")], "blend")
    with attach({"transformer": pipe.transformer}, loras(family)[:1]):
        wanted = drawn(family)

    assert close(found, wanted)
    assert torch.equal(drawn(family), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.transformer.modules())
    assert not pipe.text_encoder._forward_pre_hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_places_of_a_box_and_words_get_the_gates_of_their_own_tokens(family: str) -> None:
    """Typed again: where each module's words and places are, for a box over the left third of the places."""
    uses = [Use(loras(family)[0], box=Box(right=1 / 3)), Use(loras(family)[1])]
    seen: dict[str, Tensor] = {}

    @composition("read", source="this test", passes="1")
    def reading(call: Any) -> Tensor:
        from loramerge.diffusion.composing import places

        height, width = call.grid[1:]
        masks = torch.ones(call.pictures, 2, height, width)
        masks[:, 0, :, width // 3 :] = 0
        words = torch.ones(call.pictures, 3, 2)
        words[:, 1, 1] = 0
        gate = places.gates(masks, call.weights, words, call.rows, call.grid, layout_of(call.model))

        def kept(module: str, site: Any, x: Tensor) -> Tensor:
            found = gate(module, site, x)
            seen.setdefault(module, found)
            return found

        return call.together(kept)

    by(family, uses, reading)
    height, width = (4, 6) if family == "z-image" else (8, 12)
    left = torch.zeros(height, width)
    left[:, : width // 3] = 1
    places_of = torch.stack([left, torch.ones(height, width)], -1).flatten(0, 1)
    words_of = torch.tensor([[1.0, 1], [1, 0], [1, 1]])
    samples = {
        "wan-1.3b": {"blocks.0.attn1.to_q": [places_of.repeat(3, 1)], "blocks.0.attn2.to_k": [words_of, 37]},
        "qwen-image": {
            "transformer_blocks.0.attn.to_q": [places_of],
            "transformer_blocks.0.txt_mlp.net.2": [words_of, ...],
        },
        "z-image": {
            "layers.0.attention.to_q": [places_of, 8, words_of, ...],
            "noise_refiner.0.feed_forward.w1": [places_of, 8],
            "context_refiner.0.attention.to_v": [words_of, ...],
        },
        "flux2-klein-4b": {
            "transformer_blocks.0.attn.to_k": [places_of],
            "transformer_blocks.0.ff_context.linear_in": [words_of, 93],
            "single_transformer_blocks.0.attn.to_qkv_mlp_proj": [words_of, 93, places_of],
        },
    }
    for module, parts in samples[family].items():
        found = seen[f"transformer.{module}"]
        told = len(found) // 2 if family == "z-image" else len(found)  # the rows with the prompt come first there
        for i, row in enumerate(found):
            for part in parts:
                if part is words_of and i >= told:
                    part = len(words_of)  # the words are of another prompt
                count = len(part) if isinstance(part, Tensor) else len(row) if part is ... else part
                wanted = part if isinstance(part, Tensor) else torch.ones(count, 2)
                assert torch.equal(row[:count], wanted), module
                row = row[count:]
            assert not len(row), module


@pytest.mark.parametrize("family", FAMILIES)
def test_words_are_found_among_the_tokens_that_the_denoiser_sees(family: str) -> None:
    """The text encoder's input is spelled back, and the columns' tokens are the words."""
    found: list[Tensor] = []
    pipe = pipe_of(family)

    @composition("read", source="this test", passes="1")
    def reading(call: Any) -> Tensor:
        found.append(call.once("pieces", lambda: call.pieces(["psq", "barca"])))
        ids.extend(call.drawing.ids or [pipe.tokenizer(prompt).input_ids for prompt in PROMPTS])
        return call.together()

    ids: list[list[int]] = []
    by(family, worded(family), reading)
    for picture, text in zip(found[0], ids, strict=False):
        for i, word in enumerate(["psq", "barca"]):
            where = picture[:, i].any(-1).nonzero().flatten().tolist()
            assert pipe.tokenizer.decode([text[j] for j in where]).strip() == word
            assert where == list(range(where[0], where[-1] + 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_to_words_is_the_dense_softmax_of_what_the_model_computes(family: str, monkeypatch: Any) -> None:
    """Queries and keys are taken where diffusers hands them to the attention itself, masks too."""
    dense: list[Tensor] = []
    theirs = F.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **named: Any) -> Tensor:
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        if attn_mask is not None:
            hidden = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask < -1e4
            scores = scores.masked_fill(hidden, -torch.inf)
        dense.append(scores.softmax(-1).sum(1))
        return theirs(query, key, value, attn_mask=attn_mask, **named)

    read: list[Any] = []

    @composition("read", source="this test", passes="1")
    def reading(call: Any) -> Tensor:
        columns = call.once("columns", call.columns)
        dense.clear()
        with call.looking([columns]) as passes:
            found = call.together()
        read.append((passes[0], columns, list(dense), call.grid))
        return found

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    by(family, worded(family), reading)
    maps, columns, matrices, grid = read[0]
    ((count, found),) = maps.items()
    length = columns.shape[1]
    total = torch.zeros_like(found)
    for matrix in matrices:
        if family == "wan-1.3b" and matrix.shape[-1] == length:
            total += (matrix @ columns).reshape(2, grid[0], count, 2).mean(1)
        elif family == "qwen-image":
            total += matrix[:, -count:, :length] @ columns
        elif family == "flux2-klein-4b" and matrix is matrices[0]:
            total += matrix[:, length:, :length] @ columns
        elif family == "z-image" and matrix.shape[-1] > 2 * 32:
            total += matrix[:2, :count, 32 : 32 + length] @ columns

    assert count == (24 if family == "z-image" else 96)
    assert float(total.abs().max()) > 1e-3
    torch.testing.assert_close(found, total, rtol=1e-4, atol=1e-6)


def test_a_pipeline_with_two_denoisers_and_a_family_of_unknown_words_are_refused(monkeypatch: Any) -> None:
    pipe = pipe_of("wan-1.3b")
    monkeypatch.setattr(pipe, "transformer_2", pipe.transformer, raising=False)
    with pytest.raises(OptionError, match="two denoisers"), composed(pipe, worded("wan-1.3b"), "blend"):
        pass
    monkeypatch.undo()
    monkeypatch.delitem(LAYOUTS, "WanTransformer3DModel")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"the words of a WanPipeline are isn't known.*box="):
        by("wan-1.3b", worded("wan-1.3b"), "blend")
    boxes = [Use(each, box=Box()) for each in loras("wan-1.3b")]
    assert by("wan-1.3b", boxes, "regions").isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_words_that_a_prompt_lacks_are_refused(family: str) -> None:
    with pytest.raises(OptionError, match="doesn't have the words 'dog'"):
        tokens(pipe_of(family), PROMPTS[0], "dog")
    with pytest.raises(OptionError, match="doesn't have the words 'dog'"):
        by(family, [Use(loras(family)[0], words="dog"), worded(family)[1]], "blend")


def test_clora_says_that_it_needs_cross_attention_of_pictures() -> None:
    with pytest.raises(OptionError, match="Ways out: blend, regions"):
        by("qwen-image", worded("qwen-image"), "clora")


def test_places_beside_reference_images_are_refused() -> None:
    with pytest.raises(OptionError, match="sees 40 places, and the picture has 4 × 6"):
        grid_of({"img_shapes": [[(1, 4, 6), (1, 4, 4)]]}, torch.zeros(1, 40, 8))
    with pytest.raises(OptionError, match="no height and width"):
        grid_of({}, torch.zeros(1, 40, 8))
    assert grid_of({"img_shapes": [[(1, 4, 6)]]}, torch.zeros(1, 24, 8)) == (1, 4, 6)
