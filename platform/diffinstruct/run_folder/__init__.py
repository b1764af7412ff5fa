"""What lies in the folder of a run: checkpoints, locks, signals, the mirror in an object store."""
