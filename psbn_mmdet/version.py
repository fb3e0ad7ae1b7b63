"""The version, on its own so that setup.py can read it."""

__version__ = '0.1.0'
