"""What every test has: one thread for torch, no network, no server or cluster of the person who runs them."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # more would change sums and, unset, it triples the time of tiny steps; Ray's workers inherit it
os.environ["HF_HUB_OFFLINE"] = "1"
for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
    os.environ.pop(name, None)
