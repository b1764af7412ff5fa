"""Runs and sweeps as tables, figures and pages."""
