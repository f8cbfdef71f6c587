"""PEFT's adapter format. Its file names, keys and tensor names are defined in this package only.

To support a new version of PEFT, change ``schema``. ``lora`` converts the layers of LoRA, DoRA and
AdaLoRA; a method with another format overrides ``Method.to_peft`` and ``Method.from_peft``.
"""
