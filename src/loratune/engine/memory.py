"""Moving memory to a device, giving it back, and knowing when there is none left."""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false

import gc

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device; on CUDA from pinned memory, or it waits for all that runs."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


# What CUDA's libraries, captured graphs and Triton's launches say where torch's own allocator would
# raise OutOfMemoryError.
_SAID = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def out_of_memory_reason(error: BaseException) -> str | None:
    """The first line of an error that says that a device's memory is used up; None of any other."""
    said = str(error)
    is_it = isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in said for words in _SAID)
    )
    return said.partition("\n")[0] if is_it else None


def release_memory(device: torch.device) -> None:
    """Drop what is no longer referred to, and give cached blocks back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
