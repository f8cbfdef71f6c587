"""Evaluate a model on a tokenized split, and generate text from it.

``evaluate_model`` gives losses, predictions and the task's metrics; what is measured beyond the
loss is the task's to say (``Task.metrics``), so a new metric needs no change here. Generation goes
through transformers' ``generate``. A new way to choose the next token is a logits processor in
``sampling`` and a field of ``Decoding``.
"""
