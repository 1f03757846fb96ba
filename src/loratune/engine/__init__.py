"""Training: trials in, records out. Writes nothing; knows nothing of the store."""
