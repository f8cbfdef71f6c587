"""Score predictions against references, in pure functions independent of tasks, rows and files.

Metrics of the same origin share a module and its tokenizer. To add a metric for generated text,
write a function of predictions and lists of references, and add it to the metrics of a task or to
``tasks.user_yaml``. To add one for labels, add it to ``labels.label_score``.
"""
