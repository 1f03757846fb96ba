"""Tiny random models of every family that loratune supports, made on the spot. For tests only.

Hidden size 32, 4 heads of width 8 over 2 key-value heads, vocabulary 128. Weights are drawn wider
than transformers does and norms and biases are moved off 1 and 0, so that logits differ between
tokens and a norm or bias that gets lost on the way changes a number.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
PAD_ID, BOS_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2, 3
VOCAB_SIZE = 128
MAX_POSITIONS = 512


def _common(num_layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": 0.18,  # about 1/sqrt(hidden size)
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    }


def _llama(num_layers: int) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_common(num_layers), tie_word_embeddings=False))


def _smollm(num_layers: int) -> PreTrainedModel:
    # SmolLM and SmolLM2 are Llama models with tied embeddings.
    return LlamaForCausalLM(
        LlamaConfig(**_common(num_layers), tie_word_embeddings=True, rms_norm_eps=1e-5)
    )


def _qwen2(num_layers: int) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**_common(num_layers), tie_word_embeddings=True))


def _qwen3(num_layers: int) -> PreTrainedModel:
    # As in Qwen3-0.6B, heads x head_dim is not the hidden size.
    return Qwen3ForCausalLM(Qwen3Config(**_common(num_layers), head_dim=16))


def _gemma3(num_layers: int) -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **_common(num_layers),
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=8,
            layer_types=[kinds[layer % 2] for layer in range(num_layers)],
        )
    )


def _mistral(num_layers: int) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**_common(num_layers), sliding_window=16))


def _phi3(num_layers: int) -> PreTrainedModel:
    return Phi3ForCausalLM(
        Phi3Config(
            **_common(num_layers),
            original_max_position_embeddings=MAX_POSITIONS,
            sliding_window=None,
        )
    )


def _olmo2(num_layers: int) -> PreTrainedModel:
    return Olmo2ForCausalLM(Olmo2Config(**_common(num_layers)))


_BUILDERS: dict[str, Callable[[int], PreTrainedModel]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "mistral": _mistral,
    "phi3": _phi3,
    "smollm": _smollm,
    "olmo2": _olmo2,
}
FAMILIES = tuple(_BUILDERS)


def tiny_model(family: str, *, seed: int = 0, num_layers: int = 2) -> PreTrainedModel:
    """A random model of one of FAMILIES: float32, eval mode, equal bits for equal seeds.

    Parameters still require gradients; torch's global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _BUILDERS[family](num_layers)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_tokenizer(*, add_bos: bool = True) -> PreTrainedTokenizerFast:
    """One token for each printable ASCII character, newline and tab: 101 tokens, exact round trip.

    A BOS stands in front where `add_bos` (Llama adds one, Qwen does not); an EOS never.
    """
    # The byte-level alphabet's newline, tab and space, then ASCII as it is: a byte-level
    # tokenizer is what transformers assumes for most of these families when it reads the folder.
    characters = [
        "\N{LATIN CAPITAL LETTER C WITH DOT ABOVE}",
        "\N{LATIN SMALL LETTER C WITH CIRCUMFLEX}",
        "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}",
        *map(chr, range(33, 127)),
    ]
    vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS, UNKNOWN, *characters])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def save_tiny(
    folder: Path, family: str, *, seed: int = 0, num_layers: int = 2, add_bos: bool = True
) -> Path:
    """Write a complete Hugging Face folder (config, safetensors, tokenizer) and return it."""
    tiny_model(family, seed=seed, num_layers=num_layers).save_pretrained(folder)
    tiny_tokenizer(add_bos=add_bos).save_pretrained(folder)
    return folder
