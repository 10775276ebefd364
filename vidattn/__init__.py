"""Exact, fast attention for video transformers."""

__version__ = "0.1.0"
