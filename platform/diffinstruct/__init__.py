"""Diff-Instruct*: one-step text-to-image generators aligned with human preference."""

__version__ = "0.1.0"
