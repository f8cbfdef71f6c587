"""Adapters after training: read, write, load, switch, merge and convert them.

``peft`` reads and writes PEFT's format, and ``merge`` folds adapters into a base. To support
another format in ``convert``, add modules like ``loralib`` and ``loralib_read``, which convert a
file from and to ``low_rank.Updates``."""
