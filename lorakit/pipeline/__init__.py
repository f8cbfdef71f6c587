"""Turn a recipe into data and models, in the same way for every command.

``load_task_data`` loads the rows and resolves the task's configuration from them, ``encoding``
tokenizes them, and ``load_adapted`` loads a base model with an adapter. Evaluation, preview and the
scoring of predictions, which need nothing more, are here too. A new command that reads a recipe's
data starts with ``load_task_data`` rather than ``Task.load``.
"""
