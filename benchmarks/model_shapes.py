"""The model shapes that are timed. No torch."""

from dataclasses import dataclass

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
