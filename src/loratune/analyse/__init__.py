"""Results in, frozen summaries out: cells, curves, crossovers. No torch."""
