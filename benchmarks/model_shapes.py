"""The model shapes that are timed, and a model of each with random weights, made on the device.

Speed depends on shapes and not on what weights say, so nothing is downloaded. What is left out of
the real models (Llama 3's scaling of the rotary frequencies, say) does not change the arithmetic.
"""

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from loratune.models.load import Base
from loratune.planning.shapes import declared_model_facts
from loratune.records import ModelFacts
from loratune.study.schema import DeclaredModel

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder's sizes, and how it is timed unless the command line says otherwise.

    `row_tokens` is the length of an equal-length row, `tokens_per_step` what a packed engine puts
    through the model at once. `batch_sizes` are those that one adapter at a time is timed at.
    """

    name: str
    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied: bool
    tokens_per_step: int
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64)
    row_tokens: int = 256

    @property
    def facts(self) -> ModelFacts:
        """What `planning.cost` needs of it."""
        declared = DeclaredModel(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            tied_embeddings=self.tied,
        )
        return declared_model_facts(self.name, declared)


# tokens_per_step: assumptions for 80 GB, not measured; --tokens-per-step changes them.
SHAPES = {
    shape.name: shape
    for shape in (
        # SmolLM2-135M
        Shape("135m", "llama", 576, 30, 9, 3, 64, 1536, 49152, tied=True, tokens_per_step=32768),
        # Qwen3-0.6B
        Shape(
            "0.6b", "qwen3", 1024, 28, 16, 8, 128, 3072, 151936, tied=True, tokens_per_step=16384
        ),
        # Llama-3.2-1B
        Shape("1b", "llama", 2048, 16, 32, 8, 64, 8192, 128256, tied=True, tokens_per_step=16384),
        # Llama-2-7B
        Shape(
            "7b",
            "llama",
            4096,
            32,
            32,
            32,
            128,
            11008,
            32000,
            tied=False,
            tokens_per_step=8192,
            batch_sizes=(1, 4, 16),
        ),
        # For tests on a CPU.
        Shape(
            "tiny",
            "llama",
            32,
            2,
            4,
            2,
            8,
            48,
            128,
            tied=True,
            tokens_per_step=64,
            batch_sizes=(1, 4),
            row_tokens=16,
        ),
    )
}


def random_base(shape: Shape, *, device: torch.device, seed: int = 0) -> Base:
    """A frozen bfloat16 model of `shape` with normal weights; nothing passes through the host.

    On a CPU, which is for tests, it is float32: small bfloat16 products are very slow there.
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
    model.eval()
    model.config.use_cache = False
    return Base(
        model=model,
        tokenizer=_tokenizer(),
        source=f"random:{shape.name}",
        fingerprint=f"random:{shape.name}",
        device=device,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """Only its special tokens are asked for: rows are random token ids."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
