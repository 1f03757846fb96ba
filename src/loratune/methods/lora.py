"""LoRA (Hu et al. 2022, arXiv 2106.09685): W x + scale B A x, A Kaiming-uniform, B zero."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from loratune.methods.base import LayerTensors
from loratune.methods.lora_method import LoraMethod
from loratune.methods.peft_adapter import generator, linear_layers
from loratune.records import Trial


def start_lora(
    model: PreTrainedModel, trial: Trial, targets: Sequence[str]
) -> dict[str, LayerTensors]:
    """A Kaiming-uniform (a = sqrt(5), as PEFT: bound 1/sqrt(in_features)), B zero.

    Raises:
        ModelError: a target is not a linear layer of the model.
    """
    started = dict[str, LayerTensors]()
    for name, layer in linear_layers(model, targets).items():
        a_RD = torch.empty(trial.rank, layer.in_features, dtype=torch.float32, device="cpu")
        nn.init.kaiming_uniform_(a_RD, a=math.sqrt(5), generator=generator(trial.seed, name))
        b_ER = torch.zeros(layer.out_features, trial.rank, dtype=torch.float32, device="cpu")
        started[name] = LayerTensors(a_RD=a_RD, b_ER=b_ER)
    return started


METHOD = LoraMethod(start_lora)
