"""``convert-recipe``: recipes from the YAML files of other tools."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.console import (
    AsJson,
    Overwrite,
    check_distinct,
    check_writable,
    echo,
    only_results,
    say,
    write_output,
)

if TYPE_CHECKING:
    from lorakit.api import ConvertedRecipe

_File = Annotated[
    Path, typer.Argument(metavar="FILE", help="YAML file of Axolotl or LLaMA-Factory.")
]
_Output = Annotated[
    Path | None,
    typer.Option(metavar="OUT", help="Write the recipe to a file instead of stdout."),
]


def convert_recipe(
    file: _File, output: _Output = None, overwrite: Overwrite = False, as_json: AsJson = False
) -> None:
    """Convert a YAML file of Axolotl or LLaMA-Factory.

    Prints a recipe. The tool is recognized by its keys. Comments at the top of the recipe, and
    lines on stderr, say what has no counterpart and what has another meaning. Defaults that differ
    are written out. Names of datasets are looked up in dataset_info.json.

    Example: lorakit convert-recipe qlora.yml --output recipe.yaml
    """
    from lorakit.api import check_new
    from lorakit.api import convert_recipe as convert

    check_writable("--output", output)
    check_distinct({"--output": output}, {file: "the file to convert"})
    if output is not None and output.is_file():
        check_new(output, overwrite)
    with only_results():
        converted = convert(file)
    if as_json:
        echo(json.dumps(dataclasses.asdict(converted), indent=2, default=str))
    elif output is None:
        echo(converted.text.rstrip("\n"))
    if output is not None:
        write_output(output, converted.text)
    if not as_json:
        _say_notes(converted, output)


def _say_notes(converted: ConvertedRecipe, output: Path | None) -> None:
    for text in converted.unsupported:
        say(f"no counterpart: {text}")
    for text in converted.changed:
        say(f"note: {text}")
    if output is not None:
        say(f"{output}: the recipe for {converted.tool}'s {converted.file}")
