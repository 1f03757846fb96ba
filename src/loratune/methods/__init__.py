"""The tensor part of each LoRA variant, one file a method."""

from loratune.methods.attach_files import LoadedAdapter, attach_files
from loratune.methods.registry import load_method

__all__ = ["LoadedAdapter", "attach_files", "load_method"]
