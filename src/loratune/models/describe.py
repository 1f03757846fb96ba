"""What planning needs of a base model, from its configuration: no weight is loaded.

The model is built on torch's meta device, where parameters have shapes but no storage, and its
layers are counted. So the counts are those of the model that is trained, whatever its family. The
fingerprint does read the weight files once, as bytes.
"""

# transformers' Auto classes and configurations are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections import Counter
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from loratune.errors import ModelError
from loratune.models.fingerprint import fingerprint
from loratune.models.gguf import check_gguf
from loratune.models.load import read_config
from loratune.models.sources import locate
from loratune.models.targets import block_linears
from loratune.planning.targets import own_name
from loratune.records import LinearShape, ModelFacts


def describe_model(
    source: str, *, trust_remote_code: bool = False, download: bool = True
) -> ModelFacts:
    """The facts of a base model (of a multimodal one, of its text model).

    Linear layers are grouped by own name and shape, in model order, the output head excluded.

    Args:
        source: hub id, local folder, file.gguf, or demo:4m.
        trust_remote_code: run the repository's own Python code; only for sources that you trust.
        download: whether a hub model that is not in the cache is fetched (weights included, for
            the fingerprint), or refused.

    Raises:
        ModelError: the source is missing, incomplete or unsafe, or is no decoder that transformers
            has.
    """
    location = locate(source, download=download)
    if location.kind == "gguf":
        check_gguf(location.path, source=source)
    config = read_config(location, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):
            model = cast(
                "PreTrainedModel",
                AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code),
            )
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"model {source}: transformers cannot build it from its configuration: {first}"
        ) from error
    shapes = Counter(
        (own_name(name), linear.in_features, linear.out_features)
        for name, linear in block_linears(model).items()
    )
    window, num_sliding_layers = _sliding_window(config)
    # Read by name: which of these a configuration has is the family's affair.
    shape: dict[str, Any] = config.to_dict()
    num_heads: int = shape["num_attention_heads"]
    head_dim: int = shape.get("head_dim") or shape["hidden_size"] // num_heads
    return ModelFacts(
        source=source,
        fingerprint=fingerprint(location),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_block_parameters=sum(i * o * count for (_, i, o), count in shapes.items()),
        num_layers=shape["num_hidden_layers"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        attention_width=num_heads * head_dim,
        vocab_size=shape["vocab_size"],
        linears=tuple(
            LinearShape(name=name, in_features=i, out_features=o, count=count)
            for (name, i, o), count in shapes.items()
        ),
        sliding_window=window,
        num_sliding_layers=num_sliding_layers,
        model_type=config.model_type,
    )


def _sliding_window(config: PreTrainedConfig) -> tuple[int | None, int]:
    """The window, and how many layers slide; (None, 0) where none does.

    Families that mix kinds list them in layer_types; Mistral and Phi-3 have a window for all layers
    or none at all.
    """
    window = cast("int | None", getattr(config, "sliding_window", None))
    kinds = cast("list[str] | None", getattr(config, "layer_types", None))
    if window is None:
        return None, 0
    if kinds is None:
        return window, cast("int", config.num_hidden_layers)
    sliding = kinds.count("sliding_attention")
    return (window, sliding) if sliding else (None, 0)
