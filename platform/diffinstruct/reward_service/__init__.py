"""The rewards of a run: who computes them, whether they can be trusted, whether they are over-optimized."""
