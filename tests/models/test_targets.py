import pytest
import torch
from torch import nn

from loratune.errors import ModelError
from loratune.models.targets import block_linears, check_rank, target_modules
from tiny_models import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_every_linear_but_the_head(family: str) -> None:
    model = tiny_model(family)
    names = target_modules(model, ["all-linear"])

    every = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert list(names) == [name for name in every if name != "lm_head"]
    per_block = 4 if family == "phi3" else 7
    assert len(names) == 2 * per_block
    weights = dict(model.named_parameters())
    assert all(torch.equal(block_linears(model)[n].weight, weights[f"{n}.weight"]) for n in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_own_names_match_in_every_block_in_model_order(family: str) -> None:
    fused = family == "phi3"
    asked = ["down_proj", "qkv_proj" if fused else "q_proj"]
    first = "qkv_proj" if fused else "q_proj"
    assert target_modules(tiny_model(family), asked) == (
        f"model.layers.0.self_attn.{first}",
        "model.layers.0.mlp.down_proj",
        f"model.layers.1.self_attn.{first}",
        "model.layers.1.mlp.down_proj",
    )


def test_dotted_names_match_whole_parts_from_the_end() -> None:
    model = tiny_model("llama")
    assert target_modules(model, ["mlp.up_proj"]) == (
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
    )
    assert target_modules(model, ["layers.1.mlp.up_proj", "1.mlp.up_proj"]) == (
        "model.layers.1.mlp.up_proj",
    )
    full = "model.layers.0.self_attn.q_proj"
    assert target_modules(model, [full]) == (full,)
    with pytest.raises(ModelError, match="'proj' matches no linear layer"):
        target_modules(model, ["proj"])


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("llama", ["q_proj", "q_porj"], r"'q_porj' .* \(did you mean 'q_proj'\?\)"),
        ("llama", ["all_linear"], r"'all_linear' .* \(did you mean 'all-linear'\?\)"),
        ("llama", ["lm_head"], r"'lm_head' matches no linear layer .* LlamaForCausalLM"),
        ("llama", ["embed_tokens"], r"'embed_tokens' matches no linear layer"),
        (
            "phi3",
            ["q_proj"],
            r"there are: o_proj, qkv_proj, gate_up_proj, down_proj, or all-linear",
        ),
        ("qwen3", ["q_norm"], r"'q_norm' matches no linear layer"),
        ("llama", [], r"targets is empty; choose from q_proj, k_proj"),
    ],
)
def test_a_target_that_matches_nothing_is_refused_with_the_names_there_are(
    family: str, targets: list[str], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        target_modules(tiny_model(family), targets)


def test_a_rank_above_the_smaller_side_is_refused_with_the_layer_and_its_widths() -> None:
    model = tiny_model("llama")
    check_rank(model, ["all-linear"], rank=16)
    check_rank(model, ["q_proj"], rank=32)
    with pytest.raises(
        ModelError,
        match=r"rank=17 does not fit layer 'model\.layers\.0\.self_attn\.k_proj' \(32 in",
    ):
        check_rank(model, ["all-linear"], rank=17)
    with pytest.raises(ModelError, match=r"rank=0 does not fit .* choose a rank from 1 to 32"):
        check_rank(model, ["q_proj"], rank=0)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match="keeps its blocks in no"):
        target_modules(nn.Sequential(nn.Linear(2, 2)), ["all-linear"])
