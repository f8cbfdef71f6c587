"""Methods defined by a user's file: ``./my_method.py:MyMethod``."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError, create_model
from pydantic.errors import PydanticUndefinedAnnotation
from pydantic_core import PydanticSerializationError

from lorakit.errors import LorakitError, UserError, shown
from lorakit.methods.base import Method, RunHooks
from lorakit.recipe.sections import AdapterSection, Section
from lorakit.user_code import check_concrete, guarded, load_attribute, load_class

_KINDS = ("linear", "conv1d", "embedding", "slice")
#: Keys of ``adapter_config.json`` that say which adapter it is.
_SETTINGS = {"peft_type", "task_type", "base_model_name_or_path", "revision"}
#: The methods whose errors are reported with the user's file and line.
_GUARDED = tuple(
    name
    for name, value in vars(Method).items()
    if inspect.isfunction(value) and not name.startswith("_")
)


def load_method(spec: str) -> Method:
    """The method that ``FILE.py:CLASS`` names; the file is run. Raises UserError if it does not
    define one."""
    found = load_class(spec, Method)
    _, file, digest = load_attribute(spec)
    _check_config(spec, found)
    if found.kinds and found.layer_class is Method.layer_class:
        _check_layer(spec, found)
    _check_signatures(spec, found)
    try:
        method: Method = guarded(found, file)()
    except LorakitError:
        raise
    except Exception as error:
        raise UserError(f"{spec}: cannot be created without arguments: {error}") from error
    _check_kinds(spec, method)
    method.name = spec  # type: ignore[misc]  # its name in recipes and saved adapters
    method.digest = digest.hex()
    _guard(method, file)
    return method


def _guard(method: Method, file: Path) -> None:
    """Let errors in the method name file and line, and check what it returns."""
    for name in _GUARDED:
        setattr(method, name, guarded(getattr(method, name), file))
    for name, (is_valid, allowed) in _RETURNED.items():
        setattr(method, name, _checked(method, name, is_valid, allowed))
    setattr(method, "link", _checked_link(method))  # noqa: B010
    setattr(method, "param_groups", _checked_groups(method))  # noqa: B010


def _checked(
    method: Method, name: str, is_valid: Callable[[Any], bool], allowed: str
) -> Callable[..., Any]:
    """Wrap ``method.name`` to raise UserError for a result that is not valid."""
    function = getattr(method, name)

    @wraps(function)
    def checked(*arguments: Any, **keys: Any) -> Any:
        result = function(*arguments, **keys)
        if not is_valid(result):
            found = type(result).__name__
            raise UserError(f"{method.name}: {name} returned a {found}; allowed: {allowed}")
        return result

    return checked


def _checked_link(method: Method) -> Callable[[Mapping[str, Any]], None]:
    """Wrap ``link`` to raise UserError for parameters that an adapter file could not hold."""
    function = method.link

    @wraps(function)
    def checked(layers: Mapping[str, Any]) -> None:
        function(layers)
        for name, layer in layers.items():
            own = layer.adapter_parameters()
            nested = [key for key in own if "." in key]
            if nested and type(method).to_peft is Method.to_peft:
                allowed = "parameters that are attributes of the layer itself"
                raise UserError(f"{method.name}: {name}.{nested[0]}; allowed: {allowed}")
        for key in method.shared:
            values = [layer.adapter_parameters().get(key) for layer in layers.values()]
            if any(v is None or v is not values[0] or v.requires_grad for v in values):
                allowed = "parameters that link makes one frozen object of all layers"
                raise UserError(f"{method.name}: shared: {key}; allowed: {allowed}")

    return checked


def _checked_groups(method: Method) -> Callable[..., Any]:
    """Wrap ``param_groups`` to raise UserError unless each trained parameter is in one group."""
    function = _checked(method, "param_groups", _are_groups, _GROUPS)

    @wraps(function)
    def checked(parameters: Mapping[str, Any], *arguments: Any) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = function(parameters, *arguments)
        counts = Counter(id(parameter) for group in groups for parameter in group["params"])
        problems = [
            f"{name} is missing" if not counts[id(parameter)] else f"{name} is there twice"
            for name, parameter in parameters.items()
            if counts[id(parameter)] != 1
        ]
        if len(counts) > len(parameters):
            problems.append("a parameter that is not trained")
        if problems:
            allowed = "every trained parameter once"
            raise UserError(f"{method.name}: param_groups: {problems[0]}; allowed: {allowed}")
        return groups

    return checked


def _is_layer(value: Any) -> bool:
    from lorakit.layers import AdapterLayer

    return isinstance(value, AdapterLayer) and hasattr(value, "base_layer")


def _are_groups(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(group, dict) and isinstance(group.get("params"), list | tuple) for group in value
    )


_GROUPS = "a list of dicts with a list of params, as for an optimizer of torch"
_RETURNED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "wrap": (_is_layer, "an AdapterLayer whose __init__ calls super().__init__(base_layer)"),
    "hooks": (lambda value: isinstance(value, RunHooks), f"a {RunHooks.__module__}.RunHooks"),
}


def _check_config(spec: str, found: type[Method]) -> None:
    config: Any = getattr(found, "Config", None)
    if not (isinstance(config, type) and issubclass(config, AdapterSection)):
        allowed = f"a subclass of {AdapterSection.__module__}.AdapterSection"
        raise UserError(f"{spec}: {_value(found, 'Config')}; allowed: {allowed}")
    if taken := sorted(_SETTINGS & config.model_fields.keys()):
        raise UserError(
            f"{spec}: Config: {taken[0]}: a key of adapter_config.json; allowed: others"
        )
    try:
        config.model_rebuild()
    except PydanticUndefinedAnnotation as error:
        raise UserError(f"{spec}: Config: {error.message}") from None
    _check_defaults(spec, config)


def _check_defaults(spec: str, config: type[AdapterSection]) -> None:
    """Raise UserError if a default cannot be written to a recipe and read back."""
    for key, field in config.model_fields.items():
        if field.is_required() or key in AdapterSection.model_fields:
            continue
        default = field.get_default(call_default_factory=True)
        kind: Any = field.annotation
        alone = cast(Any, create_model("Alone", __base__=Section, value=(kind, field)))
        try:
            alone(**alone.model_construct(value=default).model_dump(mode="json"))
        except (PydanticSerializationError, ValidationError):
            raise UserError(
                f"{spec}: Config: {key} = {default!r}: cannot be written to a recipe and read "
                "back; allowed: numbers, text, lists and mappings"
            ) from None


def _check_kinds(spec: str, method: Method) -> None:
    kinds: Any = method.kinds
    known = ", ".join(_KINDS)
    if not isinstance(method.shared, tuple | list):
        raise UserError(f"{spec}: shared = {shown(method.shared)}; allowed: a tuple of names")
    if not isinstance(kinds, set | frozenset | list | tuple) or any(k not in _KINDS for k in kinds):
        raise UserError(f"{spec}: kinds = {shown(kinds)}; allowed: a set of {known}")
    if not kinds and type(method).trained_parameters is Method.trained_parameters:
        raise UserError(
            f"{spec}: kinds is empty, so the method trains nothing; allowed: a set of {known}, or "
            "an empty one if trained_parameters is defined"
        )


def _check_layer(spec: str, found: type[Method]) -> None:
    from lorakit.layers import AdapterLayer

    layer: Any = getattr(found, "Layer", None)
    if not (isinstance(layer, type) and issubclass(layer, AdapterLayer)):
        allowed = f"a subclass of {AdapterLayer.__module__}.AdapterLayer"
        raise UserError(f"{spec}: {_value(found, 'Layer')}; allowed: {allowed}")
    check_concrete(f"{spec}: Layer", layer)
    if found.wrap is Method.wrap:
        _check_signature(
            f"{spec}: Layer.__init__", layer.__init__, ["base_layer", "config", "name"]
        )
    if "slice" in found.kinds and not layer.can_be_part():
        raise UserError(f"{spec}: kinds has slice; allowed: a Layer that defines join and split")


def _check_signatures(spec: str, found: type[Method]) -> None:
    """Raise UserError if an overridden method does not take the arguments that it is called
    with."""
    for name in _GUARDED:
        parameters = [*inspect.signature(getattr(Method, name)).parameters][1:]
        _check_signature(f"{spec}: {name}", getattr(found, name), parameters)


def _check_signature(where: str, function: Callable[..., Any], parameters: list[str]) -> None:
    try:
        inspect.signature(function).bind("self", *parameters)
    except TypeError as error:
        name = function.__name__
        allowed = f"{name}({', '.join(['self', *parameters])})"
        raise UserError(f"{where}: {error}; allowed: {allowed}") from None


def _value(found: type[Method], name: str) -> str:
    """Describe what the class has as ``name``."""
    if not hasattr(found, name):
        return f"does not define {name}"
    value = getattr(found, name)
    described = f"the class {value.__name__}" if isinstance(value, type) else shown(value)
    return f"{name} = {described}"
