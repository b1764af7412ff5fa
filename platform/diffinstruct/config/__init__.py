"""The configuration of a run: one frozen value, read from YAML, with every mistake at its file and line."""
