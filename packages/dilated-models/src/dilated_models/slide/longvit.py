"""LongViT: a LongNet encoder on the patches of one large image (arXiv 2312.03558)."""

from __future__ import annotations

import math
from typing import Any

import torch
from dilated_core.checks import check_integer, check_tensor
from torch import Tensor, nn
from torch.nn.functional import interpolate

from dilated_models.encoder.config import EncoderConfig
from dilated_models.encoder.stack import LongNetEncoder

# Segment lengths of the published code by side of the image, in pixels.
_SEGMENT_LENGTHS = {
    1024: (64, 128, 256, 512, 1024),
    4096: (1024, 2048, 4096, 8192, 16384),
    8192: (1024, 4096, 8192, 16384, 65536),
    16384: (1024, 4096, 16384, 65536, 262144),
    32768: (1024, 4096, 32768, 262144, 1048576),
}
_DILATION_RATES = (1, 2, 4, 8, 16)
_ROUNDING = 0.1  # the published code adds it to sizes, so that rounding never loses a patch


class _PatchEmbedding(nn.Module):
    """The convolution of an image into patches, under its published name."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int, **placed: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, **placed)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class LongViT(nn.Module):
    """LongViT small by default: 12 layers of width 384 on patches of 32 × 32 pixels.

    No class token, and no LayerNorm behind the last layer, as in the published code.

    Args:
        image_size: Side of the images that the learned positions belong to, in pixels. Segment
            lengths are those of the published code for 1024, 4096, 8192, 16384 and 32768, and those
            of 1024 for any other size.
        patch_size: Side of a patch, in pixels.
        in_chans: Channels of an image.
        embed_dim: E.
        depth: Number of layers.
        num_heads: Number of heads; divides `embed_dim`.
        device: Of the parameters.
        dtype: Of the parameters.
        **options: Other fields of `EncoderConfig`, such as `drop_path_rate`.

    Raises:
        TypeError, ValueError: As `EncoderConfig` does; or if `patch_size` does not divide
            `image_size`.

    Example:
        >>> model = LongViT(image_size=64, embed_dim=32, depth=1, num_heads=4)
        >>> model(torch.randn(2, 3, 64, 96)).shape  # 2 × 3 patches
        torch.Size([2, 6, 32])
    """

    def __init__(
        self,
        image_size: int = 1024,
        *,
        patch_size: int = 32,
        in_chans: int = 3,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        image_size = check_integer("image_size", image_size, at_least=1)
        patch_size = check_integer("patch_size", patch_size, at_least=1)
        if image_size % patch_size:
            raise ValueError(
                f"image_size is {image_size} and patch_size {patch_size}; patch_size must divide "
                f"image_size."
            )
        published: dict[str, Any] = {
            "segment_lengths": _SEGMENT_LENGTHS.get(image_size, _SEGMENT_LENGTHS[1024]),
            "dilation_rates": _DILATION_RATES,
            "dim_feedforward": 4 * embed_dim,
            "final_layer_norm": False,
            "head_offsets": "blocked",
            "padding": "attended",
        }
        config = EncoderConfig(
            d_model=embed_dim,
            nhead=num_heads,
            num_layers=depth,
            **(published | options),
        )
        self.patch_size = patch_size
        self.patch_embed = _PatchEmbedding(
            in_chans, embed_dim, patch_size, device=device, dtype=dtype
        )
        per_side = image_size // patch_size
        self.pos_embed = nn.Parameter(
            torch.empty(1, per_side**2, embed_dim, device=device, dtype=dtype)
        )
        nn.init.trunc_normal_(self.pos_embed, std=0.02, a=-0.02, b=0.02)
        self.encoder = LongNetEncoder(config, device=device, dtype=dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Map images to contextual embeddings of their patches.

        Args:
            images: `(B, in_chans, h, w)`, floating; sides are multiples of the patch size. Learned
                positions are resized for sizes other than `image_size`, as in the published code.

        Returns:
            `(B, h · w / patch_size², E)`, row by row.

        Raises:
            TypeError: If it is no tensor.
            ValueError: If a shape does not fit.
        """
        check_tensor("images", images)
        channels = self.patch_embed.proj.in_channels
        if images.dim() != 4 or images.shape[1] != channels:
            raise ValueError(
                f"images has shape {tuple(images.shape)}; it must be (B, {channels}, h, w)."
            )
        rows, columns = (side / self.patch_size for side in images.shape[2:])
        if not (rows.is_integer() and columns.is_integer() and rows and columns):
            raise ValueError(
                f"images are {images.shape[2]} × {images.shape[3]} pixels; sides must be multiples "
                f"of the patch size {self.patch_size}, so pad or crop the images."
            )
        x = self.patch_embed(images)
        return self.encoder(x + self._positions(int(rows), int(columns)))

    def _positions(self, rows: int, columns: int) -> Tensor:
        """The learned positions, resized to a grid of patches, `(1, rows · columns, E)`."""
        per_side = math.isqrt(self.pos_embed.shape[1])
        if rows == columns == per_side:
            return self.pos_embed
        table = self.pos_embed.view(1, per_side, per_side, -1).permute(0, 3, 1, 2)
        factors = ((rows + _ROUNDING) / per_side, (columns + _ROUNDING) / per_side)
        table = interpolate(table, scale_factor=factors, mode="bicubic")
        return table.flatten(2).transpose(1, 2)
