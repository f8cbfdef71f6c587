"""The path from a recipe to what a command works on, the same for every command.

``load_task_data`` loads the rows and resolves the task's configuration from them, the encoding
turns rows into tokens, and ``load_adapted`` loads a base model with an adapter. Evaluation, preview
and the scoring of predictions need nothing more and live here too. A new command that reads a
recipe's data starts from ``load_task_data``, not from a task's own ``load``.
"""
