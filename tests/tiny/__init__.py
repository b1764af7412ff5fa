"""Tiny worlds for tests: pipelines of every family, rewards, actors, runs."""
