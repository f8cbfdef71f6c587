"""GGUF files, llama.cpp's format, of models and of LoRA adapters.

``families.py`` lists the supported architectures; to add one, add an entry there, and its keys to
``settings.py`` if llama.cpp reads others than those of Llama.
"""
