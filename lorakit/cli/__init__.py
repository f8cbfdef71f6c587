"""The command line, on top of ``lorakit.api``.

A command is a function with typer's annotations and an example in its docstring, registered in
``main``. Modules here import ``lorakit.api`` inside functions only, so that ``--help`` is quick.
"""
