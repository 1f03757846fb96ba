"""Moving memory to a device, and giving it back."""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false

import gc

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device. On CUDA from pinned memory: otherwise it waits for all that runs."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def release_memory(device: torch.device) -> None:
    """Drop what is no longer referred to, and give cached blocks back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
