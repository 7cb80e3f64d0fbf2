"""The package's version, as packaging and saved adapters read it."""

__version__ = "0.2.0"
