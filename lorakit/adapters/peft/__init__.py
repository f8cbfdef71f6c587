"""PEFT's adapter format: the only package that knows its file names, keys and tensor names.

``schema`` describes a version of PEFT and is where a new one is added. ``lora`` converts the layers
of LoRA, DoRA and AdaLoRA; a method with another format brings it with ``Method.to_peft`` and
``Method.from_peft``.
"""
