"""What a generator is worth: metrics with intervals, generators side by side, two runs compared."""
