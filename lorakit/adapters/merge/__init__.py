"""Merging adapters into their base: ``lorakit.merge``.

``run`` is the entry point. The base is resolved ``by_name`` without transformers if possible, or
``by_class``; the resulting plan is then streamed to the output files. To resolve another decoder by
name, add it to ``by_name.PLAIN``.
"""
