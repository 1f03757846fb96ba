"""Adapters from files: the same answers as in training, one base left alone, clear refusals."""

import json
import os
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    XLoraConfig,
    get_peft_model,
)
from torch import Tensor

from loratune.errors import ModelError
from loratune.methods import attach_files, load_method
from loratune.methods.adapter_files import AdapterFiles, read_adapter
from loratune.methods.peft_adapter import quiet_peft
from loratune.models.targets import target_modules
from methods.trials import METHODS, logits_of, make_optimizer, make_trial, run_updates
from tiny_models import tiny_model

# PEFT asks transformers for a property that was renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def trained(model: Any, method: str) -> tuple[AdapterFiles, Tensor]:
    trial = make_trial(method, learning_rate=2e-2, num_updates=8, dropout=0.1)
    targets = target_modules(model, trial.targets)
    attached = load_method(method).attach(model, trial, targets=targets)
    run_updates(attached, make_optimizer(attached, trial), range(8))
    files, logits = attached.export(), logits_of(attached.model)
    attached.detach()
    return files, logits


@pytest.mark.parametrize("method", METHODS)
def test_files_and_folder_give_the_logits_of_training_on_the_resident_base(method, tmp_path):
    model = tiny_model("llama")
    base = logits_of(model)
    files, logits = trained(model, method)
    files.save(tmp_path)
    for adapter in (files, tmp_path):
        loaded = attach_files(model, adapter)
        # In place: whoever holds the base answers with the adapter. float32, another order of sums.
        for callee in (loaded.model, model):
            torch.testing.assert_close(logits_of(callee), logits, atol=2e-5, rtol=1e-5)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(module.training for module in loaded.model.modules())
        loaded.detach()
        assert torch.equal(logits_of(model), base)


def test_loading_leaves_the_global_random_state_alone():
    model = tiny_model("llama")
    files, _ = trained(model, "lora")
    before = torch.get_rng_state()
    attach_files(model, files)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_stay_float32_over_a_bfloat16_base():
    model: Any = cast("Any", tiny_model("llama")).to(torch.bfloat16)
    files, logits = trained(model, "dora")
    loaded = attach_files(model, files)
    held = [one for name, one in loaded.model.named_parameters() if ".lora_" in name]
    assert len(held) == len(files.tensors)
    assert all(one.dtype == torch.float32 for one in held)
    torch.testing.assert_close(logits_of(loaded.model), logits, atol=0, rtol=0)


def peft_folder(folder: Path, config: Any, *, random: bool = True) -> Tensor:
    """An adapter that PEFT alone made and saved; returns its logits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(tiny_model("llama"), config).eval()
        for name, one in model.named_parameters():
            if random and "lora_B" in name:
                torch.nn.init.normal_(one, std=0.3)
    model.save_pretrained(str(folder))
    return logits_of(model)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]},
        {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "use_rslora": True},
        {"r": 3, "target_modules": ["q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 5}},
        {"r": 3, "target_modules": ["up_proj"], "use_dora": True, "init_lora_weights": "gaussian"},
    ],
)
def test_an_adapter_that_peft_made_gives_pefts_logits(config, tmp_path):
    logits = peft_folder(tmp_path, LoraConfig(task_type="CAUSAL_LM", **config))
    loaded = attach_files(tiny_model("llama"), tmp_path)
    torch.testing.assert_close(logits_of(loaded.model), logits, atol=1e-5, rtol=1e-5)


def edited(folder: Path, **changes: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def refuse(folder: Path, message: str) -> None:
    model = tiny_model("llama")
    base, names = logits_of(model), [name for name, _ in model.named_modules()]
    with pytest.raises(ModelError, match=message):
        attach_files(model, folder)
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(logits_of(model), base)


LORA = {"r": 3, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
HEAD = ["q_proj", "lm_head"]


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_of_a_base_that_peft_changed_is_refused(start, tmp_path):
    peft_folder(tmp_path, LoraConfig(**LORA, init_lora_weights=start), random=False)
    refuse(tmp_path, f"init_lora_weights='{start}'.*convert it")


MORE = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
OTHER_KINDS = {
    "LoHa": lambda: LoHaConfig(r=3, **MORE),
    "IA3": lambda: IA3Config(**MORE, feedforward_modules=["down_proj"]),
    "AdaLoRA": lambda: AdaLoraConfig(**MORE, total_step=10),
    "tokens": lambda: TrainableTokensConfig(token_indices=[3, 9, 40], task_type="CAUSAL_LM"),
    "bias and modules": lambda: LoraConfig(
        r=3, **MORE, bias="all", modules_to_save=["norm", "lm_head"]
    ),
    "embeddings": lambda: LoraConfig(
        r=3, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"
    ),
}


def greedy(model: Any) -> list[list[int]]:
    """PEFT's or transformers' own greedy answers, 16 tokens to each of 2 prompts."""
    prompts = torch.tensor([[1, 3, 40, 9, 77], [1, 12, 12, 9, 100]])
    made = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=16,
        eos_token_id=None,
        pad_token_id=0,
    )
    return made[:, prompts.shape[1] :].tolist()


# Qwen 2 has biases of its own, Gemma 3 ties its head to its embeddings.
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_any_kind_of_adapter_answers_as_in_peft_and_leaves_the_base_bit_for_bit(
    kind, family, tmp_path
):
    generator = torch.Generator().manual_seed(1)
    with quiet_peft():
        made = get_peft_model(tiny_model(family), OTHER_KINDS[kind]())
        with torch.no_grad():
            for one in made.parameters():
                if one.requires_grad:
                    one.add_(0.3 * torch.randn(one.shape, generator=generator))
        made.save_pretrained(str(tmp_path), save_embedding_layers=kind == "embeddings")
        wanted = greedy(PeftModel.from_pretrained(tiny_model(family), str(tmp_path)).eval())
    model = tiny_model(family)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    plain = greedy(model)
    loaded = attach_files(model, tmp_path)
    assert greedy(model) == wanted != plain
    loaded.detach()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], one) for name, one in before.items())
    assert greedy(model) == plain


def test_what_a_call_of_the_model_does_not_apply_is_refused(tmp_path):
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    get_peft_model(tiny_model("llama"), config).save_pretrained(str(tmp_path))
    refuse(tmp_path, "'PROMPT_TUNING', which a plain call of the model does not apply")
    # It names further adapters, which PEFT would load from wherever they lie.
    config = XLoraConfig(hidden_size=32, adapters={"0": "elsewhere"}, task_type="CAUSAL_LM")
    fields = json.dumps(config.to_dict(), default=sorted)
    (tmp_path / "adapter_config.json").write_text(fields)
    refuse(tmp_path, "'XLORA', which a plain call of the model does not apply")
    peft_folder(tmp_path, LoraConfig(**LORA))
    refuse(edited(tmp_path, alora_invocation_tokens=[5]), "uses alora_invocation_tokens, which")
    peft_folder(tmp_path, LoraConfig(**LORA))
    refuse(edited(tmp_path, megatron_config={"a": 1}), "uses megatron_config, which")
    refuse(edited(tmp_path, peft_type="NEXT_YEARS"), "'NEXT_YEARS', unknown to the installed PEFT")


def test_an_adapter_of_another_shape_or_other_layers_is_refused(tmp_path):
    peft_folder(tmp_path, LoraConfig(**LORA))
    refuse(edited(tmp_path, r=4), "does not fit this base.*size mismatch")
    refuse(edited(tmp_path, r=3, target_modules=["q_proj", "k_proj"]), "tensors are missing")
    refuse(edited(tmp_path, target_modules=["k_proj"]), "does not fit this base")
    refuse(edited(tmp_path, target_modules=["query"]), "does not fit this base")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"trainable_token_indices": [100_000]}, "IndexError: index 100000 is out of bounds"),
        ({"layer_replication": [[0, 9]]}, "IndexError: "),
        ({"bias": "x"}, "NotImplementedError: "),
    ],
)
def test_what_peft_fails_on_in_a_way_of_its_own_is_refused(changes, told, tmp_path):
    peft_folder(tmp_path, LoraConfig(**LORA))
    refuse(edited(tmp_path, **changes), f"does not fit this base: {told}")


@pytest.mark.parametrize(
    ("config", "changes", "told"),
    [
        (VeraConfig(r=3, **MORE), {"r": 0}, "ZeroDivisionError: "),
        (OFTConfig(oft_block_size=4, **MORE), {"oft_block_size": 8}, "RuntimeError: .*mismatch"),
    ],
)
def test_another_kind_that_peft_fails_on_is_refused(config, changes, told, tmp_path):
    with quiet_peft():
        get_peft_model(tiny_model("llama"), config).save_pretrained(str(tmp_path))
    refuse(edited(tmp_path, **changes), f"does not fit this base: {told}")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, KeyboardInterrupt])
def test_what_is_not_the_adapters_fault_goes_through_and_the_base_is_as_before(
    error, tmp_path, monkeypatch
):
    peft_folder(tmp_path, LoraConfig(**LORA))
    model = tiny_model("llama")
    names = [name for name, _ in model.named_modules()]

    def fail(*_: Any, **__: Any) -> None:
        raise error("no more")

    module = sys.modules[attach_files.__module__]  # The package holds the function by its name.
    monkeypatch.setattr(module, "set_peft_model_state_dict", fail)
    with pytest.raises(error, match="no more"):
        attach_files(model, tmp_path)
    assert [name for name, _ in model.named_modules()] == names


# The head and what is trained in its place, too.
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["lm_head"]}, {"target_modules": HEAD}])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_with_a_weight_that_is_not_finite_no_logit_is_a_number_until_it_is_taken_off(
    value, more, tmp_path
):
    peft_folder(tmp_path, LoraConfig(**{**LORA, **more}))
    files = read_adapter(tmp_path)
    tensors = {name: one.clone() for name, one in files.tensors.items()}
    name = next(name for name in tensors if "layers.0.self_attn.q_proj.lora_B" in name)
    tensors[name][0, 0] = value
    model = tiny_model("llama")
    before = logits_of(model)
    loaded = attach_files(model, AdapterFiles(files.config, tensors))
    # Short and without a mask, so that attention on a CPU alone would not tell.
    ids = torch.tensor([[5, 7, 9, 11, 13]])
    for callee in (loaded.model, model):
        assert callee(ids).logits.isnan().all()
    loaded.detach()
    assert torch.equal(logits_of(model), before)
    attach_files(model, files)
    assert model(ids).logits.isfinite().all()


def test_settings_that_the_installed_peft_does_not_know_are_refused_unless_off(tmp_path):
    logits = peft_folder(tmp_path, LoraConfig(**LORA))
    refuse(edited(tmp_path, use_next_years_trick=True), "use_next_years_trick.*update peft")
    loaded = attach_files(tiny_model("llama"), edited(tmp_path, use_next_years_trick=False))
    torch.testing.assert_close(logits_of(loaded.model), logits, atol=1e-5, rtol=1e-5)


def test_modules_that_an_adapter_names_and_does_not_bring_are_refused(tmp_path):
    peft_folder(tmp_path, LoraConfig(**LORA))
    refuse(edited(tmp_path, modules_to_save=["lm_head"]), r"1 of its tensors are missing \(.*head")


def test_a_pickle_is_refused_and_not_opened(tmp_path):
    peft_folder(tmp_path, LoraConfig(**LORA))
    (tmp_path / "adapter_model.safetensors").unlink()
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    torch.save({"weight": Payload()}, tmp_path / "adapter_model.bin")
    refuse(tmp_path, r"adapter_model\.bin is a pickle")
    assert not marker.exists()


def test_missing_and_damaged_files_are_refused(tmp_path):
    refuse(tmp_path, r"holds no adapter_config\.json")
    peft_folder(tmp_path, LoraConfig(**LORA))
    refuse(edited(tmp_path, r="three"), "does not fit this base")
    refuse(edited(tmp_path, layers_pattern="layers"), "malformed")
    (tmp_path / "adapter_config.json").write_text("{")
    refuse(tmp_path, "is no JSON")
    (tmp_path / "adapter_config.json").write_text("[1]")
    refuse(tmp_path, "no JSON object")
    peft_folder(tmp_path, LoraConfig(**LORA))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"garbage")
    refuse(tmp_path, "no safetensors file")
    (tmp_path / "adapter_model.safetensors").unlink()
    refuse(tmp_path, r"holds no adapter_model\.safetensors")


def test_what_is_saved_is_what_is_read(tmp_path):
    files, _ = trained(tiny_model("llama"), "dora")
    files.save(tmp_path)
    read = read_adapter(tmp_path)
    assert read.config == files.config
    assert read.tensors.keys() == files.tensors.keys()
    assert all(torch.equal(read.tensors[name], one) for name, one in files.tensors.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
