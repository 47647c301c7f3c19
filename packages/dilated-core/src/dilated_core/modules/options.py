"""One declaration of each option: constructors take config objects, or their options as keywords.

The options of a module are the fields of its config and are written nowhere else. A constructor is
written for config objects, and `from_options` lets callers give the fields instead:

    class DilatedAttention(nn.Module):
        @from_options(DilatedAttentionArguments, config=DilatedAttentionConfig)
        def __init__(self, config: DilatedAttentionConfig) -> None: ...

    DilatedAttention(config)
    DilatedAttention([8, 32], [1, 4], scale=0.5)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, cast, overload

from dilated_core.checks import check_names

Configs = ParamSpec("Configs")
Options = ParamSpec("Options")


class BoundConstructor(Protocol[Configs, Options]):
    """What a type checker sees: the constructor as written, or as its options' signature."""

    @overload
    def __call__(self, *args: Configs.args, **kwargs: Configs.kwargs) -> None: ...
    @overload
    def __call__(self, *args: Options.args, **kwargs: Options.kwargs) -> None: ...


class Constructor(Protocol[Configs, Options]):
    """A `BoundConstructor` before it is bound to an instance, as functions in a class are."""

    def __get__(
        self, instance: Any, owner: Any = None, /
    ) -> BoundConstructor[Configs, Options]: ...


def from_options(
    arguments: Callable[Options, object],
    *,
    elsewhere: Mapping[str, str],
    **configs: type[Any],
) -> Callable[[Callable[Concatenate[Any, Configs], None]], Constructor[Configs, Options]]:
    """Let an `__init__` that takes config objects also take their options.

    Keyword-only parameters of `__init__`, such as `device`, may be given with either form.

    Args:
        arguments: A callable with the signature that callers see, such as a dataclass that inherits
            from the configs and adds the keyword-only parameters. Only its signature is read.
        elsewhere: Answers for arguments of other functions, see `check_names`.
        **configs: The class of each config that `__init__` takes, by the name of its parameter.
    """
    signature = inspect.signature(arguments)

    def decorate(
        init: Callable[Concatenate[Any, Configs], None],
    ) -> Constructor[Configs, Options]:
        beside = [
            name
            for name, parameter in inspect.signature(init).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        ]

        @wraps(init)
        def construct(self: Any, *args: Any, **options: Any) -> None:
            owner = type(self).__name__
            classes = tuple(configs.values())
            if options.keys() & configs or any(isinstance(x, classes) for x in args):
                given = {name: options.pop(name) for name in beside if name in options}
                given |= _given_configs(owner, configs, args, options, elsewhere)
            else:
                check_names(owner, options, signature.parameters, elsewhere)
                values = _bind(owner, signature, args, options)
                given = {
                    name: config(
                        **{f.name: values[f.name] for f in fields(config) if f.name in values}
                    )
                    for name, config in configs.items()
                }
                given |= {name: values[name] for name in beside if name in values}
            init(self, **given)  # pyright: ignore[reportCallIssue]

        # What help(), IPython and docs/api show.
        this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        shown = signature.replace(parameters=[this, *signature.parameters.values()])
        setattr(construct, "__signature__", shown)  # noqa: B010
        return cast(Any, construct)

    return decorate


def check_forward_names(
    module: object, given: Mapping[str, object], known: Collection[str], *configs: Any
) -> None:
    """Refuse keywords that the `forward` of a module does not have; see `check_names`.

    Raises:
        TypeError: If there is one.
    """
    if given:
        options = (field.name for config in configs for field in fields(config))
        elsewhere = dict.fromkeys(options, "is an option of the constructor")
        check_names(f"{type(module).__name__}.forward", given, known, elsewhere)


def show_options(config: Any, *always: str) -> str:
    """`name=value` of the fields named in `always` and of those that differ from their defaults."""
    shown: list[str] = []
    for field in sorted(fields(config), key=lambda field: field.name not in always):
        value = getattr(config, field.name)
        if field.name in always or value != field.default:
            text = list(cast("tuple[object, ...]", value)) if isinstance(value, tuple) else value
            shown.append(f"{field.name}={text!r}")
    return ", ".join(shown)


def _given_configs(
    owner: str,
    configs: dict[str, type[Any]],
    args: tuple[Any, ...],
    options: dict[str, Any],
    elsewhere: Mapping[str, str],
) -> dict[str, Any]:
    """The config objects of a call, by parameter."""
    of_a_config = {
        field.name: f"belongs in {name}: dataclasses.replace({name}, {field.name}=...)"
        for name, config in configs.items()
        for field in fields(config)
    }
    check_names(owner, options, configs, {**elsewhere, **of_a_config})
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in configs])
    given = _bind(owner, signature, args, options)
    for name, config in configs.items():
        if not isinstance(given[name], config):
            raise TypeError(
                f"{name} is a {type(given[name]).__name__}; it must be a {config.__name__}."
            )
    return given


def _bind(
    owner: str, signature: inspect.Signature, args: tuple[Any, ...], options: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name.

    Raises:
        TypeError: If one is missing or there are too many.
    """
    try:
        return signature.bind(*args, **options).arguments
    except TypeError as error:
        empty = inspect.Parameter.empty
        bare = [parameter.replace(annotation=empty) for parameter in signature.parameters.values()]
        raise TypeError(f"{owner}: {error}; its arguments are {inspect.Signature(bare)}.") from None
