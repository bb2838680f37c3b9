"""The table of model families: one entry each, commonest first.

Whatever else knows a family asks its entry; the modules and shapes of its models are in ``models/``.
"""

from collections.abc import Mapping
from typing import Any

from . import (
    acestep,
    auraflow,
    cosmos,
    flux,
    flux2,
    flux3,
    hunyuan,
    ideogram,
    krea,
    ltx,
    lumina,
    minimax,
    mochi,
    pixart,
    sd3,
    sgm,
    wan,
)
from .calls import FlowCall
from .family import Architecture, Beside, Kin, Label, TextEncoder

CLIP_L = TextEncoder(component="text_encoder", model="clip-l", kohya="1", comfyui="clip_l")
CLIP_G = TextEncoder(component="text_encoder_2", model="clip-g", kohya="2", comfyui="clip_g")
T5: Mapping[str, Any] = {"model": "t5-xxl", "kohya": "3", "comfyui": "t5xxl"}
SD3_TEXT = (
    TextEncoder(component="text_encoder", model="clip-l-projection", kohya="1", comfyui="clip_l"),
    CLIP_G,
    TextEncoder(component="text_encoder_3", **T5),
)
SD3_HINTS = ("sd3", "sd-3", "sd3m", "stable-diffusion-3", "stable-diffusion-v3")


SD3_CALL = FlowCall(
    pipelines=("StableDiffusion3Pipeline",),
    text=("encoder_hidden_states", "", "pooled_projections"),
    guidance=5.0,
)
WAN_CALL = FlowCall(pipelines=("WanPipeline",), latents="frames", side=60, guidance=5.0)
FLUX2_CALL = FlowCall(
    pipelines=("Flux2KleinPipeline", "Flux2Pipeline"),
    text=("encoder_hidden_states", "txt_ids"),
    latents="tokens",
    clock="sigma",
    even=True,
)

_BOTH: Mapping[str, Any] = {"diffusers_reads": ("kohya", "comfyui")}
_COMFYUI: Mapping[str, Any] = {"diffusers_reads": ("comfyui",)}


def _unet(name: str, title: str, *hints: str, **options: Any) -> Architecture:
    """Make a family whose denoiser is a UNet."""
    given: dict[str, Any] = {"name": name, "title": title, "denoiser": "unet", "model": f"unet-{name}", "hints": hints}
    return Architecture(**given | {"native": sgm.native} | options)


def _dit(name: str, title: str, *hints: str, **options: Any) -> Architecture:
    """Make a family whose denoiser is a transformer."""
    return Architecture(**{"name": name, "title": title, "model": f"transformer-{name}", "hints": hints} | options)


def _sd3(version: str, size: str, **options: Any) -> Architecture:
    """Make a size of Stable Diffusion 3; ``version`` has a hyphen for its dot."""
    dotted = version.replace("-", ".")
    names = [f"{start}{version}" for start in ("sd", "stable-diffusion-", "stable-diffusion-v", "stable-diffusion-3-")]
    hints = [f"{name}-{end}" for name in names for end in (size, size[0])]
    hints += [f"{version}-{size}"] * ("-" in version)
    return _dit(
        f"sd{dotted}-{size}",
        f"Stable Diffusion {dotted} {size.title()}",
        *(*SD3_HINTS, *hints),
        model=f"transformer-sd{version.replace('-', '')}-{size}",
        text_encoders=SD3_TEXT,
        native=sd3.native,
        label=Label((f"stable-diffusion-v{dotted}-{size}",), (f"sd{dotted}-{size}",), "networks.lora_sd3"),
        kin=Kin.SD3,
        flow=SD3_CALL,
        comfyui_reads_diffusers=True,
        **options,
    )


def _wan(size: str, title: str, *hints: str, **options: Any) -> Architecture:
    """Make a size of Wan."""
    label = Label(("wan2.1", "wan2.2"), ("wan",), "networks.lora_wan")
    return _dit(f"wan-{size}", title, "wan", *hints, native=wan.native, label=label, flow=WAN_CALL, **_BOTH, **options)


def _flux2(size: str, title: str, *hints: str, **options: Any) -> Architecture:
    """Make a size of FLUX.2."""
    name = size.replace("-", "_")
    label = Label((f"Flux.2-{size}",), (f"flux_2_{name}", f"flux2_{name}"), "networks.lora_flux_2")
    words = ("flux2", "flux-2", *hints, f"flux-2-{size}", f"flux2-{size}")
    given: dict[str, Any] = {
        "native": flux2.native,
        "label": label,
        "comfyui_reads_diffusers": True,
        "flow": FLUX2_CALL,
    }
    return _dit(f"flux2-{size}", title, *words, **given | {**_BOTH} | options)


_HUNYUAN: Mapping[str, Any] = {"native": hunyuan.comfyui, "also_native": (hunyuan.tencent,)}
_KLEIN = ("flux-2-klein", "flux2-klein")

FAMILIES = (
    _unet(
        "sdxl",
        "Stable Diffusion XL",
        *("sdxl", "sd-xl", "stable-diffusion-xl", "pony", "illustrious", "noobai"),
        text_encoders=(CLIP_L, CLIP_G),
        label=Label(("stable-diffusion-xl-v1-base",), ("sdxl_base_v1-0", "sdxl_base")),
        kin=Kin.SDXL,
    ),
    _unet(
        "sd15",
        "Stable Diffusion 1.x",
        *("stable-diffusion-v1", "stable-diffusion-1", "sd-v1", "sd-1", "sd1"),
        text_encoders=(TextEncoder(component="text_encoder", model="clip-l", kohya="", comfyui="clip_l"),),
        kohya_uses_diffusers_names=True,
        aliases=("sd1", "sd1.5"),
        label=Label(("stable-diffusion-v1",), ("sd_v1",), v2="False"),
        kin=Kin.SD,
    ),
    _dit(
        "flux",
        "FLUX.1",
        *("flux", "flux-1", "flux1"),
        text_encoders=(CLIP_L, TextEncoder(component="text_encoder_2", **T5)),
        native=flux.native,
        also_native=(flux.diffsynth,),
        aliases=("flux.1", "flux-dev"),
        label=Label(("flux-1",), ("flux1",), "networks.lora_flux"),
        kin=Kin.FLUX,
        flow=FlowCall(
            pipelines=("FluxPipeline",),
            text=("encoder_hidden_states", "pooled_projections", "txt_ids"),
            latents="tokens",
            clock="sigma",
            even=True,
        ),
        **_BOTH,
        comfyui_reads_diffusers=True,
        down_up=True,
    ),
    _sd3("3", "medium", aliases=("sd3",)),
    _sd3("3-5", "medium", aliases=("sd35-medium",)),
    _sd3("3-5", "large", aliases=("sd35-large",)),
    _unet(
        "sd21",
        "Stable Diffusion 2.x",
        *("stable-diffusion-v2", "stable-diffusion-2", "sd-v2", "sd-2", "sd2"),
        text_encoders=(TextEncoder(component="text_encoder", model="clip-h", kohya="", comfyui="clip_h"),),
        kohya_uses_diffusers_names=True,
        aliases=("sd2", "sd2.1"),
        label=Label(("stable-diffusion-v2",), ("sd_v2",), v2="True"),
        kin=Kin.SD,
    ),
    _unet(
        "sdxl-refiner",
        "Stable Diffusion XL refiner",
        *("stable-diffusion-xl-v1-refiner", "stable-diffusion-xl-refiner", "sdxl-refiner"),
        text_encoders=(TextEncoder(component="text_encoder_2", model="clip-g", kohya="", comfyui="clip_g"),),
        label=Label(("stable-diffusion-xl-v1-refiner",), ("sdxl_refiner_v1-0", "sdxl_refiner")),
    ),
    _unet(
        "ssd-1b",
        "Segmind SSD-1B",
        *("sdxl", "stable-diffusion-xl", "sdxl-ssd-1b", "segmind-stable-diffusion-1b"),
        text_encoders=(CLIP_L, CLIP_G),
        within="sdxl",
        label=Label(("segmind-stable-diffusion-1b",), ("sdxl_ssd-1b",)),
        kin=Kin.SDXL,
    ),
    _unet(
        "segmind-vega",
        "Segmind Vega",
        *("sdxl", "stable-diffusion-xl", "sdxl-vega"),
        text_encoders=(CLIP_L, CLIP_G),
        within="sdxl",
        aliases=("vega",),
        label=Label(("segmind-vega",), ("sdxl_vega",)),
        kin=Kin.SDXL,
    ),
    _dit(
        "qwen-image",
        "Qwen-Image",
        "qwen-image",
        aliases=("qwen",),
        label=Label(("qwen-image", "Qwen-Image"), ("qwen_image",), "networks.lora_qwen_image"),
        kin=Kin.QWEN,
        flow=FlowCall(
            pipelines=("QwenImagePipeline",),
            text=("encoder_hidden_states", "encoder_hidden_states_mask"),
            latents="tokens",
            clock="sigma",
            guidance=4.0,
            rescaled=True,
            even=True,
        ),
        **_BOTH,
        comfyui_reads_diffusers=True,
    ),
    _dit(
        "z-image",
        "Z-Image",
        *("z-image", "zimage"),
        also_native=(lumina.z_image,),
        aliases=("zimage",),
        label=Label(("Z-Image",), ("z_image", "zimage"), "networks.lora_zimage"),
        kin=Kin.Z_IMAGE,
        flow=FlowCall(
            pipelines=("ZImagePipeline",),
            text=("cap_feats",),
            sample="x",
            latents="list",
            time="t",
            clock="signal",
            reversed=True,
            even=True,
        ),
        **_BOTH,
        comfyui_reads_diffusers=True,
    ),
    _dit("krea2", "Krea 2", "krea-2", "krea2", native=krea.native, **_COMFYUI, label=Label(("Krea-2",), ("krea2",))),
    _dit(
        "anima",
        "Anima",
        "anima",
        model="transformer-cosmos-predict2-2b",
        native=cosmos.native,
        beside=(Beside(component="text_conditioner", model="text-conditioner-anima", native="llm_adapter"),),
        text_encoders=(
            TextEncoder(component="text_encoder", model="qwen3-0.6b", kohya="", comfyui="qwen3_06b", inside="model."),
        ),
        **_COMFYUI,
        label=Label(("anima",), ("anima",), "networks.lora_anima"),
    ),
    _wan("14b", "Wan 2.1 and 2.2, 14B", "skyreels", aliases=("wan",)),
    _wan("1.3b", "Wan 2.1, 1.3B", "skyreels"),
    _wan("5b", "Wan 2.2, 5B"),
    _flux2(
        "dev",
        "FLUX.2 dev",
        aliases=("flux2", "flux.2"),
        label=Label(("Flux.2-dev",), ("flux2", "flux_2"), "networks.lora_flux_2"),
    ),
    _flux2("klein-4b", "FLUX.2 klein 4B", *_KLEIN, aliases=("klein",)),
    _flux2("klein-9b", "FLUX.2 klein 9B", *_KLEIN),
    _dit(
        "hunyuanvideo",
        "HunyuanVideo",
        *("hunyuan-video", "hunyuanvideo", "framepack"),
        **_HUNYUAN,
        aliases=("hunyuan-video",),
        label=Label(("hunyuan-video",), ("hunyuan_video",)),
    ),
    _dit(
        "hunyuanvideo15",
        "HunyuanVideo 1.5",
        *("hunyuan-video-1-5", "hunyuanvideo-1-5", "hunyuanvideo15"),
        native=hunyuan.comfyui,
        also_native=(hunyuan.split,),
    ),
    _dit(
        "chroma",
        "Chroma",
        "chroma",
        native=flux.chroma,
        **_BOTH,
        label=Label(("chroma",), ("chroma",), "networks.lora_flux"),
        comfyui_reads_diffusers=True,
        down_up=True,
    ),
    _dit(
        "ltx2",
        "LTX-2, 2.3 and 2.5",
        *("ltx2", "ltx-2", "ltxv2", "ltx-2-3", "ltx2-3", "ltx-2-5", "ltx2-5"),
        native=ltx.native,
        **_COMFYUI,
        aliases=("ltx-2",),
    ),
    _dit("ltxv-2b", "LTX-Video 2B", "ltxv", "ltx-video", native=ltx.native, **_COMFYUI),
    _dit("ltxv-13b", "LTX-Video 13B", "ltxv", "ltx-video", native=ltx.native, **_COMFYUI),
    _dit("hidream", "HiDream-I1", "hidream", comfyui_reads_diffusers=True, **_COMFYUI),
    _dit(
        "lumina2",
        "Lumina 2",
        *("lumina-2", "lumina2", "lumina-image-2", "lumina"),
        native=lumina.lumina2,
        **_COMFYUI,
        label=Label(("lumina-2",), ("lumina2",), "networks.lora_lumina"),
    ),
    _dit("hunyuanimage", "HunyuanImage 2.1", "hunyuan-image", "hunyuanimage", **_HUNYUAN),
    _dit(
        "auraflow",
        "AuraFlow, Pony V7",
        "auraflow",
        "aura-flow",
        "pony-v7",
        "pony7",
        native=auraflow.native,
        comfyui_reads_diffusers=True,
    ),
    _dit("ernie-image", "ERNIE-Image", "ernie", **_COMFYUI),
    _dit("cogvideox-2b", "CogVideoX 2B", "cogvideox", "cogvideo"),
    _dit("cogvideox-5b", "CogVideoX 5B", "cogvideox", "cogvideo"),
    _dit("kandinsky5-lite", "Kandinsky 5 Lite", "kandinsky5", "kandinsky-5", comfyui_reads_diffusers=True),
    _dit("kandinsky5-pro", "Kandinsky 5 Pro", "kandinsky5", "kandinsky-5", comfyui_reads_diffusers=True),
    _dit("kandinsky5-image", "Kandinsky 5 Image Lite", "kandinsky5", "kandinsky-5", comfyui_reads_diffusers=True),
    _dit("sana-1.6b", "Sana 1.6B", "sana"),
    _dit("sana-0.6b", "Sana 0.6B", "sana"),
    _dit("sana-4.8b", "Sana 4.8B", "sana"),
    _dit("cosmos-predict2-2b", "Cosmos-Predict2 2B", "cosmos-predict2", "cosmos", native=cosmos.native),
    _dit("pixart-sigma", "PixArt-Σ", "pixart", native=pixart.native, comfyui_reads_diffusers=True),
    _dit("mochi", "Mochi 1", "mochi", native=mochi.native),
    _unet("kolors", "Kolors", "kolors"),
    _dit("longcat-image", "LongCat-Image", "longcat", native=None),
    _dit("ovis-image", "Ovis-Image", "ovis", native=None),
    _dit(
        "ideogram4",
        "Ideogram 4",
        "ideogram",
        native=ideogram.native,
        **_COMFYUI,
        label=Label(("Ideogram-4", "ideogram-4"), ("ideogram4",), "networks.lora_ideogram4"),
    ),
    _dit("minimax-h3", "MiniMax H3", "minimax", native=minimax.native, by_head=minimax.by_head, **_BOTH),
    _dit("omnigen2", "OmniGen2", "omnigen2", "omnigen-2"),
    _dit("omnigen", "OmniGen", "omnigen", "omnigen-1", "omnigen1", native=None),
    _dit("flux3", "FLUX.3", "flux3", "flux-3", native=flux3.native, **_COMFYUI),
    _dit("bria-fibo2", "Bria FIBO 2", "fibo2", "fibo-2", "bria-fibo-2", native=None),
    _dit("cogview4", "CogView4", "cogview4", "cogview-4", native=None),
    _dit("ace-step", "ACE-Step 1.5", "ace-step-1-5", "acestep-1-5", "ace-step15", native=acestep.native),
    Architecture(
        name="stable-cascade",
        title="Stable Cascade, stage C",
        denoiser="prior",
        model="prior-stable-cascade",
        native=None,
        hints=("stable-cascade", "cascade", "wuerstchen"),
        aliases=("cascade",),
    ),
)
"""If several families fit a file, the first is taken to be the likeliest."""

ELSEWHERE: Mapping[str, tuple[str, ...]] = {
    "HiDream-O1": ("hidream-o1",),
    "Qwen-Image 2": ("qwen-image-2",),
    "Kandinsky": ("kandinsky",),
    "CogView": ("cogview",),
    "HunyuanDiT": ("hunyuan-dit", "hunyuandit", "hydit"),
    "Stable Video Diffusion": ("svd", "stable-video-diffusion"),
    "AnimateDiff": ("animatediff", "animate-diff"),
    "Lumina-Next": ("lumina-next", "lumina-t2x"),
    "Zeta-Chroma": ("zeta-chroma",),
    "Boogu": ("boogu",),
    "MageFlow": ("mageflow",),
    "PRX": ("prx",),
    "F Lite": ("f-lite",),
    "Nucleus": ("nucleus",),
    "DeepFloyd IF": ("deepfloyd",),
    "Bria": ("bria", "fibo"),
    "GLM-Image": ("glm-image",),
    "JoyImage": ("joyimage", "joy-image"),
    "Allegro": ("allegro",),
    "Helios": ("helios",),
    "ACE-Step": ("ace-step", "acestep"),
    "Stable Audio": ("stable-audio",),
    "NewBie": ("newbie",),
    "Step": ("step1x", "step-video"),
    "SkyReels": ("skyreels-a",),
    "Hunyuan": ("hunyuan",),
}
"""Families that loramerge doesn't know, each with the words that name it."""
