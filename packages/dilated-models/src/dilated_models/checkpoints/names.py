"""Published names of weights and ours, and the strict loading of one into the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn

PublishedName = Callable[[str], str]
"""Maps the name of a weight in this library to its published name."""

# In this order: later pairs match parts of names that the pairs before have not replaced.
_DECODER_RENAMES = (
    (".attention_norm.", ".self_attn_layer_norm."),
    (".feed_forward_norm.", ".final_layer_norm."),
    (".attention.layer_norm.", ".self_attn.inner_attn_ln."),
    (".attention.", ".self_attn."),
    (".feed_forward.layer_norm.", ".ffn.ffn_layernorm."),
    (".feed_forward.", ".ffn."),
)
_DECODER_BEGINNINGS = {
    "embedding": "embed_tokens",
    "output": "output_projection",
    "blocks": "layers",
    "final_norm": "layer_norm",
}
_SHOWN = 8


def decoder_name(name: str) -> str:
    """Torchscale's name of a weight of a `LongNetLM`.

    Example:
        >>> decoder_name("blocks.0.attention.q_proj.weight"), decoder_name("final_norm.bias")
        ('layers.0.self_attn.q_proj.weight', 'layer_norm.bias')
    """
    first, rest = name.split(".", 1)
    name = f"{_DECODER_BEGINNINGS[first]}.{rest}"
    for ours, published in _DECODER_RENAMES:
        name = name.replace(ours, published)
    return name


def check_weights(
    expected: Mapping[str, Tensor], given: Mapping[str, Tensor], *, owner: str
) -> None:
    """Refuse weights that are not exactly the expected ones.

    Args:
        expected: A state dict with the names that users know; only shapes are read.
        given: The weights.
        owner: What they are loaded into, for errors.

    Raises:
        ValueError: If a weight is missing, extra or misshapen, or is not floating.
    """
    problems = [
        _listed("is missing", "are missing", [n for n in expected if n not in given]),
        _listed("is not part of it", "are not part of it", [n for n in given if n not in expected]),
    ]
    for name in expected.keys() & given.keys():
        want, have = tuple(expected[name].shape), tuple(given[name].shape)
        if want != have:
            problems.append(f"{name} has shape {have} instead of {want}")
        elif not given[name].is_floating_point():
            problems.append(f"{name} has dtype {given[name].dtype}, which is not floating")
    problems = sorted(filter(None, problems))
    if problems:
        shown = problems[:_SHOWN]
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(
            f"the weights do not fit {owner}: {'; '.join(shown)}{more}. Each weight must be there "
            f"with its shape, and no other, so give the configuration of these weights."
        )


def _listed(one: str, several: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{shown}{more} {one if len(names) == 1 else several}"


def load_strictly(
    module: nn.Module, weights: Mapping[str, Tensor], published_name: PublishedName, *, owner: str
) -> None:
    """Copy published weights into a module.

    Raises:
        ValueError: As `check_weights`; nothing is copied then.
    """
    own = module.state_dict()
    check_weights({published_name(name): own[name] for name in own}, weights, owner=owner)
    module.load_state_dict({name: weights[published_name(name)] for name in own})


def without(weights: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The weights but for those called `names`."""
    left_out = set(names)
    return {name: tensor for name, tensor in weights.items() if name not in left_out}


def count_layers(weights: Mapping[str, Tensor], prefix: str) -> int:
    """How many layers `prefix0.`, `prefix1.`, … the weights have.

    Example:
        >>> count_layers({"layers.0.w": Tensor(), "layers.1.w": Tensor()}, "layers.")
        2
    """
    numbers = {
        int(number)
        for name in weights
        if name.startswith(prefix) and (number := name[len(prefix) :].split(".")[0]).isdigit()
    }
    return max(numbers, default=-1) + 1
