"""Adapters of random numbers for a random model, in PEFT's format and in memory."""

import torch
from peft import LoraConfig

from loratune.methods.adapter_files import AdapterFiles
from loratune.methods.peft_adapter import files_of, key_of
from loratune.models.load import Base
from loratune.models.targets import block_linears
from model_shapes import TARGETS


def random_adapter(base: Base, *, rank: int, seed: int) -> AdapterFiles:
    """A LoRA on the seven linear layers of every block, of numbers so small that all is finite."""
    generator = torch.Generator().manual_seed(seed)
    tensors = dict[str, torch.Tensor]()
    for name, linear in block_linears(base.model).items():
        for key, shape in (
            ("lora_A.weight", (rank, linear.in_features)),
            ("lora_B.weight", (linear.out_features, rank)),
        ):
            tensors[key_of(name, key)] = 0.01 * torch.randn(shape, generator=generator)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS), bias="none")
    return files_of(config, tensors)
