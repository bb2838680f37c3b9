"""A toy world: shapes with textures on a ground, drawn as 4 × 16 × 16 latents.

A tiny UNet of SDXL's kind learns to draw the known ones.  A *subject* (a shape with a badge) and a
*style* (a texture that spills onto the ground) are held out: two LoRAs learn one of them each, and
the pictures of the subject in the style, which neither was trained on, are known exactly.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

import loramerge as lm
from loramerge.layers import low_rank

SIZE = 16
SHAPES, TEXTURES, GROUNDS = 6, 4, 4
"""The number of kinds that are known; the next number is the held-out one."""
SUBJECT, STYLE = SHAPES, TEXTURES
TEXT = 96

_fixed = torch.Generator().manual_seed(20260101)
WORDS = torch.randn(64, TEXT, generator=_fixed)
PLACES = 0.3 * torch.randn(4, TEXT, generator=_fixed)
POOL = torch.randn(TEXT, 32, generator=_fixed) / math.sqrt(TEXT)
GROUND = 0.8 * torch.randn(GROUNDS, 4, generator=_fixed)
INK = 1.2 * torch.randn(TEXTURES + 1, 2, 4, generator=_fixed)
BADGE = 1.8 * torch.randn(2, 4, generator=_fixed)
ROW, COLUMN = torch.meshgrid(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE), indexing="ij")
NOISE = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def outline(shape: int, x: Tensor, y: Tensor, r: float) -> Tensor:
    """Return a shape's mask, as zeros and ones."""
    big, round_ = torch.maximum(x.abs(), y.abs()), (x**2 + y**2).sqrt()
    inside = [
        big < r,
        round_ < r,
        (round_ < r) & (round_ > 0.5 * r),
        (y.abs() < r) & (x.abs() < (y + r) / 2),
        (y.abs() < 0.4 * r) & (x.abs() < 1.3 * r),
        (x.abs() < 0.4 * r) & (y.abs() < 1.3 * r),
        (((x - y).abs() < 0.5 * r) | ((x + y).abs() < 0.5 * r)) & (big < 1.2 * r),
    ]
    return inside[shape].float()


def texture(kind: int, phase: float) -> Tensor:
    """Draw a texture in its two inks, ``(4, 16, 16)``."""
    pattern = [
        torch.ones_like(ROW),
        (torch.sin(8 * ROW + phase) > 0).float(),
        (COLUMN + 1) / 2,
        (torch.sin(9 * COLUMN + phase) * torch.sin(9 * ROW) > 0.3).float(),
        (torch.sin(12 * ((COLUMN + 0.3) ** 2 + (ROW - 0.2) ** 2).sqrt() + 0.3 * phase) > 0).float(),
    ][kind]
    first, second = INK[kind, :, :, None, None]
    return first * pattern + second * (1 - pattern)


def draw(shape: int, kind: int, ground: int, generator: torch.Generator) -> Tensor:
    """Draw one picture; place, size and phase are random."""
    a, b, c, d = torch.rand(4, generator=generator).tolist()
    x, y, r = COLUMN - (a - 0.5) / 2, ROW - (b - 0.5) / 2, 0.45 + 0.2 * c
    where, ink = outline(shape, x, y, r), texture(kind, 2 * math.pi * d)
    back = GROUND[ground][:, None, None].expand(4, SIZE, SIZE)
    if kind == STYLE:
        back = 0.8 * back + 0.35 * ink
    picture = ink * where + back * (1 - where)
    if shape == SUBJECT:
        half = (x > 0).float()
        badge = BADGE[0][:, None, None] * half + BADGE[1][:, None, None] * (1 - half)
        inside = ((x**2 + y**2) < (0.5 * r) ** 2).float()
        picture = picture * (1 - inside) + badge * inside
    return picture


def prompt(shape: int, kind: int, ground: int) -> Tensor:
    """Encode what a picture shows, ``(4, 96)``: a frozen text encoder with one word per thing."""
    return WORDS[torch.tensor([shape, 16 + kind, 32 + ground, 48])] + PLACES


@dataclass(frozen=True)
class Pictures:
    """Pictures with their prompts."""

    latents: Tensor
    prompts: Tensor

    def noised(self, generator: torch.Generator, count: int | None = None) -> tuple[dict[str, Any], Tensor]:
        """Return examples for the model, and the noise in them; all of them in order unless a count is given."""
        n = len(self.latents)
        which = torch.arange(n) if count is None else torch.randint(n, (count,), generator=generator)
        noise = torch.randn(len(which), 4, SIZE, SIZE, generator=generator)
        time = torch.randint(1000, (len(which),), generator=generator)
        sample = NOISE.add_noise(self.latents[which], noise, time)
        return {"sample": sample, "timestep": time, "prompts": self.prompts[which]}, noise


def pictures(count: int, seed: int, shape: int | None = None, kind: int | None = None) -> Pictures:
    """Draw random pictures, with some of their properties given."""
    generator = torch.Generator().manual_seed(seed)

    def pick(given: int | None, n: int) -> int:
        return given if given is not None else int(torch.randint(n, (1,), generator=generator))

    made = []
    for _ in range(count):
        what = (pick(shape, SHAPES), pick(kind, TEXTURES), pick(None, GROUNDS))
        made.append((draw(*what, generator), prompt(*what)))
    return Pictures(torch.stack([p for p, _ in made]), torch.stack([t for _, t in made]))


def model(seed: int = 0) -> UNet2DConditionModel:
    """A UNet with SDXL's conditioning: 0.9 M parameters, attention in two of its three places."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 32,
        cross_attention_dim=TEXT,
        norm_num_groups=8,
    )


def predict(unet: UNet2DConditionModel, batch: Mapping[str, Any]) -> Tensor:
    """Return the noise that the model sees in a batch."""
    prompts = batch["prompts"]
    conditions = {"text_embeds": prompts.mean(1) @ POOL, "time_ids": torch.zeros(len(prompts), 6)}
    return unet(batch["sample"], batch["timestep"], encoder_hidden_states=prompts, added_cond_kwargs=conditions).sample


def train_base(seed: int, steps: int) -> UNet2DConditionModel:
    """Train a model on everything that isn't held out."""
    unet = model(seed)
    data = pictures(4000, seed + 1)
    generator = torch.Generator().manual_seed(seed + 2)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        batch, noise = data.noised(generator, 32)
        loss = F.mse_loss(predict(unet, batch), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return unet.requires_grad_(False).eval()


def train_lora(unet: UNet2DConditionModel, data: Pictures, name: str, rank: int, seed: int, steps: int) -> lm.LoRA:
    """Train a LoRA on the attention projections, by PEFT."""
    torch.manual_seed(seed)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch, noise = data.noised(generator, 16)
        loss = F.mse_loss(predict(unet, batch), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = {k: v.detach().clone() for k, v in get_peft_model_state_dict(unet).items()}
    unet.delete_adapters("default")
    unet.requires_grad_(False)
    layouts = {}
    for key, down in state.items():
        if key.endswith(".lora_A.weight"):
            module, up = key.removesuffix(".lora_A.weight"), state[key.replace("lora_A", "lora_B")]
            layouts[f"unet.{module}"] = low_rank(up, down, (up.shape[0], down.shape[1]))
    return lm.LoRA(name=name, architecture=None, dialect="diffusers-peft", layouts=layouts)
