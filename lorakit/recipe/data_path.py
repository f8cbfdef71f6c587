"""``task.path``: where the rows of each split come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from lorakit.errors import did_you_mean, shown

_Text = Annotated[str, Field(min_length=1)]
#: A file, a glob pattern, a directory, or a list of these.
_Files = _Text | Annotated[list[_Text], Field(min_length=1)]


class DataSource(BaseModel):
    """Rows from one place. ``path`` are files, globs and directories, or a dataset on the Hub,
    then with its ``split``, its configuration ``name`` or both. With a ``weight``, the source
    contributes this share of the rows of an epoch, relative to the weights of the others."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    path: _Files
    """Files, globs and directories, or the name of a dataset on the Hub."""
    name: _Text | None = None
    """The configuration of a dataset on the Hub."""
    split: _Text | None = None
    """The split of a dataset on the Hub."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """The share of the rows of an epoch, relative to the weights of the other sources."""

    @model_serializer(mode="wrap")
    def _given_keys(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if value is not None}


_ALLOWED = {
    "path": "a file, a glob, a directory or a list of these, or the name of a Hub dataset",
    "name": "the name of a configuration",
    "split": "the name of a split",
    "weight": "a number > 0",
}
_Source = _Text | DataSource
_Sources = Annotated[list[_Source], Field(min_length=1)]
_Splits = Annotated[
    dict[str, Annotated[_Text | DataSource | _Sources, Field(union_mode="left_to_right")]],
    Field(min_length=1),
]
_DataPath = Annotated[
    _Text | DataSource | _Sources | _Splits | None, Field(union_mode="left_to_right")
]


def _with_valid_sources(value: Any) -> Any:
    """Raise ValueError for an invalid source, naming its key, as the error of a union would
    not."""
    for source in _sources(value):
        if isinstance(source, dict):
            try:
                DataSource.model_validate(source)
            except ValidationError as error:
                raise ValueError(_problem(source, error)) from None
    return value


def _sources(value: Any) -> Iterator[Any]:
    """All sources that ``value`` contains."""
    if isinstance(value, list):
        yield from value
    elif isinstance(value, dict) and value.keys().isdisjoint(_ALLOWED):
        for part in value.values():
            yield from part if isinstance(part, list) else [part]
    else:
        yield value


def _problem(source: dict[Any, Any], error: ValidationError) -> str:
    detail = error.errors(include_url=False)[0]
    key = str(detail["loc"][0])
    keys = ", ".join(_ALLOWED)
    if detail["type"] == "missing":
        return f"{shown(source)}: a source without path; allowed: {keys}"
    where = f"source {shown(source.get('path'))}"
    if detail["type"] == "extra_forbidden":
        return did_you_mean(f"{where}: unknown key {key!r}", key, _ALLOWED) + f"; allowed: {keys}"
    return f"{where}: {key} = {shown(source[key])}; allowed: {_ALLOWED[key]}"


#: A source or a list of sources: directories, or the training split; or a mapping of splits to
#: these.
DataPath = Annotated[
    _DataPath, BeforeValidator(_with_valid_sources, json_schema_input_type=_DataPath)
]
#: Sources, as in the values of ``DataPath``.
Sources = str | DataSource | list[str | DataSource]
#: The values of ``DataPath``.
PathOption = Sources | dict[str, Sources] | None


def listed_sources(sources: Sources) -> list[str | DataSource]:
    return sources if isinstance(sources, list) else [sources]
