"""Quantised bases, which only a CUDA device with bitsandbytes can load."""

import gc
from importlib.util import find_spec
from typing import Any, cast

import pytest
import torch

from loratune.methods import load_method
from loratune.methods.attach_files import attach_files
from loratune.models.describe import describe_model
from loratune.models.load import Precision, load_base
from loratune.models.targets import target_modules
from loratune.planning.cost import weight_bytes
from methods.trials import make_optimizer, make_trial, token_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes"),
    # PEFT asks transformers for a property that was renamed.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]


def base_of(precision: Precision) -> Any:
    return load_base("demo:1m", precision=precision, device="cuda")


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(input_ids=token_ids(777).cuda()).logits.float()


def bits_of(model: Any) -> list[bytes]:
    return [
        one.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        for one in model.parameters()
    ]


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_only_the_linear_layers_of_the_blocks_are_quantised(precision):
    model = base_of(precision).model
    layers = target_modules(model, ("all-linear",))
    packed = {"nf4": torch.uint8, "int8": torch.int8}[precision]
    assert {model.get_submodule(name).weight.dtype for name in layers} == {packed}
    others = {
        one.dtype
        for name, one in model.named_parameters()
        if name.removesuffix(".weight") not in layers
    }
    assert others == {torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16}
    assert not any(one.requires_grad for one in model.parameters())


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_the_weights_take_what_is_planned(precision):
    gc.collect()  # A base of an earlier test must not go while this one is counted.
    before = torch.cuda.memory_allocated()
    base = base_of(precision)
    taken = torch.cuda.memory_allocated() - before
    # Norms, row scales and the allocator's rounding to 512 bytes are not planned.
    planned = weight_bytes(describe_model("demo:1m"), precision)
    assert taken == pytest.approx(planned, rel=0.1)
    assert base.device.type == "cuda"


@pytest.mark.parametrize(("precision", "tolerance"), [("nf4", 0.2), ("int8", 0.05)])
def test_a_quantised_base_says_nearly_what_the_whole_one_says(precision, tolerance):
    whole, quantised = logits_of(base_of("bfloat16").model), logits_of(base_of(precision).model)
    # In spreads of the logits: 0.065 and 0.013 with bitsandbytes' code for CPUs, three times each.
    assert (whole - quantised).square().mean().sqrt() < tolerance * whole.std()


@pytest.mark.parametrize("method", ["lora", "rslora", "loraplus"])
@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_an_adapter_trains_leaves_the_base_alone_and_loads_again(precision, method):
    model = base_of(precision).model
    before = bits_of(model)
    trial = make_trial(method, learning_rate=1e-2)
    attached = load_method(method).attach(
        model, trial, targets=target_modules(model, trial.targets)
    )
    optimizer = make_optimizer(attached, trial)
    attached.model.train()
    losses = list[float]()
    ids = token_ids(0).cuda()
    for _ in range(10):
        logits = attached.model(input_ids=ids).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        cast("Any", loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    attached.model.eval()
    assert losses[-1] < losses[0]
    trained, files = logits_of(attached.model), attached.export()
    attached.detach()
    assert bits_of(model) == before
    loaded = attach_files(model, files)
    assert torch.equal(logits_of(loaded.model), trained)
    loaded.detach()
