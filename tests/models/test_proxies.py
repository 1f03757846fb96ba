"""Which smaller model stands for a larger one."""

import pytest

from loratune.models.proxies import propose_proxy


@pytest.mark.parametrize(
    ("model", "proxy"),
    [
        ("demo:28m", "demo:1m"),
        ("demo:1m", None),
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"),
        ("meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.2-1B"),
        ("meta-llama/Llama-2-13b-hf", "meta-llama/Llama-2-7b-hf"),
        ("meta-llama/Llama-3.2-1B", None),
        ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-0.6B-Base"),
        ("Qwen/Qwen3-0.6B", None),
        ("google/gemma-3-4b-it", "google/gemma-3-270m-it"),
        ("HuggingFaceTB/SmolLM2-1.7B", "HuggingFaceTB/SmolLM2-135M"),
        ("somebody/Llama-3.1-8B-merged", None),
        ("./my-model", None),
    ],
)
def test_the_smallest_of_the_family_is_proposed_and_nothing_where_none_is_known(model, proxy):
    assert propose_proxy(model) == proxy
