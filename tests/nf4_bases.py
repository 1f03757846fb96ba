"""A tiny Llama in nf4 and its twin with the unpacked weights. For tests only.

Wider than the other tiny models: on a CPU bitsandbytes unpacks rows of whole blocks of 64 alone.
"""

import tempfile
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from loratune.engine.packed_linear import unpacked
from loratune.engine.packed_model import group_weights
from loratune.errors import ModelError
from loratune.models import load
from loratune.models.load import Base
from loratune.models.targets import block_linears
from tiny_models import MAX_POSITIONS, VOCAB_SIZE
from tiny_trials import tiny_base


@cache
def _refusal() -> str | None:
    try:
        load.check_precision("tiny", "nf4", device=torch.device("cpu"))
    except ModelError as error:
        return str(error)
    return None


NEEDS_BITSANDBYTES = pytest.mark.skipif(_refusal() is not None, reason=str(_refusal()))


def _llama() -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB_SIZE,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=MAX_POSITIONS,
                initializer_range=0.12,
                tie_word_embeddings=False,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        )


def nf4_base(dtype: torch.dtype = torch.float32, *, device: str = "cpu") -> Base:
    """As `load_base` loads it, except that it also computes in float32."""
    with tempfile.TemporaryDirectory() as folder, load._without_progress_bars():
        _llama().save_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=load._quantisation("nf4", dtype=dtype),
            device_map={"": torch.device(device)},
            dtype=dtype,
            attn_implementation="sdpa",
        )
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = False
    if device == "cpu":
        load.prepare_nf4_on_cpu(model, source="tiny")
    return replace(
        tiny_base(), model=model, device=torch.device(f"{device}:0" if device == "cuda" else device)
    )


def twin_of(base: Base, dtype: torch.dtype) -> Base:
    """The same base with its weights unpacked, then in `dtype`; nothing is shared."""
    quantised: Any = base.model
    model: Any = _llama()
    state = {name: one for name, one in quantised.named_parameters() if one.is_floating_point()}
    for name, linear in block_linears(quantised).items():
        packed, block_size = group_weights([linear], [name])
        assert block_size is not None
        like = torch.empty(1, linear.in_features, dtype=quantised.dtype, device=base.device)
        state[f"{name}.weight"] = unpacked(packed, block_size, [0, linear.out_features], like=like)
    model.load_state_dict(state)
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = False
    model.config._attn_implementation = "sdpa"
    model.to(base.device)
    # Not the rotations' frequencies, which a loaded model keeps in float32.
    for one in model.parameters():
        one.data = one.data.to(dtype)
    return replace(base, model=model)


def bits_of(base: Base) -> dict[str, bytes]:
    """Every parameter's bits, and those of the scales and the codes of packed ones."""
    found = dict[str, Tensor]()
    for name, one in base.model.named_parameters():
        found[name] = one
        state: Any = getattr(one, "quant_state", None)
        if state is not None:
            found |= {f"{name}.scales": state.absmax, f"{name}.code": state.code}
    return {
        name: one.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        for name, one in found.items()
    }
