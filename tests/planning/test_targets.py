import pytest

from loratune.errors import ModelError
from loratune.planning.targets import check_rank, matched_linears
from loratune.records import LinearShape, ModelFacts

Q = LinearShape(name="q_proj", in_features=32, out_features=32, count=3)
K = LinearShape(name="k_proj", in_features=32, out_features=8, count=3)
UP = LinearShape(name="up_proj", in_features=32, out_features=48, count=2)
WIDE_UP = LinearShape(name="up_proj", in_features=32, out_features=96, count=1)
FACTS = ModelFacts(
    source="a-model",
    fingerprint="declared:1",
    num_parameters=10_000,
    num_block_parameters=9_000,
    num_layers=3,
    hidden_size=32,
    intermediate_size=48,
    attention_width=32,
    vocab_size=100,
    linears=(Q, K, UP, WIDE_UP),
)


def test_all_linear_is_every_shape() -> None:
    assert matched_linears(FACTS, ["all-linear"]) == (Q, K, UP, WIDE_UP)
    assert matched_linears(FACTS, ["all-linear", "q_proj"]) == (Q, K, UP, WIDE_UP)


def test_a_name_with_several_shapes_matches_them_all_once() -> None:
    assert matched_linears(FACTS, ["up_proj", "q_proj", "up_proj"]) == (Q, UP, WIDE_UP)


def test_a_dotted_name_counts_one_layer_where_it_numbers_the_block() -> None:
    assert matched_linears(FACTS, ["self_attn.k_proj"]) == (K,)
    (two,) = matched_linears(FACTS, ["layers.0.self_attn.q_proj", "layers.2.self_attn.q_proj"])
    assert (two.name, two.count) == ("q_proj", 2)
    assert matched_linears(FACTS, ["layers.0.self_attn.q_proj", "q_proj"]) == (Q,)


def test_a_target_that_matches_nothing_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(
        ModelError,
        match=r"'k_porj' .* a-model \(did you mean 'k_proj'\?\); the names there are: "
        r"q_proj, k_proj, up_proj, or all-linear",
    ):
        matched_linears(FACTS, ["q_proj", "k_porj"])
    with pytest.raises(ModelError, match="targets is empty"):
        matched_linears(FACTS, [])


def test_the_rank_is_held_against_the_narrowest_target() -> None:
    check_rank(FACTS, ["q_proj", "up_proj"], rank=32)
    check_rank(FACTS, ["all-linear"], rank=8)
    with pytest.raises(ModelError, match=r"rank=9 does not fit layer 'k_proj' \(32 in, 8 out\)"):
        check_rank(FACTS, ["all-linear"], rank=9)
    with pytest.raises(ModelError, match="rank=0"):
        check_rank(FACTS, ["q_proj"], rank=0)
