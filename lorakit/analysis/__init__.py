"""What an adapter has learned: the spectra of its updates, and the subspaces of two adapters.

``spectrum`` and ``subspaces`` are the arithmetic, ``factors`` and ``base_weights`` read the files,
``inspect`` makes the ``report`` and ``plots`` draws it. To add a number, compute it in ``inspect``
and print it in ``cli/inspect.py``.
"""
