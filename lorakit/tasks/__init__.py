"""Tasks turn rows of data into examples and predictions into scores.

Each module here that exports an instance of ``base.Task`` as ``TASK`` is a built-in task and is
found automatically. To add one, write a module that subclasses ``Task`` or a more specific class:
``formats.FormattedTask``, ``classification.LabelledTask`` or ``completion.Completion``. Tasks
import heavy libraries only inside functions. A user's file (``user_task``) defines a task in the
same way.
"""
