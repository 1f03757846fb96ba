"""Rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732): LoRA at scale alpha/sqrt(r)."""

from loratune.methods.lora import start_lora
from loratune.methods.lora_method import LoraMethod

METHOD = LoraMethod(start_lora, use_rslora=True)
