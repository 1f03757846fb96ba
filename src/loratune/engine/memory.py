"""Giving memory back to a device."""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false

import gc

import torch


def release_memory(device: torch.device) -> None:
    """Drop what is no longer referred to, and give cached blocks back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
