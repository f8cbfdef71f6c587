"""Everything that depends on how many processes and devices share a run.

``processes`` splits evaluations: each process takes a shard of the rows, and ``gather`` collects
the results. ``strategy`` is for training: it places and wraps the trained modules, and reduces
gradients and counts. With a single process, neither has any effect.

To add a way to distribute training, derive a class from ``Strategy`` and return it from
``build_strategy`` (``build``).
"""
