"""diffusers' converters of each family: of single-file checkpoints for the names, of LoRAs for files read and written."""

import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders import lora_pipeline as pipelines, single_file_utils as files

from loramerge import LoRA
from loramerge.files.architectures import ARCHITECTURES, hunyuan, lumina, model
from loramerge.files.architectures.names import Part, Parts
from loramerge.files.lora import from_tensors
from loramerge.layers import LowRank
from loramerge.tensors import Held
from loramerge.testing import relative_error

TOOLS: dict[str, Any] = json.loads(
    lzma.decompress((Path(__file__).parents[1] / "data" / "families.json.xz").read_bytes())
)
EXACT = 1e-6
"""Largest error of a module: the converters multiply scales into float32."""

CHECKPOINTS: dict[str, Callable[..., dict[str, torch.Tensor]]] = {
    "flux": files.convert_flux_transformer_checkpoint_to_diffusers,
    "chroma": files.convert_chroma_transformer_checkpoint_to_diffusers,
    **dict.fromkeys(
        ("sd3-medium", "sd3.5-medium", "sd3.5-large"), files.convert_sd3_transformer_checkpoint_to_diffusers
    ),
    **dict.fromkeys(
        ("flux2-dev", "flux2-klein-4b", "flux2-klein-9b"), files.convert_flux2_transformer_checkpoint_to_diffusers
    ),
    "hunyuanvideo": files.convert_hunyuan_video_transformer_to_diffusers,
    "auraflow": files.convert_auraflow_transformer_checkpoint_to_diffusers,
    "lumina2": files.convert_lumina2_to_diffusers,
    **dict.fromkeys(("wan-14b", "wan-1.3b", "wan-5b"), files.convert_wan_transformer_to_diffusers),
    **dict.fromkeys(("cosmos-predict2-2b", "anima"), files.convert_cosmos_transformer_checkpoint_to_diffusers),
    "z-image": files.convert_z_image_transformer_checkpoint_to_diffusers,
    "ltx2": files.convert_ltx2_transformer_to_diffusers,
    **dict.fromkeys(("ltxv-2b", "ltxv-13b"), files.convert_ltx_transformer_checkpoint_to_diffusers),
    "mochi": files.convert_mochi_transformer_checkpoint_to_diffusers,
    "krea2": files.convert_krea2_transformer_checkpoint_to_diffusers,
    "hidream": files.convert_hidream_transformer_to_diffusers,
    "ernie-image": files.convert_ernie_image_transformer_checkpoint_to_diffusers,
}
"""diffusers' converters of single-file checkpoints, which say what the rows of each native weight are."""

PARAMETERS = {"pos_embed", "pos_embed.pos_embed", "positional_encoding", "pos_frequencies", "register_tokens"}
"""Weights that are no layer's: they have no ``.weight``."""

NOT_RENAMED = {
    **dict.fromkeys(("sd3-medium", "sd3.5-medium", "sd3.5-large"), r"context_embedder"),
    "chroma": r"distilled_guidance_layer\.(in|out)_proj",
    **dict.fromkeys(("wan-14b", "wan-1.3b", "wan-5b"), r"patch_embedding"),
    **dict.fromkeys(
        ("ltx2", "ltxv-2b", "ltxv-13b"),
        r"(audio_)?(caption_projection\.linear_[12]|proj_out)|transformer_blocks\.\d+\.(audio_)?ff\.net\.(0\.proj|2)"
        r"|transformer_blocks\.\d+\.\w+\.to_(q|k|v|out\.0|gate_logits)",
    ),
    "lumina2": r"x_embedder",
}
"""Layers of which the native name is diffusers'.

Most converters leave alone what they don't know, so that a native name that is missing here would go unnoticed.
"""

LOADERS: dict[str, Any] = {
    "flux": pipelines.FluxLoraLoaderMixin,
    "chroma": pipelines.FluxLoraLoaderMixin,
    "sd3-medium": pipelines.SD3LoraLoaderMixin,
    **dict.fromkeys(("flux2-dev", "flux2-klein-4b", "flux2-klein-9b"), pipelines.Flux2LoraLoaderMixin),
    "hunyuanvideo": pipelines.HunyuanVideoLoraLoaderMixin,
    "auraflow": pipelines.AuraFlowLoraLoaderMixin,
    "lumina2": pipelines.Lumina2LoraLoaderMixin,
    **dict.fromkeys(("wan-14b", "wan-1.3b", "wan-5b"), pipelines.WanLoraLoaderMixin),
    "cosmos-predict2-2b": pipelines.CosmosLoraLoaderMixin,
    "anima": pipelines.AnimaLoraLoaderMixin,
    "z-image": pipelines.ZImageLoraLoaderMixin,
    "ltx2": pipelines.LTX2LoraLoaderMixin,
    **dict.fromkeys(("ltxv-2b", "ltxv-13b"), pipelines.LTXVideoLoraLoaderMixin),
    "mochi": pipelines.Mochi1LoraLoaderMixin,
    "krea2": pipelines.Krea2LoraLoaderMixin,
    "hidream": pipelines.HiDreamImageLoraLoaderMixin,
    "ernie-image": pipelines.ErnieImageLoraLoaderMixin,
    "qwen-image": pipelines.QwenImageLoraLoaderMixin,
    "ideogram4": pipelines.Ideogram4LoraLoaderMixin,
    "minimax-h3": pipelines.MiniMaxH3LoraLoaderMixin,
    "flux3": pipelines.Flux3LoraLoaderMixin,
    "ace-step": pipelines.AceStepLoraLoaderMixin,
    "bria-fibo2": pipelines.BriaFibo2LoraLoaderMixin,
    "cogview4": pipelines.CogView4LoraLoaderMixin,
    **dict.fromkeys(("kandinsky5-lite", "kandinsky5-pro", "kandinsky5-image"), pipelines.KandinskyLoraLoaderMixin),
    **dict.fromkeys(("sana-0.6b", "sana-1.6b", "sana-4.8b"), pipelines.SanaLoraLoaderMixin),
    "cogvideox-5b": pipelines.CogVideoXLoraLoaderMixin,
}
"""diffusers' readers of LoRA files."""

ONLY_DIFFUSERS_NAMES = "the loader has no converter of other names than diffusers'"
UNREAD = {
    "auraflow__comfyui": ONLY_DIFFUSERS_NAMES,
    "chroma__aitoolkit": "FLUX.1's loader takes lora_A behind diffusion_model. for diffusers' own names",
    "chroma__onetrainer-legacy": "FLUX.1's loader knows no distilled_guidance_layer behind lora_transformer_",
    "cosmos-predict2-2b__diffusion-pipe": ONLY_DIFFUSERS_NAMES,
    "flux1__bfl-control": "the converter wants every block, and its norms",
    "flux1__onetrainer-comfy": "FLUX.1's loader takes lora_A behind diffusion_model. for diffusers' own names",
    "flux1__onetrainer-original": "FLUX.1's loader takes lora_A without a prefix for diffusers' own names",
    "flux2-dev__onetrainer-comfy": "the converter stops at an alpha",
    "flux2-dev__onetrainer-original": "the loader wants diffusion_model. in front",
    "hunyuanvideo__comfyui": "the converter knows Tencent's names only",
    "hunyuanvideo__musubi": "the converter cuts alphas in three",
    "kandinsky5-lite__comfyui": ONLY_DIFFUSERS_NAMES,
    "krea2__musubi": "the converter takes diffusion_model. only",
    "lumina2__sdscripts": "the converter takes diffusion_model. only",
    "mochi__genmo": ONLY_DIFFUSERS_NAMES,
    "sd3-medium__kohya": ONLY_DIFFUSERS_NAMES,
    "qwen-image__aitoolkit-lokr": "the converter has no LoKr",
    "qwen-image__simpletuner-lokr": "the converter has no LoKr",
    "wan21-t2v-1.3b__musubi-lokr": "the converter has no LoKr",
    "wan21-t2v-14b__videox-fun": "the converter does not know lora_unet__",
    "wan22-ti2v-5b__diffsynth": "the loader wants diffusion_model. in front",
    "z-image__simpletuner-lokr": "the converter keeps LyCORIS' flat names",
    "anima__sdscripts": "the converter takes diffusion_model. only",
    "cogvideox-5b__videox-fun": ONLY_DIFFUSERS_NAMES,
    "flux1__simpletuner-lokr": "the converter has no LoKr",
    "flux1__diffsynth": "the converter does not know its names",
    "flux2-dev__diffsynth": "the loader wants diffusion_model. in front",
    "hunyuanvideo__onetrainer-legacy": "the loader has no converter of lora_transformer_",
    "wan21-t2v-1.3b__musubi-loha": "the converter has no LoHa",
    "wan21-t2v-1.3b__simpletuner-lokr": "the converter has no LoKr",
    "wan21-t2v-14b__diffsynth": "the loader wants diffusion_model. in front",
}
"""Files of today's tools of which diffusers loads nothing."""

NOT_TRIED = {
    "flux1__onetrainer-legacy": "the converter reads a part of its layers",
    "flux2-dev__aitoolkit-lokr": "as klein 4B's, with four times the rows and columns",
    "flux2-dev__simpletuner-lokr": "as klein 4B's, with four times the rows and columns",
    "z-image__diffusion-pipe": "the loader leaves attention.qkv as it is, see the known faults",
}

LOADED = [name for name, tool in TOOLS.items() if tool["family"] in LOADERS and name not in {*UNREAD, *NOT_TRIED}]

MISREAD = {
    (family, "comfyui"): {"transformer.norm_out.linear"} for family in ("flux2-dev", "flux2-klein-4b", "flux2-klein-9b")
}
"""The LoRA converter does not exchange the halves of final_layer.adaLN_modulation.1; the checkpoints' does."""

FLUX2_DROPPED = {
    "transformer.time_guidance_embed.guidance_embedder.linear_1",
    "transformer.time_guidance_embed.guidance_embedder.linear_2",
    "transformer.double_stream_modulation_img.linear",
    "transformer.double_stream_modulation_txt.linear",
    "transformer.single_stream_modulation.linear",
    "transformer.norm_out.linear",
}
DROPPED = {(family, "kohya"): FLUX2_DROPPED for family in ("flux2-dev", "flux2-klein-4b", "flux2-klein-9b")}
"""The converter of kohya's names has no such names, and says so in the log."""

INSIDE = {
    ("flux", "kohya"): "what is outside of the blocks gets names without transformer.",
    ("flux", "comfyui"): "what is outside of the blocks gets names without transformer.",
    ("chroma", "kohya"): "the converter refuses distilled_guidance_layer",
    ("chroma", "comfyui"): "the converter refuses distilled_guidance_layer",
    ("ideogram4", "comfyui"): "the converter refuses what is outside of the blocks",
    ("lumina2", "comfyui"): "the converter refuses what is outside of the blocks",
    ("ltxv-2b", "comfyui"): "the converter leaves patchify_proj and adaln_single as they are",
    ("ltxv-13b", "comfyui"): "the converter leaves patchify_proj and adaln_single as they are",
    **{
        (f"wan-{size}", "kohya"): "the converter looks for a block's number in every name"
        for size in ("14b", "1.3b", "5b")
    },
}
"""Dialects of which diffusers reads the blocks only."""

BOTH = ("kohya", "comfyui")
READ = {name: ARCHITECTURES[name].diffusers_reads for name in LOADERS}
"""Dialects beside its own that diffusers reads."""

WRITTEN = [(family, dialect) for family in LOADERS for dialect in (*READ.get(family, ()), "diffusers-peft")]

RENAMED = (
    ("_attn_qkv", "_attn.qkv"),
    ("_attn_proj", "_attn.proj"),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.2"),
    ("_mod.linear", "_mod.lin"),
    ("modulation.linear", "modulation.lin"),
    ("t_embedder.mlp.0", "t_embedder.in_layer"),
    ("t_embedder.mlp.2", "t_embedder.out_layer"),
    ("c_embedder.linear_1", "c_embedder.in_layer"),
    ("c_embedder.linear_2", "c_embedder.out_layer"),
    ("_in.mlp.0", "_in.in_layer"),
    ("_in.mlp.2", "_in.out_layer"),
)
"""What ComfyUI changes in Tencent's names: comfy/supported_models.py, HunyuanVideo."""


@cache
def shapes(family: str) -> Mapping[str, tuple[int, ...]]:
    return model(ARCHITECTURES[family].model)


@cache
def native(family: str) -> Mapping[str, Parts]:
    """The names that diffusers' converter of checkpoints reads."""
    own = {"hunyuanvideo": hunyuan.tencent, "z-image": lumina.z_image}
    found = own[family](shapes(family)) if family in own else ARCHITECTURES[family].native_paths
    return {
        path: parts for path, parts in found.items() if parts[0].module.startswith("transformer.") and not new(parts)
    }


def new(parts: Parts) -> bool:
    """Whether a weight is of LTX-2.3, of which diffusers has no converter."""
    return "prompt_adaln" in parts[0].module


def comfyui(path: str) -> str:
    for old, new in RENAMED:
        path = path.replace(old, new)
    return path


@cache
def stems(family: str) -> Mapping[str, str]:
    """The native path of each name that a file may have for it."""
    found = {}
    for path in native(family):
        for spelling in (path, comfyui(path)) if family == "hunyuanvideo" else (path,):
            flat = spelling.replace(".", "_")
            names = (spelling, f"diffusion_model.{spelling}", f"transformer.{spelling}")
            found |= dict.fromkeys((*names, f"lora_unet_{flat}", f"lora_unet__{flat}"), path)
    return found


def rows(family: str, parts: Parts) -> int:
    return sum(shapes(family)[part.module.partition(".")[2]][0] for part in parts)


def converted(family: str, columns: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What becomes of one column of each native weight, by module; of columns of zeros for the other weights."""
    zero = torch.zeros(1, 1, dtype=torch.float64)
    weights = {path: columns.get(path, zero.expand(rows(family, parts), 1)) for path, parts in native(family).items()}
    stored = {f"{path}.{end}": column for path, column in weights.items() for end in ("weight", "bias", "scale")}
    found = CHECKPOINTS[family](stored | dict.fromkeys(PARAMETERS, zero))
    return {f"transformer.{m}": found[f"{m}.weight" if f"{m}.weight" in found else m] for m in layers(family)}


def layers(family: str) -> list[str]:
    return [module for module in shapes(family) if module not in PARAMETERS and "prompt_adaln" not in module]


def taken(part: Part, column: torch.Tensor) -> torch.Tensor:
    return column if part.rows is None else torch.cat([column[start:stop] for start, stop in part.rows])


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_every_native_name_is_that_of_the_checkpoint_that_diffusers_converts(family: str) -> None:
    ends = np.cumsum([0, *(rows(family, parts) for parts in native(family).values())])
    columns = {
        path: torch.arange(start, stop, dtype=torch.float64)[:, None]
        for path, start, stop in zip(native(family), ends, ends[1:], strict=False)
    }

    found = converted(family, columns)

    wanted = {part.module: taken(part, columns[path]) for path, parts in native(family).items() for part in parts}
    assert {m for m in found if not torch.equal(found[m], wanted[m])} == set()


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_no_native_name_is_diffusers_but_the_known(family: str) -> None:
    same = [m for m, shape in shapes(family).items() if m in native(family) and is_layer(m, shape)]

    if ARCHITECTURES[family].native_paths.keys() != shapes(family).keys():
        assert [m for m in same if not re.fullmatch(NOT_RENAMED.get(family, ""), m)] == []


@pytest.mark.parametrize("family", ["hunyuanvideo", "hunyuanvideo15", "hunyuanimage"])
def test_comfyui_names_of_the_hunyuan_models_are_tencents_renamed(family: str) -> None:
    wanted = {comfyui(path): parts for path, parts in hunyuan.tencent(shapes(family)).items()}

    assert hunyuan.comfyui(shapes(family)) == wanted
    assert [m for m, shape in shapes(family).items() if m in wanted and is_layer(m, shape)] == []


def is_layer(module: str, shape: tuple[int, ...]) -> bool:
    """Whether it is one that LoRAs are made for."""
    return len(shape) > 1 and not re.search(r"_table$|_token$", module) and module not in PARAMETERS


def probe(columns: int) -> np.ndarray:
    return np.random.default_rng(columns).standard_normal((columns, 3))


def product(up: Any, down: Any) -> np.ndarray:
    """What ΔW does to three random vectors."""
    a, b = (np.asarray(factor, np.float64) for factor in (up, down))
    flat = b.reshape(len(b), -1)
    found: np.ndarray = a.reshape(len(a), -1) @ (flat @ probe(flat.shape[1]))
    return found


def kron(first: Any, second: Any) -> np.ndarray:
    """What a Kronecker product does to three random vectors."""
    a, b = (np.asarray(factor, np.float64) for factor in (first, second))
    vectors = probe(a.shape[1] * b.shape[1]).reshape(a.shape[1], b.shape[1], -1)
    found: np.ndarray = np.einsum("ia,jb,abk->ijk", a, b, vectors, optimize=True)
    return found.reshape(len(a) * len(b), -1)


def ours(lora: LoRA) -> dict[str, np.ndarray]:
    """What ΔW of each module of the transformer does to three random vectors."""
    found = {}
    for module in lora:
        layout = lora.layout(module)
        if layout.factored and not module.startswith("text_encoder"):
            delta = None if isinstance(layout, LowRank) else np.asarray(lora[module].delta())
            found[module] = product(*lora[module].factors()) if delta is None else delta @ probe(delta.shape[1])
    return found


def theirs(family: str, keys: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> dict[str, np.ndarray]:
    """What ΔW of each module does to three random vectors after diffusers' reader of LoRAs."""
    stored = {key: torch.from_numpy(np.array(value)) for key, value in keys.items()}
    found = LOADERS[family].lora_state_dict(stored)
    said = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    scale = said["transformer.lora_alpha"] / said["transformer.r"] if said else 1.0
    effects = {
        stem: scale * product(found[f"{stem}.lora_B.weight"], found[f"{stem}.lora_A.weight"])
        for stem in stems_of(found, ".lora_A.weight")
    }
    for stem in stems_of(found, ".lokr_w1"):
        effects |= parted(stem, kron(found[f"{stem}.lokr_w1"], found[f"{stem}.lokr_w2"]))
    return {stem: effect for stem, effect in effects.items() if not stem.startswith("text_encoder")}


def stems_of(found: Mapping[str, Any], end: str) -> list[str]:
    return [key.removesuffix(end) for key in found if key.endswith(end)]


FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}
"""For a LoKr diffusers fuses FLUX.2's own projections."""


def parted(stem: str, effect: np.ndarray) -> dict[str, np.ndarray]:
    block, _, name = stem.rpartition(".")
    names = FUSED.get(name, (name,))
    return {f"{block}.{part}": rows for part, rows in zip(names, np.split(effect, len(names)), strict=True)}


def errors(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The modules that are not alike; those that one side lacks have no error."""
    both = found.keys() & wanted.keys()
    apart = {module: relative_error(found[module], wanted[module]) for module in both}
    return {m: e for m, e in apart.items() if not e <= EXACT} | dict.fromkeys(found.keys() ^ wanted.keys(), np.nan)


@cache
def pool() -> np.ndarray:
    return np.random.default_rng(7).standard_normal(3_000_000, dtype=np.float32)


def values(key: str, shape: tuple[int, ...]) -> np.ndarray:
    if not shape:
        return np.array(1, np.float32)
    size, seed = int(np.prod(shape)), zlib.crc32(key.encode())
    start = seed % (len(pool()) - size)
    return pool()[start : start + size].reshape(shape)


def first(key: str, blocks: int) -> bool:
    """Whether a key or module is of the first blocks, or of none."""
    found = re.search(r"(?:blocks|layers|refiner)[._](\d+)[._]", key)
    return found is None or int(found[1]) < blocks


def file(name: str) -> dict[str, np.ndarray]:
    """The first two blocks of a listing, and what is outside of blocks."""
    keys = {key: tuple(shape) for key, (_, shape) in TOOLS[name]["keys"].items() if first(key, 2)}
    if "lokr" in name:
        keys = {
            key: shape for key, shape in keys.items() if re.search(r"[._]0[._].*(qkv|to_[qk]|proj|self_attn_q)", key)
        }
    return {key: values(key, shape) for key, shape in keys.items()}


def read(name: str, keys: Mapping[str, np.ndarray]) -> LoRA:
    held = {key: Held(value) for key, value in keys.items()}
    return from_tensors(held, TOOLS[name]["metadata"], name, architecture=TOOLS[name]["family"])


@pytest.mark.parametrize("name", LOADED)
def test_a_tools_file_has_the_deltas_that_diffusers_reads_in_it(name: str) -> None:
    keys = file(name)

    lora = read(name, keys)

    assert errors(theirs(TOOLS[name]["family"], keys, TOOLS[name]["metadata"]), ours(lora)) == {}


@pytest.mark.parametrize("name", UNREAD)
def test_of_some_tools_files_diffusers_reads_nothing(name: str) -> None:
    keys = file(name)

    try:
        found = theirs(TOOLS[name]["family"], keys, TOOLS[name]["metadata"])
    except (ValueError, KeyError, RuntimeError, NotImplementedError):
        found = {}

    assert not found.keys() & read(name, keys).keys()


def weights_of(family: str, keys: Iterable[str]) -> set[str]:
    """The native paths in a file's keys, and the empty one for a key that has none."""
    return {stems(family).get(re.split(r"\.(?:lora|alpha|dora)", key)[0], "") for key in keys}


NATIVE = [
    name
    for name, tool in TOOLS.items()
    if tool["family"] in CHECKPOINTS and "lora_adapter_metadata" not in tool["metadata"]
    if "" not in weights_of(tool["family"], tool["keys"])
]
"""Files whose names are all native ones, and whose scale is in their tensors."""


def as_weights(family: str, keys: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What ΔW of each module does to three random vectors, by the converter of checkpoints."""
    columns = {}
    for key in keys:
        if match := re.fullmatch(r"(.*)\.lora_(?:A|down)((?:\.default)?(?:\.weight)?)", key):
            stem, end = match.groups()
            up = keys.get(f"{stem}.lora_B{end}", keys.get(f"{stem}.lora_up{end}"))
            alpha = float(keys.get(f"{stem}.alpha", len(keys[key])))
            effect = alpha / len(keys[key]) * product(up, keys[key])
            columns[stems(family)[stem]] = torch.from_numpy(effect)
    found = converted(family, columns)
    return {module: column.numpy() for module, column in found.items() if column.any()}


@pytest.mark.parametrize("name", NATIVE)
def test_a_tools_file_has_the_deltas_that_its_native_names_have_in_a_checkpoint(name: str) -> None:
    keys = file(name)

    lora = read(name, keys)

    assert errors(as_weights(TOOLS[name]["family"], keys), ours(lora)) == {}


def of_native_names(family: str) -> dict[str, np.ndarray]:
    """A file of rank 2 on the native weights of the first block, and of what is outside of blocks."""
    found = {}
    for path, parts in native(family).items():
        weights = [(m, shapes(family)[m]) for m in (part.module.partition(".")[2] for part in parts)]
        if all(is_layer(m, shape) and len(shape) == 2 and first(m, 1) for m, shape in weights):
            found[f"diffusion_model.{path}.lora_A.weight"] = values(f"{path}A", (2, weights[0][1][1]))
            found[f"diffusion_model.{path}.lora_B.weight"] = values(f"{path}B", (rows(family, parts), 2))
    return found


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_a_file_of_native_names_has_the_deltas_that_they_have_in_a_checkpoint(family: str) -> None:
    keys = of_native_names(family)

    lora = from_tensors({key: Held(value) for key, value in keys.items()}, {}, family, architecture=family)

    assert errors(as_weights(family, keys), ours(lora)) == {}


@pytest.mark.parametrize(
    ("family", "unread", "wrong"),
    [
        ("z-image", "nothing", r".*\.attention\.(to_[qkv]|qkv|to_out\.0|out)|transformer\.(all_)?(x_emb|final_)[^ ]*"),
        ("hunyuanvideo", r"self_attn_qkv|txt_in\.individual.*adaLN", r"transformer\.norm_out\.linear"),
    ],
)
def test_the_known_faults_of_diffusers_are_those(family: str, unread: str, wrong: str) -> None:
    """Z-Image's own names are left as they are; of HunyuanVideo's last modulation lora_A is cut too, and txt_in refused."""
    keys = {key: value for key, value in of_native_names(family).items() if not re.search(unread, key)}

    found = errors(theirs(family, keys, {}), as_weights(family, keys))

    assert found
    assert all(re.fullmatch(wrong, module) for module in found)


@cache
def small(family: str, blocks_only: bool) -> LoRA:
    """A LoRA of rank 1 on the first block, and on what is outside of blocks."""
    inside = re.compile(r"blocks\.0|layers\.0|refiner\.0")
    chosen = {
        module: shape
        for module, shape in shapes(family).items()
        if is_layer(module, shape) and len(shape) == 2 and first(module, 1) and "prompt_adaln" not in module
        if not blocks_only or (inside.search(module) and "guidance_layer" not in module)
    }
    keys = {
        f"transformer.{module}.lora_{side}.weight": values(
            f"{module}{side}", (1, shape[1]) if side == "A" else (shape[0], 1)
        )
        for module, shape in chosen.items()
        for side in "AB"
    }
    return from_tensors({key: Held(value) for key, value in keys.items()}, {}, family, architecture=family)


def written(lora: LoRA, dialect: str) -> dict[str, np.ndarray]:
    return {key: tensor.float().numpy() for key, tensor in lora.state_dict(dialect).items()}


@pytest.mark.parametrize(("family", "dialect"), WRITTEN)
def test_what_is_written_has_its_deltas_in_diffusers(family: str, dialect: str) -> None:
    lora = small(family, (family, dialect) in INSIDE)

    found = theirs(family, written(lora, dialect), {})

    wrong = errors(found, ours(lora)).keys()
    assert wrong == (MISREAD.get((family, dialect), set()) | DROPPED.get((family, dialect), set())) & lora.keys()


@pytest.mark.parametrize("dialect", BOTH)
@pytest.mark.parametrize("family", [family for family in CHECKPOINTS if family != "z-image"])
def test_what_is_written_has_its_deltas_in_a_checkpoint(family: str, dialect: str) -> None:
    lora = small(family, False)

    assert errors(as_weights(family, written(lora, dialect)), ours(lora)) == {}


def test_diffsynths_minimax_has_its_rows_head_by_head_as_diffusers_reads_them() -> None:
    keys = {
        key.removeprefix("diffusion_model.").replace(".weight", ".default.weight"): value
        for key, value in of_native_names("minimax-h3").items()
    }

    lora = from_tensors({key: Held(value) for key, value in keys.items()}, {}, "x")

    assert lora.families == ("minimax-h3",)
    assert errors(theirs("minimax-h3", keys, {}), ours(lora)) == {}
    plain = {key.replace(".default.", "."): value for key, value in keys.items()}
    assert errors(ours(from_tensors({key: Held(value) for key, value in plain.items()}, {}, "x")), ours(lora)) != {}
