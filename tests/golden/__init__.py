"""Golden runs: tiny runs of the command line whose results are kept, as the net for refactorings.

``runs.py`` lists the runs; each trains a tiny model on a few constructed rows and may merge,
convert, evaluate or generate afterwards. ``expected/NAME.json`` has what came out: metrics,
configurations and texts as they are, and of each tensor its shape, its norm and its projections on
fixed vectors. Floats are compared to 5e-6 of their value, tensors to 1e-5 of their norm, everything
else exactly. All runs use one CPU thread and float32.

Compare with the expected results (a part of the test suite)::

    pytest tests/golden

Record them again after an intended change, all or some, and review the diff::

    python -m tests.golden.record [NAME ...]

During a refactoring, compare every tensor to the bit, on one machine and with one set of
packages. Record once with the commit before, then test after every step::

    python -m tests.golden.record --full /tmp/golden
    LORAKIT_GOLDEN_EXACT=/tmp/golden pytest tests/golden

Runs with ``portable=False`` depend on the processor (random numbers of vendor libraries, bfloat16)
and are compared only this way.

To add a run, add a ``GoldenRun`` to ``runs.py``, and record it by its name.
"""
