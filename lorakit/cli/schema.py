"""``lorakit schema``: the recipe's JSON schema."""

from __future__ import annotations

import typer


def schema() -> None:
    """Print the JSON schema of recipes, for editors to complete from.

    Example: lorakit schema > recipe.schema.json; then begin a recipe with
    "# yaml-language-server: $schema=recipe.schema.json".
    """
    import json

    from lorakit.recipe.schema import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))
