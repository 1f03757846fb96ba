"""Model and data facts from what a study declares, for planning where the real ones are away."""

from loratune.records import DataFacts, LinearShape, ModelFacts
from loratune.study.identity import content_id
from loratune.study.schema import Data, DeclaredData, DeclaredModel


def declared_model_facts(source: str, declared: DeclaredModel) -> ModelFacts:
    """Facts of a gated-MLP decoder (Llama, Qwen, Gemma 3, Mistral) of the declared shape."""
    hidden, inner = declared.hidden_size, declared.intermediate_size
    queries = declared.num_attention_heads * declared.head_dim
    keys = declared.num_key_value_heads * declared.head_dim
    sides = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
    linears = tuple(
        LinearShape(name=name, in_features=i, out_features=o, count=declared.num_layers)
        for name, (i, o) in sides.items()
    )
    block = sum(one.in_features * one.out_features * one.count for one in linears)
    embeddings = declared.vocab_size * hidden * (1 if declared.tied_embeddings else 2)
    return ModelFacts(
        source=source,
        fingerprint=content_id("declared", [source, declared.model_dump()]),
        num_parameters=block + embeddings,
        num_block_parameters=block,
        num_layers=declared.num_layers,
        hidden_size=hidden,
        intermediate_size=inner,
        attention_width=queries,
        vocab_size=declared.vocab_size,
        linears=linears,
        sliding_window=declared.sliding_window,
        num_sliding_layers=declared.num_sliding_layers,
        provisional=True,
    )


def declared_data_facts(data: Data, declared: DeclaredData, *, rows: int | None) -> DataFacts:
    """Facts of `rows` rows of equal length, the declared means; the hold-out is taken off first."""
    held_out = data.validation.rows if data.validation is not None else None
    remain = declared.rows - (held_out or 0)
    num_rows = remain if rows is None else min(rows, remain)
    return DataFacts(
        fingerprint=content_id("declared", [data.model_dump(), declared.model_dump(), rows]),
        num_train_rows=num_rows,
        num_validation_rows=held_out or 0,
        num_tokens=round(num_rows * declared.mean_tokens),
        sum_squared_tokens=round(num_rows * declared.mean_tokens**2),
        num_target_tokens=round(num_rows * declared.mean_target_tokens),
        max_row_tokens=data.max_tokens,
        provisional=True,
    )
