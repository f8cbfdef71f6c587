"""Evaluate a model on a tokenized split, and generate text from it.

``evaluate_model`` returns losses, predictions and the task's metrics. Metrics other than the loss
are defined by the task (``Task.metrics``), so a new metric needs no change here. Text is generated
with transformers' ``generate``. To add a way to choose the next token, write a logits processor in
``sampling`` and add a field to ``Decoding``.
"""
