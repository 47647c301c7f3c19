"""The slide encoder of SlideChat and of models built on it, such as PathReasoner."""

from __future__ import annotations

import torch
from dilated_core.checks import check_tensor
from torch import Tensor, nn

from dilated_models.checkpoints.files import Weights, read_checkpoint
from dilated_models.checkpoints.names import count_layers, load_strictly
from dilated_models.encoder.config import EncoderConfig
from dilated_models.encoder.names import published_name, with_published_names
from dilated_models.encoder.stack import LongNetEncoder

_PREFIX = "LongNet_encoder."
_KEYS = ("state_dict", "model")
# Defaults of make_longnet_from_name, which SlideChat calls.
_SEGMENT_LENGTHS = (1024, 2048, 4096, 8192, 16384)
_DILATION_RATES = (1, 2, 4, 8, 16)


class SlideChatEncoder(nn.Module):
    """SlideChat's encoder of tile embeddings.

    SlideChat permutes its input to `(N, 1, E)` before the encoder (xtuner/model/llava.py), so every
    tile is a sequence of length 1: attention returns each tile's own value, and no tile sees
    another. This is what its weights were trained with, and what a call returns.

    Args:
        encoder: Its layers.
        as_sequence: Whether a slide's tiles form one sequence instead, so that they see each other.
            The weights were not trained so.
    """

    def __init__(self, encoder: LongNetEncoder, *, as_sequence: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.as_sequence = as_sequence

    def forward(self, tiles: Tensor) -> Tensor:
        """Map `(B, L, E)` to the same shape."""
        check_tensor("tiles", tiles)
        if self.as_sequence:
            return self.encoder(tiles)
        return self.encoder(tiles.flatten(0, -2)[:, None]).view(tiles.shape)

    def extra_repr(self) -> str:
        """Whether tiles see each other."""
        return f"as_sequence={self.as_sequence}"


def encoder_from_slidechat(
    weights: Weights,
    *,
    as_sequence: bool = False,
    num_heads: int = 8,
    sha256: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SlideChatEncoder:
    """SlideChat's encoder from its weights, alone or in a checkpoint of the whole model.

    Args:
        weights: A state dict, or the path of a file; under the keys "state_dict" or "model", or
            bare. Of names that begin with "LongNet_encoder." only those are loaded.
        as_sequence: As for `SlideChatEncoder`.
        num_heads: 8 in the published model; cannot be read from weights.
        sha256: The SHA-256 that the file must have; None: any.
        device: Of the parameters.
        dtype: Of the parameters; float32 if None.

    Returns:
        The encoder, in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or has another digest, or a weight is missing, extra or
            misshapen.
    """
    found = dict(read_checkpoint(weights, keys=_KEYS, sha256=sha256).weights)
    own = {n.removeprefix(_PREFIX): w for n, w in found.items() if n.startswith(_PREFIX)}
    found = with_published_names(own or found)
    fc1 = found.get("layers.0.ffn.fc1.weight")
    if fc1 is None or fc1.dim() != 2:
        raise ValueError(
            "the weights have no layers.0.ffn.fc1.weight; they must be those of a LongNet encoder."
        )
    config = EncoderConfig(
        d_model=fc1.shape[1],
        nhead=num_heads,
        num_layers=count_layers(found, "layers."),
        dim_feedforward=fc1.shape[0],
        segment_lengths=_SEGMENT_LENGTHS,
        dilation_rates=_DILATION_RATES,
        dropout=0.1,
        drop_path_rate=0.1,
        head_offsets="blocked",
        padding="attended",
    )
    encoder = LongNetEncoder(config, device=device, dtype=dtype or torch.float32)
    load_strictly(encoder, found, published_name, owner="SlideChat's encoder")
    return SlideChatEncoder(encoder, as_sequence=as_sequence).eval()
