import pytest

from loratune.analyse.laws.sizes import parameters_of_name


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("demo:1m", 1e6),
        ("demo:28m", 28e6),
        ("HuggingFaceTB/SmolLM2-135M", 135e6),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", 135e6),
        ("meta-llama/Llama-3.2-1B", 1e9),
        ("meta-llama/Llama-2-7b-hf", 7e9),
        ("Qwen/Qwen3-0.6B-Base", 0.6e9),
        ("some/Llama-2-7B-4bit", 7e9),
        ("/models/7b/my-model", None),
        ("my-model", None),
        ("merge-7b-13b", None),
    ],
)
def test_a_size_is_read_from_a_name_that_states_one(name, size):
    assert parameters_of_name(name) == size
