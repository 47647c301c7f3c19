"""Logits of the published LongNet decoder, with its weights under our names."""

import json
from pathlib import Path

import pytest
import torch
from dilated_models import LongNetLM
from safetensors import safe_open

DATA = Path(__file__).parent.parent / "data"
# In this order: the first pairs free names that the later ones reuse.
RENAMED = (
    ("embed_tokens.", "embedding."),
    ("output_projection.", "output."),
    ("layers.", "blocks."),
    (".self_attn_layer_norm.", ".attention_norm."),
    (".final_layer_norm.", ".feed_forward_norm."),
    (".self_attn.inner_attn_ln.", ".attention.layer_norm."),
    (".self_attn.", ".attention."),
    (".ffn.ffn_layernorm.", ".feed_forward.layer_norm."),
    (".ffn.", ".feed_forward."),
)


def our_name(theirs: str) -> str:
    name = theirs.removeprefix("model.")
    if name.startswith("layer_norm."):
        return "final_norm." + name.removeprefix("layer_norm.")
    for old, new in RENAMED:
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("name", ["torchscale_longnet_decoder", "torchscale_longnet_decoder_xpos"])
def test_logits(name: str, backend: str) -> None:
    with safe_open(DATA / f"{name}.safetensors", framework="pt") as file:
        options = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    model = LongNetLM(
        num_tokens=options["vocab_size"],
        d_model=options["decoder_embed_dim"],
        nhead=options["decoder_attention_heads"],
        num_decoder_layers=options["decoder_layers"],
        dim_feedforward=options["decoder_ffn_embed_dim"],
        segment_lengths=options["segment_length"],
        dilation_rates=options["dilated_ratio"],
        activation=options["activation_fn"],
        layer_norm_eps=options["layernorm_eps"],
        head_offsets="blocked",
        padding="attended",
        positions="xpos" if options["xpos_rel_pos"] else "none",
        xpos_scale_base=options["xpos_scale_base"],
        tie_embeddings=options["share_decoder_input_output_embed"],
        scale_embedding=not options["no_scale_embedding"],
        backend=backend,
    )
    state = {
        our_name(key): tensor
        for key, tensor in tensors.items()
        if key.startswith("model.") and not key.endswith(".xpos.scale")
    }
    model.load_state_dict(state)
    with torch.no_grad():
        logits = model(tensors["input.tokens"])
    torch.testing.assert_close(logits, tensors["output.logits"], rtol=0, atol=2e-5)
