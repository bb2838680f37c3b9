"""The simplest autoencoder that ``StableDiffusionXLPipeline`` accepts: principal components of patches.

Nothing in it is trained by gradients: ``decode(encode(x))`` is the best projection of each patch of f × f pixels onto a
few principal components of the patches of some pictures.  This file is also copied beside the weights, so that
diffusers can load it with ``trust_remote_code=True``; it therefore imports nothing of its neighbours.
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin


class PatchVAE(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Patches of ``patch`` × ``patch`` pixels as ``latent_channels`` numbers.

    Args:
        latent_channels: Components kept, at most ``3 * patch**2``.
        patch: Pixels a side.
        block_out_channels: Only its length counts: the pipeline divides sizes by ``2 ** (len - 1)``, the patch.
        sample_size: Pixels a side of the pictures, the pipeline's default.
        scaling_factor: As ``AutoencoderKL``'s. 1, as latents have variance one by :meth:`fit`.
        shift_factor: As ``AutoencoderKL``'s.
        force_upcast: As ``AutoencoderKL``'s.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 32,
        patch: int = 8,
        block_out_channels: tuple[int, ...] = (1, 1, 1, 1),
        sample_size: int = 96,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        force_upcast: bool = False,
    ) -> None:
        super().__init__()
        numbers = 3 * patch * patch
        self.basis = torch.nn.Parameter(torch.eye(numbers)[:latent_channels].clone(), requires_grad=False)
        self.gain = torch.nn.Parameter(torch.ones(latent_channels), requires_grad=False)
        self.mean = torch.nn.Parameter(torch.zeros(numbers), requires_grad=False)

    @torch.no_grad()
    def fit(self, pictures: torch.Tensor) -> None:
        """Take the components from pictures of shape ``(n, 3, height, width)`` in [-1, 1].

        A component of standard deviation σ is divided by √σ: between the whole of it, where noise hides the weak ones,
        and 1, where all count alike though the eye sees the strong ones.
        """
        patches = F.pixel_unshuffle(pictures, self.config.patch).movedim(1, -1).flatten(0, -2)
        self.mean.copy_(patches.mean(0))
        centred = patches - self.mean
        variances, components = torch.linalg.eigh(centred.T @ centred / len(centred))
        kept = self.config.latent_channels
        self.basis.copy_(components.flip(1)[:, :kept].T)
        self.gain.copy_(variances.flip(0)[:kept].clamp_min(1e-8).pow(-0.25))
        self.gain.div_(self.latents(pictures).std())

    def latents(self, pictures: torch.Tensor) -> torch.Tensor:
        """Shape ``(n, latent_channels, height / patch, width / patch)``."""
        patches = F.pixel_unshuffle(pictures, self.config.patch) - self.mean[:, None, None]
        return torch.einsum("kd,bdhw->bkhw", self.basis * self.gain[:, None], patches)

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        latents = self.latents(x)
        sure = torch.full_like(latents, -30.0)
        posterior = DiagonalGaussianDistribution(torch.cat([latents, sure], 1), deterministic=True)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: torch.Tensor, return_dict: bool = True, generator: object = None) -> DecoderOutput | tuple:
        patches = torch.einsum("kd,bkhw->bdhw", self.basis / self.gain[:, None], z) + self.mean[:, None, None]
        pictures = F.pixel_shuffle(patches, self.config.patch)
        return DecoderOutput(sample=pictures) if return_dict else (pictures,)
