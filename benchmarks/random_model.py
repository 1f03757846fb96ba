"""A model of a shape with random weights, made on the device: nothing is downloaded.

Speed depends on shapes and not on what weights say. What is left out of the real models (Llama 3's
scaling of the rotary frequencies, say) does not change the arithmetic.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from loratune.models.load import Base
from loratune.models.targets import block_linears
from model_shapes import Shape


def random_base(
    shape: Shape,
    *,
    device: torch.device,
    seed: int = 0,
    precision: Literal["bfloat16", "nf4"] = "bfloat16",
) -> Base:
    """A frozen model of `shape` with normal weights; nothing passes through the host.

    On a CPU, which is for tests, what is not nf4 is float32: small bfloat16 products are very slow
    there. nf4 are the linear layers of the blocks, as `load_base` quantises them.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "attn_implementation": "sdpa",
    }
    with torch.device("meta"):
        model: PreTrainedModel
        if shape.family == "llama":
            model = LlamaForCausalLM(LlamaConfig(**sizes))
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**sizes))
        model.to(dtype)  # pyright: ignore[reportArgumentType]
    model.to_empty(device=device)
    model.tie_weights()
    # The rotary frequencies are buffers that are computed, in float32, when the module is made.
    decoder: Any = model.model
    decoder.rotary_emb = type(decoder.rotary_emb)(model.config).to(device)
    assert all("rotary_emb" in name for name, _ in model.named_buffers())
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02, generator=generator)
    model.requires_grad_(False)
    if precision == "nf4":
        _quantise(model)
    model.eval()
    model.config.use_cache = False
    return Base(
        model=model,
        tokenizer=_tokenizer(shape.vocab_size),
        source=f"random:{shape.name}",
        fingerprint=f"random:{shape.name}",
        device=device,
    )


def _quantise(model: PreTrainedModel) -> None:
    """Block by block in place of what was there, so that both are never there whole."""
    import bitsandbytes  # pyright: ignore[reportMissingImports]

    for name, linear in block_linears(model).items():
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=linear.weight.dtype,
            compress_statistics=False,
            quant_type="nf4",
            device="meta",
        )
        layer.weight = bitsandbytes.nn.Params4bit(
            linear.weight.data, requires_grad=False, compress_statistics=False, quant_type="nf4"
        ).to(linear.weight.device)
        model.set_submodule(name, layer)
    # What transformers sets, and PEFT asks.
    model.is_loaded_in_4bit = True


def save_random_model(shape: Shape, folder: Path) -> None:
    """A model of `shape` as a folder that `loratune run` loads; its words are w4, w5, ..."""
    base = random_base(shape, device=torch.device("cpu"))
    base.model.to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Token w<i> is a word of its own; rows of token ids ask for the special tokens alone."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    words |= {f"w{index}": index for index in range(4, vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
