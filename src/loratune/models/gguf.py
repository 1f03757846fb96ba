"""GGUF files through transformers, with what its reader leaves out put right or refused.

transformers rebuilds the tokenizer from the file's vocabulary and merges. The rule that cuts text
before the merges stands in the file as a name only (`tokenizer.ggml.pre`), and for some names
transformers cuts like GPT-2 although the model was trained otherwise: digits would then be merged.
The names and their rules are those of llama.cpp (src/llama-vocab.cpp, llm_tokenizer_bpe).

Opening a file is slow where its vocabulary is large (tens of seconds for Gemma's 262,144 tokens):
transformers parses all of it twice. A folder saved once with save_pretrained opens in seconds.

RoPE scaling is refused where the file asks for it, since transformers drops it without a word.
"""

# read_gguf_metadata returns a bare dict.
# pyright: reportUnknownVariableType=false

import struct
from pathlib import Path
from typing import cast

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.integrations.gguf.reader import read_gguf_metadata

from loratune.errors import ModelError

# Every digit is cut off alone, then GPT-2's rule.
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
# GPT-2's rule, which is what transformers takes for a byte-level name it does not know.
_LIKE_GPT2 = ("gpt-2", "mpt", "olmo", "jais", "phi-2", "trillion")
_SCALING_TENSORS = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)


def check_gguf(path: Path, *, source: str) -> str | None:
    """The name of the file's pre-tokenizer, None where its vocabulary is not byte-level.

    Reads the header only.

    Raises:
        ModelError: the file cannot be parsed, scales its RoPE, has no tokenizer, or cuts text by a
            rule that is not known here.
    """
    try:
        # transformers' own quick reader: gguf.GGUFReader takes seconds over a large vocabulary
        header = cast("tuple[dict[str, object], tuple[str, ...]]", read_gguf_metadata(str(path)))
    except (ValueError, IndexError, KeyError, OSError, struct.error) as error:
        raise ModelError(f"model {source} cannot be read as GGUF: {error}") from error
    metadata, tensors = header
    architecture = metadata["general.architecture"]
    scaling = metadata.get(f"{architecture}.rope.scaling.type")
    if scaling not in (None, "none") or not set(tensors).isdisjoint(_SCALING_TENSORS):
        raise ModelError(
            f"model {source} scales its RoPE, which transformers does not read from GGUF; "
            "its numbers would be wrong: use the Hugging Face folder of this model"
        )
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        raise ModelError(
            f"model {source} has no tokenizer in its metadata; "
            "convert it again with its vocabulary, or use the Hugging Face folder"
        )
    if kind != "gpt2":
        return None
    name = metadata.get("tokenizer.ggml.pre")
    if name not in (*GGUF_PRE_TOKENIZER_SPLITS, *_SINGLE_DIGITS, *_LIKE_GPT2):
        raise ModelError(
            f"model {source} names the pre-tokenizer {name!r}, which is not known here; "
            "its text would be cut wrongly: use the Hugging Face folder of this model"
        )
    return str(name)


def repair_tokenizer(tokenizer: PreTrainedTokenizerBase, *, pre_tokenizer: str | None) -> None:
    """Cut text as the file's pre-tokenizer does where transformers does not, in place."""
    if pre_tokenizer in _SINGLE_DIGITS:
        backend = cast("PreTrainedTokenizerFast", tokenizer).backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
