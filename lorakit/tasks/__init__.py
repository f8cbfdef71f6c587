"""Tasks turn rows of data into examples and predictions into scores.

Each module that exports an instance of ``base.Task`` as ``TASK`` is a built-in task; no list names
them. To add one, write a module that subclasses ``Task``, or one of the classes that share more:
``formats.FormattedTask``, ``classification.LabelledTask``, ``completion.Completion``. Tasks import
heavy libraries inside functions only. Users' own files (``user_task``) work the same way.
"""
