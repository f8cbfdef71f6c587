"""Arithmetic on plain tensors: functions that depend on neither models nor recipes.

A new kernel is a function with its formula and shapes in the docstring, tested against a direct
transcription of the formula.
"""
