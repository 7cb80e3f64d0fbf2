"""The package's version, in the one place that packaging and saved adapters read it from."""

__version__ = "0.1.0"
