"""The methods: how the frozen weights of a base model are adapted.

A module that exports an instance of ``lorakit.methods.base.Method`` as ``METHOD`` registers it. It
contains the configuration and is imported to check a recipe, so it does not import torch; the
layer class, which does, is in a module whose name ends with ``_layer``. A new built-in method is a
pair of such modules; a user's own method is a file anywhere else (docs/own-method.md). The contract
that all methods meet is ``lorakit methods --check NAME``.
"""
