"""The version of the package, which also goes into what lorakit writes."""

__version__ = "0.1.0"
