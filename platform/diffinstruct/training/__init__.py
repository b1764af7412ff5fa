"""A run in one training process: what it is built of, its loop, its guards, what it shows and keeps."""
