"""The version, in one place for code, records and journals."""

__version__ = "0.1.0"
