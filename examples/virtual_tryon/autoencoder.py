"""The miniature's autoencoder: a small ``AutoencoderKL``, 3 × n × n pixels to 12 × n/8 × n/8 latents and back."""

from diffusers import AutoencoderKL

LATENT_CHANNELS = 12
WIDTHS = (8, 16, 32, 64)
PATCH = 2 ** (len(WIDTHS) - 1)
"""Pixels a side of what one latent stands for."""


def untrained(resolution: int) -> AutoencoderKL:
    """Build an autoencoder with random values."""
    return AutoencoderKL(
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * len(WIDTHS),
        up_block_types=("UpDecoderBlock2D",) * len(WIDTHS),
        norm_num_groups=4,
        sample_size=resolution,
        scaling_factor=1.0,
        mid_block_add_attention=False,
        force_upcast=False,
    )
