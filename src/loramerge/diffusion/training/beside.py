"""Train a LoRA that another one is added to later: with the other active, or off the inputs that the other acts on.

Either way the plain sum of both is the merge.  Training off the rows of a frozen LoRA is that of O-LoRA,
Wang et al., 2023, https://arxiv.org/abs/2310.14152, and of Orthogonal Adaptation, Po et al., 2024,
https://arxiv.org/abs/2312.02432, as a projection instead of a penalty.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...errors import OptionError
from ...files.lora import LoRA
from ...learned.attach import attach
from ..denoiser import Denoiser

FAINT = 1e-6
"""Rows below this share of the strongest one are rounding."""


@contextmanager
def beside(denoiser: Denoiser, lora: LoRA | None, *, off_rows: bool) -> Iterator[Mapping[str, Tensor]]:
    """Let another LoRA act on the model inside the block; or, with ``off_rows``, only yield its rows.

    Yields:
        Orthonormal rows by module, ``(rank, in·kh·kw)``, that `leave` takes out of the trained factors; none if the
        LoRA acts.

    Raises:
        OptionError: ``off_rows`` without a LoRA, or the LoRA changes text encoders that are not trained here.
        MergeError: It doesn't fit the model.
    """
    if lora is None:
        if off_rows:
            raise OptionError("Training: off_rows needs beside, the LoRA whose rows are left alone.")
        yield {}
        return
    elsewhere = sorted({module.partition(".")[0] for module in lora} - set(denoiser.models))
    if elsewhere:
        raise OptionError(
            f"Training beside {lora.name}: it also changes {' and '.join(elsewhere)}, which isn't trained here. Ways out: "
            "text_encoders=True (--text-encoders), or the LoRA without: lora.exclude('text_encoder*')."
        )
    with attach(denoiser.models, [lora]) as attachment:
        attachment.active = not off_rows
        yield {module: rows_of(site.down) for module, site in attachment.sites.items()} if off_rows else {}


def rows_of(down: Tensor) -> Tensor:
    """Return orthonormal rows, ``(k, n)``, that span those of a factor, ``(r, n)``."""
    _, s, vt = torch.linalg.svd(down.double(), full_matrices=False)
    return vt[s > FAINT * s[:1]].to(down.dtype)


@torch.no_grad()
def leave(parameters: Mapping[str, nn.Parameter], rows: Mapping[str, Tensor]) -> None:
    """Take the component along some rows out of the ``down`` factors, so that ΔW does nothing to inputs along them.

    Args:
        parameters: The trained factors by ``MODULE/down`` and ``MODULE/up``; they are changed in place.
        rows: Orthonormal rows by module.
    """
    for module, span in rows.items():
        down = parameters.get(f"{module}/down")
        if down is not None:
            flat = down.flatten(1)
            flat -= (flat @ span.T.to(flat)) @ span.to(flat)
