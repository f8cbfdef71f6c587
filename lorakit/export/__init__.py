"""What other programs use: GGUF files for llama.cpp, repositories on the Hub, and the check of an
adapter against vLLM's rules.

To add a target, add a module here, a call to ``api.py`` and a value of ``--to`` to
``cli/export.py``.
"""
