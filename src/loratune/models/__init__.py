"""Base models and tokenizers: loading, fingerprints, target layers, the demo models."""
