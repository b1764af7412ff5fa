"""What a generator is worth: metrics with intervals, generators side by side, two runs compared."""

REFERENCE_PICTURES = 256  # pictures of the reference that distances are measured to, unless told otherwise
SEED = 2_000_000  # seed of the noise that generators are measured on, unless told otherwise; far from training's
