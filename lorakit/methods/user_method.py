"""Methods defined by a user's file: ``./my_method.py:MyMethod``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from pydantic.errors import PydanticUndefinedAnnotation

from lorakit.errors import LorakitError, UserError, shown
from lorakit.methods.base import Method, RunHooks
from lorakit.recipe.sections import AdapterSection
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
            if missing := set(method.shared) - set(own):
                allowed = "parameters that every layer has after link"
                raise UserError(f"{method.name}: shared: {min(missing)}; allowed: {allowed}")

    return checked


def _is_layer(value: Any) -> bool:
    from lorakit.layers import AdapterLayer

    return isinstance(value, AdapterLayer) and hasattr(value, "base_layer")


def _are_groups(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(g, dict) and "params" in g for g in value)


_RETURNED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "wrap": (_is_layer, "an AdapterLayer whose __init__ calls super().__init__(base_layer)"),
    "param_groups": (_are_groups, "a list of dicts with params, as for an optimizer of torch"),
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


def _check_kinds(spec: str, method: Method) -> None:
    kinds: Any = method.kinds
    known = ", ".join(_KINDS)
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
