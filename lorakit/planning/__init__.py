"""What a run will need, before anything is loaded: memory by part, steps, operations and time.

The run's own modules compute one pass on the ``meta`` device (``passes``), whose tensors have
shapes and no values, while ``tracker`` follows what is in memory and ``compiled`` what compiled
layers would keep. So an architecture, a method or a quantized base needs nothing here; an operator
that allocates more than its results is listed in ``operators``, a GPU in ``devices``.
"""
