"""What every test has: one thread for torch, no network, no server or cluster of the person who runs them."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # more would change sums; unset, tiny steps take three times as long. Ray inherits it
os.environ["HF_HUB_OFFLINE"] = "1"
for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
    os.environ.pop(name, None)
