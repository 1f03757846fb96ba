from pathlib import Path

import pytest
from torch import nn

from loratune.errors import ModelError
from loratune.models.describe import describe_model
from loratune.models.load import load_base
from tiny_models import FAMILIES, save_tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_the_facts_are_those_of_the_loaded_model(tmp_path: Path, family: str) -> None:
    source = str(save_tiny(tmp_path, family, num_layers=3))
    facts = describe_model(source)
    base = load_base(source, precision="float32", device="cpu")

    linears = {
        name: module
        for name, module in base.model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    assert facts.fingerprint == base.fingerprint
    assert facts.num_parameters == base.model.num_parameters()
    assert facts.num_block_parameters == sum(one.weight.numel() for one in linears.values())
    assert sum(linear.count for linear in facts.linears) == len(linears)
    for linear in facts.linears:
        same = [
            one
            for name, one in linears.items()
            if name.endswith(f".{linear.name}")
            and (one.in_features, one.out_features) == (linear.in_features, linear.out_features)
        ]
        assert len(same) == linear.count
    out = next(one for name, one in linears.items() if name.endswith("o_proj"))
    assert facts.attention_width == out.in_features
    assert (facts.num_layers, facts.hidden_size) == (3, 32)
    assert (facts.intermediate_size, facts.vocab_size) == (48, 128)
    assert facts.source == source
    assert not facts.provisional


@pytest.mark.parametrize(
    ("family", "window", "num_sliding_layers"),
    [("gemma3", 8, 2), ("mistral", 16, 3), ("llama", None, 0), ("qwen2", None, 0)],
)
def test_the_layers_that_slide_are_counted(
    tmp_path: Path, family: str, window: int | None, num_sliding_layers: int
) -> None:
    facts = describe_model(str(save_tiny(tmp_path, family, num_layers=3)))
    assert (facts.sliding_window, facts.num_sliding_layers) == (window, num_sliding_layers)


def test_facts_need_no_readable_weights(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    intact = describe_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"no tensors at all")
    broken = describe_model(str(tmp_path))
    assert broken.fingerprint != intact.fingerprint
    assert broken.linears == intact.linears


def test_a_configuration_that_makes_no_model_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"hidden_act": "silu"', '"hidden_act": "no"'))
    with pytest.raises(ModelError, match="cannot build it from its configuration"):
        describe_model(str(tmp_path))
