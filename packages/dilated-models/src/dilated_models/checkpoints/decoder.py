"""LongNet decoders of torchscale from their weights."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from dilated_core.checks import check_names
from torch import Tensor

from dilated_models.checkpoints.files import Weights, read_checkpoint
from dilated_models.checkpoints.names import decoder_name, load_strictly, without
from dilated_models.config import LongNetConfig
from dilated_models.longnet.language_model import LongNetLM

# Options that decide what the decoder computes, with torchscale's defaults.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": -1,
    "decoder_embed_dim": 768,
    "decoder_attention_heads": 12,
    "decoder_ffn_embed_dim": 3072,
    "decoder_layers": 12,
    "activation_fn": "gelu",
    "dropout": 0.0,
    "activation_dropout": 0.0,
    "no_scale_embedding": True,
    "share_decoder_input_output_embed": False,
    "layernorm_eps": 1e-5,
    "xpos_rel_pos": False,
    "xpos_scale_base": 512,
    "segment_length": None,
    "dilated_ratio": None,
    "checkpoint_activations": False,
}
# Options with one value that a LongNetLM has a counterpart for.
_REQUIRED: dict[str, Any] = {
    "decoder_normalize_before": True,
    "subln": True,
    "deepnorm": False,
    "multiway": False,
    "layernorm_embedding": False,
    "no_output_layer": False,
    "moe_freq": 0,
    "rel_pos_buckets": 0,
    "drop_path_rate": 0.0,
    "attention_dropout": 0.0,
    "seq_parallel": False,
}
# Options that change no logit of a decoder that has the values above.
_WITHOUT_EFFECT = (
    "bert_init",
    "ddp_rank",
    "encoder_normalize_before",
    "flash_attention",
    "fsdp",
    "max_rel_pos",
    "max_target_positions",
    "moe_eval_capacity_token_fraction",
    "moe_expert_count",
    "moe_gating_use_fp32",
    "moe_normalize_gate_prob_before_dropping",
    "moe_second_expert_policy",
    "moe_top1_expert",
    "use_xmoe",
)
_PREFIX = "decoder."
_SCALE = ".self_attn.xpos.scale"
_OUTPUT = "output_projection.weight"


def decoder_from_torchscale(
    weights: Weights,
    config: Mapping[str, Any],
    *,
    sha256: str | None = None,
    backend: str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LongNetLM:
    """A LongNet decoder of torchscale as a `LongNetLM` with the same logits.

        model = decoder_from_torchscale("checkpoint.pt", vars(decoder_config))
        logits = model(tokens)

    Args:
        weights: A state dict, or the path of a `.pth` or safetensors file; under the key "model",
            or bare. All names may begin with "decoder.".
        config: The options of torchscale's `DecoderConfig` by their names there; those left out
            have torchscale's defaults. `segment_length` and `dilated_ratio` are lists, or texts of
            lists as in torchscale.
        sha256: The SHA-256 that the file must have; None: any.
        backend: As in `dilated_core.dilated_attention`.
        device: Of the parameters.
        dtype: Of the parameters; float32 if None.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If an option is unknown or has the wrong type.
        ValueError: If the model cannot honour an option; the file is damaged or has another digest;
            or a weight is missing, extra or misshapen.
    """
    if not isinstance(config, Mapping):
        raise TypeError(
            f"config is a {type(config).__name__}; it must be a dict of torchscale's options, so "
            f"give vars(config) of a DecoderConfig."
        )
    own = longnet_config(config, backend=backend)
    checkpoint = read_checkpoint(weights, sha256=sha256)
    found = _without_prefix(checkpoint.weights)
    found = _without_scales(found, own)
    if own.tie_embeddings:
        found = _with_tied_output(found)
    model = LongNetLM(own, device=device, dtype=dtype or torch.float32)
    owner = f"a decoder of {own.num_decoder_layers} layers and width {own.d_model}"
    load_strictly(model, found, decoder_name, owner=owner)
    return model.eval()


def longnet_config(options: Mapping[str, Any], *, backend: str = "auto") -> LongNetConfig:
    """The `LongNetConfig` of a decoder with these options of torchscale.

    Raises:
        TypeError, ValueError: As `decoder_from_torchscale`, for options.

    Example:
        >>> longnet_config({"vocab_size": 9, "segment_length": "[4, 8]", "dilated_ratio": [1, 2]}
        ... ).segment_lengths
        (4, 8)
    """
    check_names("torchscale's DecoderConfig", options, (*_DEFAULTS, *_REQUIRED, *_WITHOUT_EFFECT))
    for name, required in _REQUIRED.items():
        if options.get(name, required) != required:
            raise ValueError(
                f"{name} is {options[name]!r}; it must be {required!r}, since LongNetLM has no "
                f"other, so train or export the decoder with that value."
            )
    given = {**_DEFAULTS, **options}
    if given["dropout"] != given["activation_dropout"]:
        raise ValueError(
            f"dropout is {given['dropout']} and activation_dropout {given['activation_dropout']}; "
            f"they must be equal, since LongNetLM has one dropout, so give 0 for both to score "
            f"texts."
        )
    return LongNetConfig(
        num_tokens=given["vocab_size"],
        d_model=given["decoder_embed_dim"],
        nhead=given["decoder_attention_heads"],
        num_decoder_layers=given["decoder_layers"],
        dim_feedforward=given["decoder_ffn_embed_dim"],
        segment_lengths=_integers("segment_length", given["segment_length"]),
        dilation_rates=_integers("dilated_ratio", given["dilated_ratio"]),
        dropout=given["dropout"],
        activation=given["activation_fn"],
        layer_norm_eps=given["layernorm_eps"],
        head_offsets="blocked",
        padding="attended",
        positions="xpos" if given["xpos_rel_pos"] else "none",
        xpos_scale_base=given["xpos_scale_base"],
        tie_embeddings=given["share_decoder_input_output_embed"],
        scale_embedding=not given["no_scale_embedding"],
        activation_checkpointing=given["checkpoint_activations"],
        backend=backend,
    )


def _integers(name: str, value: object) -> Sequence[int]:
    """A list of integers, or the text of one; torchscale evaluates the text as code."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = None
    if not isinstance(value, list | tuple):
        raise ValueError(
            f"{name} is not given as a list of integers; it must be one, such as [1024, 4096]."
        )
    return cast("Sequence[int]", value)


def _without_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if weights and all(name.startswith(_PREFIX) for name in weights):
        return {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items()}
    return dict(weights)


def _without_scales(weights: Mapping[str, Tensor], config: LongNetConfig) -> dict[str, Tensor]:
    """Leave out xPos' constants, after a comparison with those that the model computes.

    Raises:
        ValueError: If they differ.
    """
    if config.positions != "xpos":
        return dict(weights)
    D = config.head_dim
    expected = (torch.arange(0, D, 2, dtype=torch.float64) + 0.4 * D) / (1.4 * D)
    names = [name for name in weights if name.endswith(_SCALE)]
    for name in names:
        scale = weights[name].double().cpu()
        if scale.shape != expected.shape or not torch.allclose(scale, expected, atol=1e-3):
            raise ValueError(
                f"{name} holds other constants than xPos with a head_dim of {D}; the weights must "
                f"be those of torchscale's xPos, so check decoder_attention_heads."
            )
    return without(weights, names)


def _with_tied_output(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the output layer's weight where a file holds the shared weight once.

    Raises:
        ValueError: If the file holds two different ones.
    """
    shared = weights.get("embed_tokens.weight")
    if shared is None:
        return weights
    output = weights.setdefault(_OUTPUT, shared)
    if output.shape == shared.shape and not torch.equal(output, shared):
        raise ValueError(
            f"{_OUTPUT} and embed_tokens.weight differ; they must be equal with "
            f"share_decoder_input_output_embed, so leave that option out."
        )
    return weights
