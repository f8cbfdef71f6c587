"""lorakit: low-rank adapters from one recipe."""

__version__ = "0.1.0"
