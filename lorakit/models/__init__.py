"""Load a base model from a directory or the Hub, and run it.

A model is ``causal`` (a decoder) or ``encoder`` (with a classification head). To support another
kind, add it to ``kinds.Kind``, load it in ``load.load_pretrained`` and reject unsuitable models in
``kinds.check_kind``.
"""
