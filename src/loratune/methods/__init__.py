"""The tensor part of each LoRA variant, one file a method."""
