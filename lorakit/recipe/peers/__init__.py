"""The keys of other fine-tuning tools, and what they are called in a recipe.

A module per tool maps its keys to ``Counterpart``. Messages about unknown keys (``diagnostics``),
the conversion of whole files (``lorakit.migration``) and the tables of ``docs/migrate.md`` read
these maps. To support a key, add it to the map of its tool and to the documentation.
"""
