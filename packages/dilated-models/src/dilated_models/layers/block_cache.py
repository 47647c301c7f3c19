"""What one block keeps of the tokens before, to continue a text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from dilated_core import DecodingCache
from torch import Tensor

from dilated_models.config import LongNetConfig
from dilated_models.layers.key_history import KeyHistory
from dilated_models.layers.position_codes import alibi_head_dim
from dilated_models.layers.selection_history import SelectionHistory
from dilated_models.layers.self_attention import AttentionCache


class BlockCache:
    """Keys and values for the attention of a block, and the last inputs of its `key_conv`.

    Args:
        config: Of the model.
        has_memory: Whether the block has cross-attention.
        batch_size: B.
        device: Of the memory.
        dtype: Of q, k and v.
        max_seq_len: As for `dilated_core.DecodingCache`.

    Attributes:
        attention: The keys and values: in bounded memory for dilated branches without a window, all
            of them for other kinds of attention; for `"nsa"` the inputs of all tokens.
        memory: The keys and values of its cross-attention, all of them; None without one.
        memory_is_fixed: Whether they are those of another text, which `reset` does not forget.
        inputs: `(B, key_conv − 1, d_model)`, the inputs of the convolution before the next token,
            zeros before the first token; None without a convolution.
    """

    def __init__(
        self,
        config: LongNetConfig,
        *,
        has_memory: bool = False,
        batch_size: int,
        device: torch.device | str,
        dtype: torch.dtype,
        max_seq_len: int | None,
    ) -> None:
        self.attention: AttentionCache
        head_dim = config.head_dim
        if config.positions == "alibi":
            head_dim = alibi_head_dim(head_dim, dtype)
        if config.has_branches and not config.local_window:
            self.attention = DecodingCache(
                config.pattern,
                batch_size=batch_size,
                num_heads=config.nhead,
                num_kv_heads=config.num_kv_heads,
                head_dim=head_dim,
                device=device,
                dtype=dtype,
                max_seq_len=max_seq_len,
            )
        elif config.attention_kind == "block_sparse_adaptive":
            self.attention = SelectionHistory(
                batch_size=batch_size, device=device, dtype=dtype, max_seq_len=max_seq_len
            )
        elif config.attention_kind == "nsa":
            self.attention = KeyHistory(
                batch_size=batch_size,
                num_kv_heads=1,
                head_dim=config.d_model,
                value_dim=0,
                device=device,
                dtype=dtype,
                max_seq_len=max_seq_len,
            )
        else:
            self.attention = _history(config, batch_size, device, dtype, max_seq_len)
        self.memory = (
            _history(config, batch_size, device, dtype, max_seq_len) if has_memory else None
        )
        self.memory_is_fixed = False
        shape = (batch_size, config.key_conv - 1, config.d_model)
        self.inputs = torch.zeros(shape, device=device, dtype=dtype) if config.key_conv else None

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, and of the inputs of the convolution."""
        memory = 0 if self.memory is None else self.memory.nbytes
        inputs = 0 if self.inputs is None else self.inputs.nbytes
        return self.attention.nbytes + memory + inputs

    def keep_inputs(self, x: Tensor, counts: Sequence[int] | None) -> None:
        """Keep the last inputs of the convolution, of those before and the new ones.

        Args:
            x: `(B, n, d_model)`, the new ones.
            counts: How many of each sequence are not padding; None: all.
        """
        if self.inputs is None:
            return
        kept = self.inputs.shape[1]
        extended = torch.cat((self.inputs.to(x.dtype), x), dim=1)
        if counts is None:
            self.inputs = extended[:, x.shape[1] :].clone()  # a view would keep all of x alive
        else:
            index = torch.tensor(counts, device=x.device)[:, None]
            index = index + torch.arange(kept, device=x.device)
            self.inputs = extended.take_along_dim(index[:, :, None], dim=1)

    def fix_memory(self, k: Tensor, v: Tensor, lengths: Sequence[int]) -> None:
        """Keep what the cross-attention of the block sees of another text.

        Args:
            k, v: `(B, N, H_kv, D)`.
            lengths: How many of the N rows of each text are not padding.
        """
        self.memory = KeyHistory(
            batch_size=len(k),
            num_kv_heads=k.shape[2],
            head_dim=k.shape[3],
            device=k.device,
            dtype=k.dtype,
            max_seq_len=None,
        )
        self.memory.append(k, v, lengths)
        self.memory_is_fixed = True

    def reorder(self, batch_indices: Tensor) -> None:
        """Make sequence i a copy of what sequence `batch_indices[i]` was."""
        self.attention.reorder(batch_indices)
        if self.memory is not None:
            self.memory.reorder(batch_indices)
        if self.inputs is not None:
            self.inputs = self.inputs[batch_indices.to(self.inputs.device, torch.int64)]

    def reset(self) -> None:
        """Forget all tokens."""
        self.attention.reset()
        if self.memory is not None and not self.memory_is_fixed:
            self.memory.reset()
        if self.inputs is not None:
            self.inputs = torch.zeros_like(self.inputs)


def _history(
    config: LongNetConfig,
    batch_size: int,
    device: torch.device | str,
    dtype: torch.dtype,
    max_seq_len: int | None,
) -> KeyHistory:
    return KeyHistory(
        batch_size=batch_size,
        num_kv_heads=config.num_kv_heads or config.nhead,
        head_dim=config.head_dim,
        device=device,
        dtype=dtype,
        max_seq_len=max_seq_len,
    )
