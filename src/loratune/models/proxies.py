"""Which smaller model stands for a larger one: the smallest of its family with its tokenizer.

A table of names, from the families' model cards; whether two tokenizers are the same is checked
on the rows themselves before anything is trained.
"""

import re

# A pattern of the target's name, and the proxy; {0} is the variant's suffix, as -Instruct.
_FAMILIES = (
    (r"demo:(?:4m|12m|28m)", "demo:1m"),
    (r"HuggingFaceTB/SmolLM2-(?:360M|1\.7B)(-Instruct)?", "HuggingFaceTB/SmolLM2-135M{0}"),
    (r"meta-llama/Llama-3\.1-(?:8B|70B)(-Instruct)?", "meta-llama/Llama-3.2-1B{0}"),
    (r"meta-llama/Llama-3\.2-3B(-Instruct)?", "meta-llama/Llama-3.2-1B{0}"),
    (r"meta-llama/Llama-2-(?:13b|70b)(-hf|-chat-hf)", "meta-llama/Llama-2-7b{0}"),
    (r"Qwen/Qwen3-(?:1\.7B|4B|8B|14B|32B)(-Base)?", "Qwen/Qwen3-0.6B{0}"),
    (r"Qwen/Qwen2\.5-(?:1\.5B|3B|7B|14B|32B|72B)(-Instruct)?", "Qwen/Qwen2.5-0.5B{0}"),
    (r"google/gemma-3-(?:1b|4b|12b|27b)-pt", "google/gemma-3-270m"),
    (r"google/gemma-3-(?:1b|4b|12b|27b)-it", "google/gemma-3-270m-it"),
)


def propose_proxy(model: str) -> str | None:
    """A smaller model of the same family by name; None where none is known."""
    for pattern, proxy in _FAMILIES:
        found = re.fullmatch(pattern, model)
        if found is not None:
            return proxy.format(*((found.groups() and found.groups()[0]) or "",))
    return None
