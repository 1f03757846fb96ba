"""The tensor part of each LoRA variant, one file a method."""

from loratune.methods.registry import load_method

__all__ = ["load_method"]
