"""Processes and devices: whatever depends on how many of them share a run.

``processes`` splits work by rows, as evaluations need it: each process takes a shard of the rows,
and ``gather`` collects the results. ``strategy`` is for training: it places and wraps what trains,
and reduces gradients and counts. With one process, both change nothing.

A new way to distribute training is a subclass of ``Strategy`` that ``build_strategy`` returns.
"""
