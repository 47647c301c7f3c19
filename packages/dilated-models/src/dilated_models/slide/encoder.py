"""LongNetSlideEncoder: GigaPath's slide encoder on exact dilated attention, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Never, cast

import torch
from dilated_core.checks import check_bool, check_float_dtype, check_integer
from dilated_core.modules.options import check_forward_names, from_options, show_options
from torch import Tensor, nn

from dilated_models.encoder.stack import LongNetEncoder
from dilated_models.slide.batch import SlideBatch, batch_of
from dilated_models.slide.config import ELSEWHERE, SlideEncoderConfig
from dilated_models.slide.positions import cell_embeddings, check_cells, grid_cells


@dataclass(frozen=True, kw_only=True)
class SlideEncoderArguments(SlideEncoderConfig):
    """The signature of `LongNetSlideEncoder`: the fields of its config, device and dtype."""

    device: torch.device | str | None = None
    dtype: torch.dtype | None = None


class _PatchEmbedding(nn.Module):
    """The linear layer on tile embeddings, under its published name."""

    def __init__(self, config: SlideEncoderConfig, **placed: Any) -> None:
        super().__init__()
        self.proj = nn.Linear(config.in_chans, config.embed_dim, **placed)

    def forward(self, tiles: Tensor) -> Tensor:
        return self.proj(tiles)


class LongNetSlideEncoder(nn.Module):
    """GigaPath's slide encoder (Nature 2024, doi 10.1038/s41586-024-07441-w).

    Tile embeddings are projected, get the sines and cosines of their grid cells, and pass a
    `LongNetEncoder` behind a class token. Head offsets are `"blocked"` and the padding is
    `"attended"`, as in the published code. Weights are drawn as there: Xavier's uniform rule, and
    0.02 for the class token. `slide_encoder_from_gigapath` loads published weights.

    Args:
        config: A `SlideEncoderConfig`. Or, instead of it, its options by name.
        device: Of the parameters.
        dtype: Of the parameters; a floating-point dtype.

    Attributes:
        tile_size: Side of a grid cell, in the pixels that coordinates count. May be set; the
            pattern stays as it is, as in the published code.
        weights_sha256: SHA-256 of the file whose weights were loaded; None without a file.

    Raises:
        TypeError, ValueError: As `SlideEncoderConfig` does.

    Example:
        >>> encoder = LongNetSlideEncoder(in_chans=24, embed_dim=32, depth=2, num_heads=4)
        >>> tiles, coords = torch.randn(1, 100, 24), torch.randint(50, (1, 100, 2)) * 256
        >>> encoder(tiles, coords).shape
        torch.Size([1, 32])
        >>> encoder(tiles, coords, all_layers=True).shape
        torch.Size([3, 1, 32])
    """

    @from_options(SlideEncoderArguments, elsewhere=ELSEWHERE, config=SlideEncoderConfig)
    def __init__(
        self,
        config: SlideEncoderConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dtype is not None:
            check_float_dtype(dtype)
        self.config = config
        self._tile_size = config.tile_size
        self.weights_sha256: str | None = None
        E = config.embed_dim
        self.patch_embed = _PatchEmbedding(config, device=device, dtype=dtype)
        self.cls_token = nn.Parameter(torch.empty(1, 1, E, device=device, dtype=dtype))
        self.encoder = LongNetEncoder(config.encoder, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(E, eps=config.norm_eps, device=device, dtype=dtype)
        self._draw()

    @property
    def tile_size(self) -> int:
        """Side of a grid cell, in pixels."""
        return self._tile_size

    @tile_size.setter
    def tile_size(self, value: int) -> None:
        self._tile_size = check_integer("tile_size", value, at_least=1)

    def reset_parameters(self) -> None:
        """Draw all weights anew, for instance after `to_empty`."""
        self.encoder.reset_parameters()
        self.norm.reset_parameters()
        self._draw()

    def _draw(self) -> None:
        nn.init.normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        tiles: Tensor | Sequence[Tensor],
        coords: Tensor | Sequence[Tensor],
        all_layers: bool = False,
        *,
        key_padding_mask: Tensor | None = None,
        **unknown: Never,
    ) -> Tensor:
        """Embed slides.

        Args:
            tiles: `(B, L, in_chans)`, or a list of B tensors `(L_i, in_chans)` for slides of
                different sizes. Each slide gets the embedding that it gets alone.
            coords: `(B, L, 2)`, or a list of B tensors `(L_i, 2)`: pixels of the tiles' upper left
                corners, on the level that `tile_size` counts. Order counts: row by row, as in the
                pretraining.
            all_layers: Whether to pool each hidden state *before* the encoder's final LayerNorm.
            key_padding_mask: `(B, L)`, True for rows that are padding, wherever they lie.

        Returns:
            `(B, E)`, or `(depth + 1, B, E)` with `all_layers`: the embedded tiles, then the output
            of each layer. The last of these is not the plain result, which passes one LayerNorm
            more.

        Raises:
            TypeError: If an argument has the wrong type or is unknown.
            ValueError: If a shape does not fit, or a tile lies outside the grid.
        """
        known = ("tiles", "coords", "all_layers", "key_padding_mask")
        check_forward_names(self, unknown, known, self.config)
        return self.embed(tiles, coords, all_layers=all_layers, key_padding_mask=key_padding_mask)

    def embed(
        self,
        tiles: Tensor | Sequence[Tensor],
        coords: Tensor | Sequence[Tensor],
        *,
        all_layers: bool = False,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """What `forward` returns, also where a subclass has another `forward`."""
        check_bool("all_layers", all_layers)
        batch = batch_of(tiles, coords, key_padding_mask, self.config.in_chans)
        pooled: list[Tensor] = []

        def keep(x: Tensor) -> None:
            pooled.append(self._pool(x, batch))

        on_state = keep if all_layers else None
        x = self.encoder(self._embed(batch), cu_seqlens=batch.cu_seqlens, on_state=on_state)
        return torch.stack(pooled) if all_layers else self._pool(x, batch)

    def tile_states(
        self, tiles: Tensor, coords: Tensor, layers: Sequence[int] | None = None
    ) -> Tensor:
        """Contextual embeddings of the tiles.

        Args:
            tiles: `(B, L, in_chans)`.
            coords: `(B, L, 2)`.
            layers: Indices into the depth + 1 hidden states before the final LayerNorm, negative
                ones from the end. None: the output of the encoder, behind that LayerNorm.

        Returns:
            `(B, L, E)`; `(len(layers), B, L, E)` with `layers`. Without the class token.

        Raises:
            TypeError, ValueError: As `forward`; or if a layer does not exist.

        Example:
            >>> encoder = LongNetSlideEncoder(in_chans=24, embed_dim=32, depth=2, num_heads=4)
            >>> encoder.tile_states(torch.randn(1, 9, 24), torch.zeros(1, 9, 2)).shape
            torch.Size([1, 9, 32])
        """
        batch = batch_of(tiles, coords, None, self.config.in_chans)
        if batch.cu_seqlens is not None:
            raise TypeError("tiles is a list; it must be one tensor (B, L, in_chans).")
        if layers is None:
            return self.encoder(self._embed(batch))[:, 1:]
        count = self.config.depth + 1
        wanted = [check_integer("a layer", i, at_least=-count, at_most=count - 1) for i in layers]
        states: dict[int, Tensor] = {}
        index = 0

        def keep(x: Tensor) -> None:
            nonlocal index
            if {index, index - count} & set(wanted):
                states[index] = x[:, 1:]
            index += 1

        self.encoder(self._embed(batch), on_state=keep)
        return torch.stack([states[i % count] for i in wanted])

    def embedded(self, tiles: Tensor, coords: Tensor) -> Tensor:
        """What the encoder reads, `(B, 1 + L, E)`: the class token, then the tiles."""
        return self._embed(batch_of(tiles, coords, None, self.config.in_chans))

    def _embed(self, batch: SlideBatch) -> Tensor:
        config = self.config
        cells = grid_cells(batch.coords, self._tile_size)
        check_cells(cells, config.slide_ngrids, self._tile_size)
        x = self.patch_embed(batch.tiles)
        x = x + cell_embeddings(
            cells.to(x.device), config.slide_ngrids, config.embed_dim, self.cls_token.dtype
        )
        return batch.with_class_tokens(x, self.cls_token)

    def _pool(self, x: Tensor, batch: SlideBatch) -> Tensor:
        return self.norm(batch.mean_of_tiles(x) if self.config.global_pool else batch.first(x))

    def extra_repr(self) -> str:
        """The options that differ from their defaults, for `repr`."""
        return show_options(cast(Any, self.config), "embed_dim", "depth", "num_heads")
