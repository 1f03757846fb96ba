import json
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
)

from loratune.errors import ModelError
from loratune.models import load
from loratune.models.load import (
    Precision,
    check_precision,
    default_precision,
    load_base,
    load_tokenizer,
    set_gradient_checkpointing,
)
from loratune.models.targets import target_modules
from nf4_bases import NEEDS_BITSANDBYTES, bits_of
from tiny_models import (
    EOS,
    FAMILIES,
    VOCAB_SIZE,
    save_tiny,
    tiny_model,
    tiny_tokenizer,
)

TOKENS = torch.arange(4, 44)[None]

# PEFT 0.21 asks a model for a property that transformers has renamed.
renamed_in_transformers = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_loads_with_the_logits_that_were_saved(tmp_path: Path, family: str) -> None:
    base = load_base(str(save_tiny(tmp_path, family)), precision="float32", device="cpu")

    expected = tiny_model(family)(TOKENS).logits
    assert torch.equal(base.model(TOKENS).logits, expected)
    assert base.model.config._attn_implementation == "sdpa"
    assert base.model.config.use_cache is False
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.source == str(tmp_path)
    assert base.device == torch.device("cpu")
    text = "Tom has 12 apples;\n he eats 5."
    assert base.tokenizer.decode(base.tokenizer(text).input_ids[1:]) == text


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_loads_in_half_precision(
    tmp_path: Path, family: str, precision: Precision
) -> None:
    base = load_base(str(save_tiny(tmp_path, family)), precision=precision, device="cpu")

    dtype = getattr(torch, precision)
    assert {parameter.dtype for parameter in base.model.parameters()} == {dtype}
    # Parameters alone: the rotary frequencies, a buffer, stay float32 in transformers.
    expected = tiny_model(family)
    for parameter in expected.parameters():
        parameter.data = parameter.data.to(dtype)
    assert torch.equal(base.model(TOKENS).logits, expected(TOKENS).logits)


def test_sharded_weights_load_like_one_file(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1

    base = load_base(str(tmp_path), precision="float32", device="cpu")
    assert torch.equal(base.model(TOKENS).logits, tiny_model("llama")(TOKENS).logits)


def _adapter_gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Gradients of a LoRA adapter with a B that is not zero, dropout included."""
    config = LoraConfig(
        r=4, lora_dropout=0.1, target_modules=list(target_modules(model, ["all-linear"]))
    )
    torch.manual_seed(1)
    adapted = get_peft_model(model, config).train()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted(TOKENS, labels=TOKENS).loss.backward()
    return {
        name: parameter.grad
        for name, parameter in adapted.named_parameters()
        if parameter.grad is not None
    }


@renamed_in_transformers
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path, family: str) -> None:
    source = str(save_tiny(tmp_path, family))
    plain = load_base(source, precision="float32", device="cpu")
    saving = load_base(source, precision="float32", device="cpu", gradient_checkpointing=True)
    assert saving.model.is_activation_checkpointing
    assert not plain.model.is_activation_checkpointing

    expected = _adapter_gradients(plain.model)
    gradients = _adapter_gradients(saving.model)
    num_linears = 8 if family == "phi3" else 14
    assert len(expected) == 2 * num_linears
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    assert gradients.keys() == expected.keys()
    # The same operations run in the same order, so the bits are equal.
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


@renamed_in_transformers
def test_gradient_checkpointing_runs_every_block_twice(tmp_path: Path) -> None:
    base = load_base(
        str(save_tiny(tmp_path, "llama")),
        precision="float32",
        device="cpu",
        gradient_checkpointing=True,
    )
    runs = []
    base.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    _adapter_gradients(base.model)
    assert len(runs) == 2

    set_gradient_checkpointing(base.model, enabled=False)
    base.model.train()(TOKENS, labels=TOKENS).loss.backward()
    assert len(runs) == 3


def test_a_multimodal_checkpoint_loads_as_its_text_model(tmp_path: Path) -> None:
    text = tiny_model("gemma3")
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    whole = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text.config,
            vision_config=vision,
            mm_tokens_per_image=4,
            image_token_index=125,
            boi_token_index=126,
            eoi_token_index=127,
        )
    ).eval()
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.tie_weights()
    whole.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)

    base = load_base(str(tmp_path), precision="float32", device="cpu")
    assert type(base.model).__name__ == "Gemma3ForCausalLM"
    assert torch.equal(base.model(TOKENS).logits, text(TOKENS).logits)


def test_tokenizer_json_is_taken_as_it_stands(tmp_path: Path) -> None:
    # As SmolLM2 on the hub: single digits in tokenizer.json, GPT2Tokenizer in its config.
    save_tiny(tmp_path, "smollm")
    tokenizer = tiny_tokenizer(add_bos=False)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["vocab"] |= {"12": 101}
    backend["model"]["merges"] = [["1", "2"]]
    backend["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, backend["pre_tokenizer"]],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "GPT2Tokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    assert AutoTokenizer.from_pretrained(tmp_path).tokenize("x12") == ["x", "12"]  # the trap
    assert load_tokenizer(str(tmp_path)).tokenize("x12") == ["x", "1", "2"]


def test_a_tokenizer_without_pad_token_pads_with_eos(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token == EOS


def test_a_tokenizer_without_eos_token_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    with pytest.raises(ModelError, match="its tokenizer has no EOS token"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    backend = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    backend["model"]["vocab"] |= {f"w{n}": n for n in range(101, VOCAB_SIZE + 1)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))

    with pytest.raises(ModelError, match="its tokenizer has 129 tokens, but the model embeds only"):
        load_base(str(tmp_path), precision="float32", device="cpu")


def test_an_added_token_that_the_model_lacks_is_no_reason_to_refuse(tmp_path: Path) -> None:
    # Gemma 3 1B's tokenizer has an image token beyond its embeddings.
    save_tiny(tmp_path, "gemma3")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{n}>" for n in range(40)])
    tokenizer.save_pretrained(tmp_path)
    assert max(tokenizer.get_vocab().values()) >= VOCAB_SIZE

    load_base(str(tmp_path), precision="float32", device="cpu")


def test_weights_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama", num_layers=2)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(
        ModelError, match=r"9 weights of LlamaForCausalLM are not in its files, mod"
    ):
        load_base(str(tmp_path), precision="float32", device="cpu")


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    config["intermediate_size"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(ModelError, match="cannot be loaded by transformers"):
        load_base(str(tmp_path), precision="float32", device="cpu")


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])

    with pytest.raises(ModelError, match="cannot be loaded by transformers"):
        load_base(str(tmp_path), precision="float32", device="cpu")


def test_code_in_a_folder_is_not_run_unless_asked_for(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('the folder's code was run')\n")

    with pytest.raises(ModelError, match=r"brings its own Python code .* trust_remote_code"):
        load_base(str(tmp_path), precision="float32", device="cpu")


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    config = {"model_type": "t5", "d_model": 32, "vocab_size": 128, "is_encoder_decoder": True}
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(ModelError, match=r"is of type 't5'.*choose a decoder"):
        load_base(str(tmp_path), precision="float32", device="cpu")


def test_an_unknown_architecture_is_refused_in_one_line(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))

    with pytest.raises(ModelError, match="no_such_model") as raised:
        load_base(str(tmp_path), precision="float32", device="cpu")
    assert "\n" not in str(raised.value)


def test_an_unknown_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="precision 'bf16' is unknown; choose one of bfloat16"):
        load_base(str(tmp_path), precision="bf16", device="cpu")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("precision", "device"), [("nf4", "cuda"), ("int8", "cuda"), ("int8", "cpu")]
)
def test_a_quantised_precision_without_a_cuda_device_is_refused(
    precision: Precision, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = (
        f"demo:1m: precision {precision} needs a CUDA device, and the device is {device}; "
        "choose precision bfloat16, or float32 or nf4 on a CPU"
    )
    with pytest.raises(ModelError, match=expected):
        load_base("demo:1m", precision=precision, device=device)


@pytest.mark.parametrize(
    ("precision", "device"), [("nf4", "cuda"), ("int8", "cuda"), ("nf4", "cpu")]
)
def test_a_quantised_precision_without_bitsandbytes_is_refused(
    precision: Precision, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(load, "find_spec", lambda name: None)
    expected = f"precision {precision} needs the package bitsandbytes.*pip install bitsandbytes, or"
    with pytest.raises(ModelError, match=expected):
        load_base("demo:1m", precision=precision, device=device)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_bitsandbytes_that_is_too_old_is_refused(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(load, "find_spec", lambda name: name)
    monkeypatch.setattr(load, "version", lambda name: "0.49.2")
    expected = r"nf4 needs bitsandbytes 0\.50 or newer, and 0\.49\.2 is installed"
    with pytest.raises(ModelError, match=expected):
        load_base("demo:1m", precision="nf4", device=device)
    for newer in ("0.50.0", "0.51.0.dev0", "1.0"):
        monkeypatch.setattr(load, "version", lambda name, newer=newer: newer)
        check_precision("demo:1m", "nf4", device=torch.device(device))


@NEEDS_BITSANDBYTES
def test_nf4_on_a_cpu_quantises_the_blocks_and_answers_without_changing_them() -> None:
    whole = load_base("demo:1m", precision="float32", device="cpu")
    base = load_base("demo:1m", precision="nf4", device="cpu")
    layers = target_modules(base.model, ("all-linear",))
    others = {
        one.dtype
        for name, one in base.model.named_parameters()
        if name.removesuffix(".weight") not in layers
    }
    assert {base.model.get_submodule(name).weight.dtype for name in layers} == {torch.uint8}
    assert others == {torch.bfloat16}
    assert not any(one.requires_grad for one in base.model.parameters())
    before = bits_of(base)
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        exact, found = (one.model(input_ids=ids).logits.float() for one in (whole, base))
    # In spreads of the logits: 0.065.
    assert (found - exact).square().mean().sqrt() < 0.2 * exact.std()
    assert bits_of(base) == before


@NEEDS_BITSANDBYTES
def test_rows_that_are_no_whole_blocks_are_refused_in_nf4_on_a_cpu(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    expected = r"q_proj has 32 inputs, and on a CPU bitsandbytes unpacks rows of whole blocks of 64"
    with pytest.raises(ModelError, match=expected):
        load_base(str(tmp_path), precision="nf4", device="cpu")


@NEEDS_BITSANDBYTES
def test_on_a_cpu_bitsandbytes_still_unpacks_such_rows_wrongly() -> None:
    """When this fails, its code has been mended: the refusal can go for that version on."""
    functional: Any = import_module("bitsandbytes.functional")
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    numbers, state = functional.quantize_4bit(weight, quant_type="nf4")
    pairs = torch.stack([numbers.flatten() >> 4, numbers.flatten() & 15], dim=1)
    blocks = state.code[pairs.flatten().long()].view(-1, 64) * state.absmax[:, None]
    found = functional.dequantize_4bit(numbers, state)
    assert not torch.equal(found, blocks.view(weight.shape))


def old_card(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that emulates bfloat16, as torch tells of it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    return torch.device("cuda", 0)


def test_bfloat16_is_refused_on_a_card_that_only_emulates_it(monkeypatch: Any) -> None:
    device = old_card(monkeypatch)
    expected = (
        r"demo:1m: precision bfloat16 is not there on Tesla T4 \(sm_75\); choose precision float16"
    )
    with pytest.raises(ModelError, match=expected):
        load_base("demo:1m", precision="bfloat16", device=device)
    for precision in ("float16", "float32"):
        check_precision("demo:1m", precision, device=device)


def test_where_no_precision_is_asked_for_it_is_one_that_the_device_has(monkeypatch: Any) -> None:
    assert default_precision(torch.device("cpu")) == "float32"
    device = old_card(monkeypatch)
    assert default_precision(device) == "float16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert default_precision(device) == "bfloat16"
    check_precision("demo:1m", "bfloat16", device=device)


def test_a_checkpoint_that_is_stored_quantised_is_not_quantised_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_tiny(tmp_path, "llama") / "config.json"
    written = json.loads(path.read_text())
    written["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps(written))
    monkeypatch.setattr(load, "_check_quantisation", lambda *given, **named: None)
    with pytest.raises(ModelError, match="is stored quantised, and quantising it once more to nf4"):
        load_base(str(tmp_path), precision="nf4", device="cuda")


def test_nf4_is_asked_for_without_double_quantisation_and_int8_as_published() -> None:
    four = load._quantisation("nf4", dtype=torch.bfloat16)
    assert (four.load_in_4bit, four.load_in_8bit) == (True, False)
    assert four.quantization_method() == "nf4"
    assert four.bnb_4bit_use_double_quant is False
    assert four.bnb_4bit_compute_dtype == torch.bfloat16
    eight = load._quantisation("int8", dtype=torch.bfloat16)
    assert (eight.load_in_4bit, eight.load_in_8bit) == (False, True)
    assert eight.llm_int8_threshold == 6.0  # section 3.2 of the paper
