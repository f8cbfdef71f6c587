"""Adapters after training: reading and writing, loading, switching, merging, converting.

``peft`` is PEFT's format, ``merge`` folds adapters into a base. Another format that adapters are
converted from or to is a module like ``loralib``.
"""
