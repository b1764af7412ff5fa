"""What lies in the folder of a run: where it is, checkpoints and the tree of their state, signals, the mirror in an object
store. Its lock is in `diffinstruct/locks.py`."""
