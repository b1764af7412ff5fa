"""The journal of a run, which is the truth, and its delivery to trackers."""
