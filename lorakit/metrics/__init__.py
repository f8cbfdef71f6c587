"""Scores of predictions against references: pure functions that know no task, row or file.

Metrics of one origin share a module, with its tokenizer. To add one for generated text, write a
function of predictions and lists of references, and name it where tasks list their metrics.
"""
