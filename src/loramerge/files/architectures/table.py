"""The table of model families: one entry each, commonest first.

Whatever else knows a family asks its entry; the modules and shapes of its models are in ``models/``.
"""

from collections.abc import Mapping
from typing import Any

from .calls import FlowCall
from .family import STOPS, Architecture, Beside, Kin, Label, TextEncoder, Unread
from .names import Rules

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
_PEFT_TOO: Mapping[str, Any] = {"comfyui_reads_diffusers": True, "comfyui_reads_peft": True}


def _unet(name: str, title: str, *hints: str, **options: Any) -> Architecture:
    """Make a family whose denoiser is a UNet."""
    given: dict[str, Any] = {"name": name, "title": title, "denoiser": "unet", "model": f"unet-{name}", "hints": hints}
    return Architecture(**given | {"native": Rules("sgm")} | options)


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
        native=Rules("sd3"),
        label=Label((f"stable-diffusion-v{dotted}-{size}",), (f"sd{dotted}-{size}",), "networks.lora_sd3"),
        kin=Kin.SD3,
        flow=SD3_CALL,
        **_PEFT_TOO,
        **options,
    )


def _wan(size: str, title: str, *hints: str, **options: Any) -> Architecture:
    """Make a size of Wan."""
    label = Label(("wan2.1", "wan2.2"), ("wan",), "networks.lora_wan")
    return _dit(
        f"wan-{size}",
        title,
        "wan",
        *hints,
        native=Rules("wan"),
        label=label,
        flow=WAN_CALL,
        unread=_WAN,
        **_BOTH,
        **options,
    )


def _flux2(size: str, title: str, *hints: str, **options: Any) -> Architecture:
    """Make a size of FLUX.2."""
    name = size.replace("-", "_")
    label = Label((f"Flux.2-{size}",), (f"flux_2_{name}", f"flux2_{name}"), "networks.lora_flux_2")
    words = ("flux2", "flux-2", *hints, f"flux-2-{size}", f"flux2-{size}")
    given: dict[str, Any] = {
        "native": Rules("flux2"),
        "label": label,
        "comfyui_reads_diffusers": True,
        "unread": _FLUX2,
        "kin": Kin.FLUX2,
        "flow": FLUX2_CALL,
    }
    return _dit(f"flux2-{size}", title, *words, **given | {**_BOTH} | options)


OUTSIDE = "layers outside of the blocks"
DIFFUSERS_NAMES = ("diffusers", "diffusers-peft")
_REFINER = (
    Unread("diffusers", STOPS, "the names of this model", ("kohya",), r".*"),
    Unread("diffusers", "ignores", "the added embeddings", ("kohya-diffusers",), r"add_embedding\."),
)
_CHROMA = (
    Unread("ComfyUI", "ignores", "the guidance's layers", DIFFUSERS_NAMES, r"distilled_guidance_layer\."),
    Unread("diffusers", STOPS, OUTSIDE, ("kohya", "comfyui"), r"(?!\w*transformer_blocks\.)"),
)
_WAN = (
    Unread("diffusers", STOPS, OUTSIDE, ("kohya",), r"(?!blocks\.)"),
    Unread("diffusers", STOPS, "the first layer", ("comfyui",), r"patch_embedding$"),
)
_FLUX2 = (
    Unread("ComfyUI", "ignores", "guidance and modulations", DIFFUSERS_NAMES, r"time_guidance_embed\.|\w+_modulation"),
    Unread(
        "diffusers", "ignores", "guidance and modulations", ("kohya",), r".*guidance_embedder\.|\w+_modulation|norm_out"
    ),
    Unread("diffusers", "reads", "the halves of the last modulation exchanged", ("comfyui",), r"norm_out\."),
)
_LTX = (Unread("diffusers", "ignores", "the first layer and the time's", ("comfyui",), r"proj_in$|time_embed\."),)
_IDEOGRAM = (Unread("diffusers", STOPS, OUTSIDE, ("comfyui",), r"(?!layers\.|embed_)"),)
_LUMINA = (Unread("diffusers", STOPS, OUTSIDE, ("comfyui",), r"(?!layers\.|\w+_refiner\.)"),)
_KOLORS = (
    Unread("diffusers", "ignores", "the text's projection", ("kohya", "kohya-diffusers"), r"encoder_hid_proj$"),
    Unread("ComfyUI", "ignores", "the text's projection", DIFFUSERS_NAMES, r"encoder_hid_proj$"),
    Unread("diffusers", "ignores", "the added embeddings", ("kohya-diffusers",), r"add_embedding\."),
)
_ACE_STEP = (Unread("diffusers", STOPS, "the first layer", DIFFUSERS_NAMES, r"proj_in_conv$"),)
_NO_LOADER = (Unread("diffusers", "has no loader for", "this model", DIFFUSERS_NAMES, r".*"),)
"""The parts of some families that readers leave out."""

_HUNYUAN: Mapping[str, Any] = {"native": Rules("hunyuan", "comfyui"), "trained": Rules("hunyuan", "tencent")}
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
        native=Rules("flux"),
        also_native=(Rules("flux", "diffsynth"),),
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
        unread=_REFINER,
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
        also_native=(Rules("lumina", "z_image"),),
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
    _dit(
        "krea2",
        "Krea 2",
        "krea-2",
        "krea2",
        native=Rules("krea"),
        **_COMFYUI,
        label=Label(("Krea-2",), ("krea2",)),
        comfyui_reads_diffusers=True,
    ),
    _dit(
        "anima",
        "Anima",
        "anima",
        model="transformer-cosmos-predict2-2b",
        native=Rules("cosmos"),
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
        native=Rules("hunyuan", "comfyui"),
        trained=Rules("hunyuan", "split"),
        also_native=(Rules("hunyuan", "tencent"),),
    ),
    _dit(
        "chroma",
        "Chroma",
        "chroma",
        native=Rules("flux", "chroma"),
        unread=_CHROMA,
        **_BOTH,
        label=Label(("chroma",), ("chroma",), "networks.lora_flux"),
        comfyui_reads_diffusers=True,
        down_up=True,
    ),
    _dit(
        "ltx2",
        "LTX-2, 2.3 and 2.5",
        *("ltx2", "ltx-2", "ltxv2", "ltx-2-3", "ltx2-3", "ltx-2-5", "ltx2-5"),
        native=Rules("ltx"),
        **_COMFYUI,
        aliases=("ltx-2",),
    ),
    _dit("ltxv-2b", "LTX-Video 2B", "ltxv", "ltx-video", native=Rules("ltx"), unread=_LTX, **_COMFYUI),
    _dit("ltxv-13b", "LTX-Video 13B", "ltxv", "ltx-video", native=Rules("ltx"), unread=_LTX, **_COMFYUI),
    _dit("hidream", "HiDream-I1", "hidream", comfyui_reads_diffusers=True, **_COMFYUI),
    _dit(
        "lumina2",
        "Lumina 2",
        *("lumina-2", "lumina2", "lumina-image-2", "lumina"),
        native=Rules("lumina", "lumina2"),
        unread=_LUMINA,
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
        native=Rules("auraflow"),
        comfyui_reads_diffusers=True,
    ),
    _dit("ernie-image", "ERNIE-Image", "ernie", **_COMFYUI, comfyui_reads_diffusers=True),
    _dit("cogvideox-2b", "CogVideoX 2B", "cogvideox", "cogvideo"),
    _dit("cogvideox-5b", "CogVideoX 5B", "cogvideox", "cogvideo"),
    _dit("kandinsky5-lite", "Kandinsky 5 Lite", "kandinsky5", "kandinsky-5", comfyui_reads_diffusers=True),
    _dit("kandinsky5-pro", "Kandinsky 5 Pro", "kandinsky5", "kandinsky-5", comfyui_reads_diffusers=True),
    _dit("kandinsky5-image", "Kandinsky 5 Image Lite", "kandinsky5", "kandinsky-5", comfyui_reads_diffusers=True),
    _dit("sana-1.6b", "Sana 1.6B", "sana"),
    _dit("sana-0.6b", "Sana 0.6B", "sana"),
    _dit("sana-4.8b", "Sana 4.8B", "sana"),
    _dit("cosmos-predict2-2b", "Cosmos-Predict2 2B", "cosmos-predict2", "cosmos", native=Rules("cosmos")),
    _dit("pixart-sigma", "PixArt-Σ", "pixart", native=Rules("pixart"), unread=_NO_LOADER, **_PEFT_TOO),
    _dit("mochi", "Mochi 1", "mochi", native=Rules("mochi")),
    _unet("kolors", "Kolors", "kolors", unread=_KOLORS),
    _dit("longcat-image", "LongCat-Image", "longcat", native=None),
    _dit("ovis-image", "Ovis-Image", "ovis", native=None),
    _dit(
        "ideogram4",
        "Ideogram 4",
        "ideogram",
        native=Rules("ideogram"),
        unread=_IDEOGRAM,
        **_COMFYUI,
        label=Label(("Ideogram-4", "ideogram-4"), ("ideogram4",), "networks.lora_ideogram4"),
    ),
    _dit("minimax-h3", "MiniMax H3", "minimax", native=Rules("minimax"), by_head=Rules("minimax", "by_head"), **_BOTH),
    _dit("omnigen2", "OmniGen2", "omnigen2", "omnigen-2", unread=_NO_LOADER),
    _dit("omnigen", "OmniGen", "omnigen", "omnigen-1", "omnigen1", native=None, unread=_NO_LOADER),
    _dit("flux3", "FLUX.3", "flux3", "flux-3", native=Rules("flux3"), **_COMFYUI),
    _dit("bria-fibo2", "Bria FIBO 2", "fibo2", "fibo-2", "bria-fibo-2", native=None),
    _dit("cogview4", "CogView4", "cogview4", "cogview-4", native=None),
    _dit(
        "ace-step",
        "ACE-Step 1.5",
        "ace-step-1-5",
        "acestep-1-5",
        "ace-step15",
        native=Rules("acestep"),
        unread=_ACE_STEP,
    ),
    Architecture(
        name="stable-cascade",
        title="Stable Cascade, stage C",
        denoiser="prior",
        model="prior-stable-cascade",
        native=None,
        hints=("stable-cascade", "cascade", "wuerstchen"),
        aliases=("cascade",),
        unread=_NO_LOADER,
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
