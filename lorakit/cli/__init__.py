"""The command line, on top of ``lorakit.api``.

Modules here import ``lorakit.api`` inside functions only, so that ``--help`` is quick.

To add a command, write a function with typer's annotations and an example in its docstring;
``preview.py`` is a short one to start from. A recipe and its overrides are parameters of the types
``RecipeFile`` and ``Overrides`` of ``console``, and ``recipe.load.open_recipe`` loads them, so that
errors name the recipe's line. The command's work runs within ``console.only_results``; then it
prints the result to stdout, as JSON for ``AsJson``. Register the function in ``main``. What it
computes is a function elsewhere in lorakit, which ``api`` lists. Its tests are in ``tests/e2e``.
"""
