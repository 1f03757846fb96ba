from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from loratune.errors import ModelError
from loratune.models.describe import describe_model
from loratune.models.load import load_base, load_tokenizer
from loratune.models.targets import target_modules
from tiny_models import BOS_ID, EOS_ID, MAX_POSITIONS, PAD_ID, UNKNOWN_ID, VOCAB_SIZE, tiny_model
from tiny_models import tiny_tokenizer as folder_tokenizer

TOKENS = torch.arange(4, 44)[None]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@dataclass(frozen=True)
class Header:
    """What the tests vary in the file's metadata."""

    pre: str | None = "smollm"
    dtype: type = np.float32
    rope_scaling: str | None = None
    rope_factors: bool = False
    tokenizer: bool = True


def _interleaved(weight: np.ndarray, *, num_heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring pairs, transformers the two halves of a head."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def _write(path: Path, model: PreTrainedModel, header: Header) -> Path:
    """A Llama as llama.cpp's converter writes it, by the gguf library."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(MAX_POSITIONS)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if header.rope_scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(header.rope_scaling))
    if header.rope_factors:
        writer.add_tensor("rope_freqs.weight", np.ones(4, dtype=np.float32))
    if header.tokenizer:
        _write_tokenizer(writer, header.pre)
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        if name.startswith("model.layers."):
            block, _, layer = (
                name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
            )
            if layer == "self_attn.q_proj":
                weight = _interleaved(weight, num_heads=config.num_attention_heads)
            elif layer == "self_attn.k_proj":
                weight = _interleaved(weight, num_heads=config.num_key_value_heads)
            written = f"blk.{block}.{NAMES[layer]}.weight"
        else:
            written = {
                "model.embed_tokens.weight": "token_embd.weight",
                "model.norm.weight": "output_norm.weight",
                "lm_head.weight": "output.weight",
            }[name]
        # Norms stay float32, as in llama.cpp.
        dtype = np.float32 if weight.ndim == 1 else header.dtype
        writer.add_tensor(written, np.ascontiguousarray(weight, dtype=dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_tokenizer(writer: gguf.GGUFWriter, pre: str | None) -> None:
    vocabulary = folder_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    merged = ["12", "ab"]
    padding = [f"<unused{n}>" for n in range(VOCAB_SIZE - len(tokens) - len(merged))]
    control, normal, unused = (
        gguf.TokenType.CONTROL,
        gguf.TokenType.NORMAL,
        gguf.TokenType.UNUSED,
    )
    types = [control] * 4 + [normal] * (len(tokens) - 4 + len(merged)) + [unused] * len(padding)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens + merged + padding)
    writer.add_token_types(types)
    writer.add_token_merges(["1 2", "a b"])
    writer.add_bos_token_id(BOS_ID)
    writer.add_eos_token_id(EOS_ID)
    writer.add_unk_token_id(UNKNOWN_ID)
    writer.add_pad_token_id(PAD_ID)
    writer.add_add_bos_token(False)


@pytest.mark.parametrize("family", ["llama", "smollm"])
def test_a_gguf_llama_has_the_logits_of_the_original(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    if family == "smollm":  # tied: the file has no output.weight
        model.lm_head = torch.nn.Identity()
    path = _write(tmp_path / "tiny.gguf", model, Header())

    base = load_base(str(path), precision="float32", device="cpu")
    expected = tiny_model(family)(TOKENS).logits
    # The file keeps the norm's epsilon as a float32, so the last bits may differ.
    torch.testing.assert_close(base.model(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    assert base.model.config.tie_word_embeddings == (family == "smollm")
    assert len(target_modules(base.model, ["all-linear"])) == 14
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_a_float16_gguf_loads_in_the_precision_asked_for(tmp_path: Path) -> None:
    path = _write(tmp_path / "tiny.gguf", tiny_model("llama"), Header(dtype=np.float16))

    base = load_base(str(path), precision="bfloat16", device="cpu")
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}
    written = tiny_model("llama").model.layers[1].self_attn.q_proj.weight
    read = base.model.model.layers[1].self_attn.q_proj.weight
    assert torch.equal(read, written.half().bfloat16())


def test_gguf_facts_are_those_of_the_loaded_model(tmp_path: Path) -> None:
    path = _write(tmp_path / "tiny.gguf", tiny_model("llama"), Header())
    facts = describe_model(str(path))
    base = load_base(str(path), precision="float32", device="cpu")
    assert facts.fingerprint == base.fingerprint
    assert facts.num_parameters == base.model.num_parameters()
    assert (facts.num_layers, facts.attention_width, facts.vocab_size) == (2, 32, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["ab", "1", "2"]),  # digits are cut apart, which transformers drops
        ("gpt-2", ["ab", "12"]),
        ("qwen2", ["ab", "1", "2"]),
        ("llama-bpe", ["ab", "12"]),
    ],
)
def test_text_is_cut_as_the_pre_tokenizer_says(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    path = _write(tmp_path / "tiny.gguf", tiny_model("llama"), Header(pre=pre))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.tokenize("ab12") == pieces
    text = "Tom, 12 ab;\n\tx"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert BOS_ID not in ids
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS_ID, PAD_ID)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "of-tomorrow"}, "names the pre-tokenizer 'of-tomorrow', which is not known here"),
        ({"pre": None}, "names the pre-tokenizer None"),
        ({"tokenizer": False}, "has no tokenizer in its metadata"),
        ({"rope_scaling": "linear"}, "scales its RoPE, which transformers does not read"),
        ({"rope_factors": True}, "scales its RoPE, which transformers does not read"),
    ],
)
def test_what_transformers_would_read_wrongly_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    header = replace(Header(), **change)  # pyright: ignore[reportArgumentType]
    path = _write(tmp_path / "tiny.gguf", tiny_model("llama"), header)
    with pytest.raises(ModelError, match=message):
        load_base(str(path), precision="float32", device="cpu")
    with pytest.raises(ModelError, match=message):
        describe_model(str(path))


def test_a_truncated_gguf_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "tiny.gguf", tiny_model("llama"), Header())
    content = path.read_bytes()
    path.write_bytes(content[:100])
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        load_base(str(path), precision="float32", device="cpu")
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError):
        load_base(str(path), precision="float32", device="cpu")
