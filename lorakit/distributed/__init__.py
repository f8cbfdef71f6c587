"""Everything that depends on how many processes and devices share a run.

``launcher`` reads what torchrun and accelerate launch set. ``processes`` splits evaluations: each
process takes a shard of the rows, and ``gather`` collects the results. ``strategy`` is for
training: it places and wraps the trained modules, and reduces gradients and counts. ``watch`` is
for processes that each do work of their own, such as the members of a sweep. With a single process,
none of them has any effect.

To add a way to distribute training, derive a class from ``Strategy`` and return it from
``build_strategy`` (``build``).
"""
