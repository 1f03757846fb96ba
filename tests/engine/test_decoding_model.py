"""The decoding model: what it refuses, and steps that are filled up to fixed sizes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from loratune.engine import decoding_model
from loratune.engine.decoding import Decoder, Request
from loratune.engine.decoding_choice import Sampling
from loratune.engine.decoding_model import DecodingModel, cache_bytes_per_token
from loratune.errors import ModelError
from tiny_adapters import mixed_adapters
from tiny_models import VOCAB_SIZE, tiny_model
from tiny_trials import tiny_base


class Recorded:
    """As `engine.replay.Replay`, but it runs the body again instead of replaying it.

    What holds of a captured graph holds of it: the body is given once, with all that it has closed
    over, and afterwards only the numbers in its buffers change.
    """

    made = 0

    def __init__(
        self, body: Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]], example: Any, **_: Any
    ) -> None:
        Recorded.made += 1
        self._body = body
        self._buffers = [one.clone() for one in example]
        for _ in range(3):  # type: ignore
            body(self._buffers)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        for buffer, one in zip(self._buffers, inputs, strict=True):
            assert buffer.shape == one.shape
            buffer.copy_(one)
        return self._body(self._buffers)[1].clone()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_steps_filled_up_to_a_few_sizes_give_the_same_tokens(
    family: str, monkeypatch: pytest.MonkeyPatch
):
    base = tiny_base(family)
    adapters = mixed_adapters(base.model)
    requests = [
        Request(
            list(adapters)[at % 9],
            [4 + (at * one) % 97 for one in range(1, 2 + at % 15)],
            max_new_tokens=1 + at % 9,
            sampling=Sampling(temperature=1.5, seed=at) if at % 4 == 0 else None,
        )
        for at in range(50)
    ]

    def tokens() -> list[tuple[int, ...]]:
        decoder = Decoder(base, adapters, num_slots=20, num_seats=4, tokens_per_prefill=320)
        found = {one.index: one.token_ids for one in decoder.answers(requests)}
        return [found[index] for index in range(len(requests))]

    wanted = tokens()
    init = DecodingModel.__init__

    def fixed(model: DecodingModel, *arguments: Any) -> None:
        init(model, *arguments)
        model._is_fixed = True

    monkeypatch.setattr(DecodingModel, "__init__", fixed)
    monkeypatch.setattr(decoding_model, "Replay", Recorded)
    Recorded.made = 0
    assert tokens() == wanted
    # Steps of 20, 10 rows and prompts of 320, 80, 20 tokens, each with and without samples.
    assert 3 <= Recorded.made <= 10


def small(config: type, **more: Any) -> Any:
    return config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.18,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )


STRANGERS: dict[str, Callable[[], Any]] = {
    "Gemma2": lambda: Gemma2ForCausalLM(
        small(Gemma2Config, head_dim=8, query_pre_attn_scalar=8, sliding_window=8)
    ),
    "Granite": lambda: GraniteForCausalLM(small(GraniteConfig, logits_scaling=8.0)),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_family_that_computes_something_else_is_refused_and_its_base_left_alone(name: str):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = STRANGERS[name]().eval().requires_grad_(False)
    base = replace(tiny_base(), model=model)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ModelError, match=rf"{name}ForCausalLM .*--engine reference"):
        list(Decoder(base, {"plain": None}).answers([Request("plain", [5, 6], 3)]))
    assert [type(module) for module in model.modules()] == before


def test_the_cache_of_a_token_is_counted_from_the_layers_themselves():
    # 2 layers, 2 key heads of width 8 (qwen3: 16), keys and values, 4 bytes a number.
    assert cache_bytes_per_token(tiny_model("llama")) == 2 * 2 * 2 * 8 * 4
    assert cache_bytes_per_token(tiny_model("qwen3")) == 2 * 2 * 2 * 16 * 4
