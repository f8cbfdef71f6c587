"""Convert the YAML files of other tools (Axolotl, LLaMA-Factory) to recipes.

What single keys are called is in ``lorakit.recipe.peers``; here is what a whole file means: its
datasets, the defaults of its tool, and keys that depend on each other. A module per tool fills a
``Draft``; ``convert`` reads the file, checks the result and words it.
"""
