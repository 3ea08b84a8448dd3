"""The command `kvfleet`."""

__version__ = "0.1.0"
