"""Load a base model and its tokenizer, frozen, ready for an adapter.

The model comes from transformers, in the precision asked for, on SDPA attention, with every
parameter frozen and without a key-value cache. Of a multimodal checkpoint the text model is loaded
as a causal LM. Not covered: checkpoints that are stored quantised, several devices,
encoder-decoders.

The precisions nf4 and int8 quantise the linear layers of the blocks while they are loaded, with
bitsandbytes, which is imported for them alone: NormalFloat in four bits, a float32 scale a block of
64 weights (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, without its double quantisation), and
LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339). Embeddings, norms, the output head and the
arithmetic are bfloat16 where the device has it, else float16; LLM.int8's products are float16
whatever surrounds them. int8 needs a CUDA device: on a CPU bitsandbytes trains with unpacked
weights and whole activations, which is no LLM.int8. nf4 also loads on a CPU. Both are tested with
bitsandbytes 0.50.2, on CUDA by `make test-gpu`.

A tokenizer.json is taken as it stands. transformers 5 would rebuild the tokenizer from the class
that tokenizer_config.json or the model type names, and that class brings its own rule for cutting
text: SmolLM2's folder on the hub names GPT2Tokenizer and would lose its digit splitting.
"""

# transformers' Auto classes are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import logging
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from loratune.errors import ModelError
from loratune.models.fingerprint import fingerprint
from loratune.models.gguf import check_gguf, repair_tokenizer
from loratune.models.sources import Location, has_custom_code, locate, read_json
from loratune.models.targets import block_linears

Precision = Literal["bfloat16", "float16", "float32", "nf4", "int8"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
QUANTISED = ("nf4", "int8")
# What was read and, on a CPU, run; pyproject.toml says so too. Transformers would take 0.46.1.
OLDEST_BITSANDBYTES = (0, 50)

# Where a multimodal checkpoint keeps its text model, in the layouts that transformers has had.
_TEXT_PREFIX = {r"^(model\.)?language_model\.(model\.)?": "model."}

# What transformers raises about a folder's contents: its own checks, missing files and keys,
# malformed safetensors, sizes that do not fit, an architecture or a library that is not there.
_LOADING_ERRORS = (
    ValueError,
    OSError,
    KeyError,
    RuntimeError,
    TypeError,
    AttributeError,
    ImportError,
    SafetensorError,
)


@dataclass(frozen=True)
class Base:
    """A frozen base model, its tokenizer, and what identifies them.

    `model` is a causal LM in eval mode on `device`, no parameter requires a gradient. `tokenizer`
    has an EOS token, and a padding token (EOS where it has none of its own: padding is always
    masked, so that it only fills).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    fingerprint: str
    device: torch.device


def positions_of(config: PreTrainedConfig) -> int | None:
    """How many tokens a model has positions for; None where its configuration sets no limit."""
    return cast("int | None", getattr(config.get_text_config(), "max_position_embeddings", None))


def load_base(
    source: str,
    *,
    precision: Precision,
    device: torch.device | str,
    trust_remote_code: bool = False,
    gradient_checkpointing: bool = False,
) -> Base:
    """Load a base model and its tokenizer.

    Args:
        source: hub id, local folder, file.gguf (dequantised to `precision`), or demo:4m.
        precision: of the frozen weights; nf4 and int8 need bitsandbytes, int8 a CUDA device too.
        trust_remote_code: run the repository's own Python code; only for sources that you trust.
        gradient_checkpointing: keep only each block's input for the backward pass and compute the
            rest again; the same gradients for less memory and about a third more time.

    Raises:
        ModelError: the source is missing, incomplete or unsafe, or transformers cannot load it; or
            the precision can't be had: see `check_precision`.
    """
    where = torch.device(device)
    check_precision(source, precision, device=where)
    location = locate(source)
    tokenizer = _load_tokenizer(location, trust_remote_code=trust_remote_code)
    model = _load_model(
        location, precision=precision, device=where, trust_remote_code=trust_remote_code
    )
    # Added tokens do not count: Gemma 3 1B's tokenizer has one for images that the model lacks.
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ModelError(
            f"model {source}: its tokenizer has {tokenizer.vocab_size} tokens, but the model "
            f"embeds only {model.config.vocab_size}; put the model's own tokenizer into the folder"
        )
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = False
    if precision not in QUANTISED:  # those were quantised on their device, and stay there
        model.to(where)  # pyright: ignore[reportArgumentType]  # transformers wraps nn.Module.to untyped
    elif where.type == "cpu":
        prepare_nf4_on_cpu(model, source=source)
    if gradient_checkpointing:
        set_gradient_checkpointing(model, enabled=True)
    return Base(
        model=model,
        tokenizer=tokenizer,
        source=source,
        fingerprint=fingerprint(location),
        device=where,
    )


def check_precision(source: str, precision: str, *, device: torch.device) -> None:
    """Refuse a precision that a model can't have on the device, before anything is read.

    Raises:
        ModelError: it is unknown; or bfloat16, on a card that only emulates it; or quantised,
            without bitsandbytes or what bitsandbytes needs.
    """
    if precision not in _DTYPES and precision not in QUANTISED:
        known = ", ".join([*_DTYPES, *QUANTISED])
        raise ModelError(f"precision {precision!r} is unknown; choose one of {known}")
    if precision in QUANTISED:
        _check_quantisation(source, precision, device=device)
    elif precision == "bfloat16" and not has_bfloat16(device):
        major, minor = torch.cuda.get_device_capability(device)
        raise ModelError(
            f"model {source}: precision bfloat16 is not there on "
            f"{torch.cuda.get_device_name(device)} (sm_{major}{minor}); choose precision float16"
        )


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 itself: a CPU, or a CUDA device from sm_80."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return True
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def default_precision(device: torch.device) -> Precision:
    """float32 on a CPU; on a CUDA device bfloat16 where it has it, else float16."""
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if has_bfloat16(device) else "float16"


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model alone.

    Raises:
        ModelError: the source is missing or incomplete, or its tokenizer has no EOS token.
    """
    return _load_tokenizer(locate(source), trust_remote_code=trust_remote_code)


def set_gradient_checkpointing(model: PreTrainedModel, *, enabled: bool) -> None:
    """Switch gradient checkpointing of a base model on or off, in place.

    The non-reentrant kind, whose backward reaches the adapters although the embeddings that feed
    the first block require no gradient. Blocks only checkpoint in training mode.
    """
    if enabled:
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.activation_checkpointing_disable()


def read_config(location: Location, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of the causal LM: of a multimodal model, that of its text model.

    Raises:
        ModelError: the config cannot be read, needs code that is not trusted, or names a model that
            transformers has no causal LM for.
    """
    source = location.source
    if location.kind == "folder":
        written = read_json(location.path / "config.json", source=source)
        if has_custom_code(written) and not trust_remote_code:
            raise ModelError(
                f"model {source} brings its own Python code (auto_map in config.json), which is "
                "not run; choose a model that transformers has, or ask for trust_remote_code"
            )
    with _translated(source), _without_progress_bars():
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            **_where(location), trust_remote_code=trust_remote_code
        )
    text = config.get_text_config(decoder=True)
    known = type(text) in MODEL_FOR_CAUSAL_LM_MAPPING
    if config.is_encoder_decoder or not (known or has_custom_code(config.to_dict())):
        raise ModelError(
            f"model {source} is of type {config.model_type!r}, "
            "which transformers offers no causal language model for; choose a decoder"
        )
    return text


def _check_quantisation(source: str, precision: str, *, device: torch.device) -> None:
    """Refuse where bitsandbytes cannot work, before anything is read."""
    on_cuda = device.type == "cuda" and torch.cuda.is_available()
    on_cpu = device.type == "cpu" and precision == "nf4"
    if not on_cuda and not on_cpu:
        raise ModelError(
            f"model {source}: precision {precision} needs a CUDA device, and the device is "
            f"{device}; choose precision bfloat16, or float32 or nf4 on a CPU"
        )
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model {source}: precision {precision} needs the package bitsandbytes, which is not "
            "installed; pip install bitsandbytes, or choose precision bfloat16"
        )
    installed = version("bitsandbytes")
    major, minor, *_ = installed.split(".")
    if (int(major), int(minor)) < OLDEST_BITSANDBYTES:
        needed = ".".join(map(str, OLDEST_BITSANDBYTES))
        raise ModelError(
            f"model {source}: precision {precision} needs bitsandbytes {needed} or newer, and "
            f"{installed} is installed; pip install --upgrade bitsandbytes, or choose precision "
            "bfloat16"
        )


def prepare_nf4_on_cpu(model: PreTrainedModel, *, source: str) -> None:
    """Keep bitsandbytes' code for CPUs from another base than the one that was quantised.

    Where the processor multiplies bfloat16 itself, a Linear4bit that is asked without a gradient
    packs its weight anew, for good, and rounds its scales to 16 bits: validation would change what
    is trained on. And unpacking takes every row to begin with a block of its own (seen with
    bitsandbytes 0.50.2), so that a row that is no whole number of blocks comes out wrong.

    Raises:
        ModelError: a layer has such rows.
    """
    for name, linear in block_linears(model).items():
        if linear.weight.is_floating_point():
            continue
        layer: Any = linear
        size = int(layer.weight.quant_state.blocksize)
        if linear.in_features % size:
            raise ModelError(
                f"model {source}: {name} has {linear.in_features} inputs, and on a CPU "
                f"bitsandbytes unpacks rows of whole blocks of {size} alone; choose precision "
                "float32, or a CUDA device"
            )
        layer.support_avx512bf16_for_cpu = False


def _quantisation(precision: str, *, dtype: torch.dtype) -> BitsAndBytesConfig:
    if precision == "int8":
        # It would say in every product that it computes in float16; the docstring says it once.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=False,
        bnb_4bit_compute_dtype=dtype,
    )


def _load_model(
    location: Location, *, precision: str, device: torch.device, trust_remote_code: bool
) -> PreTrainedModel:
    config = read_config(location, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {}
    if precision in QUANTISED:
        own = config.to_dict().get("quantization_config")
        if location.kind == "gguf" or own is not None:
            raise ModelError(
                f"model {location.source} is stored quantised, and quantising it once more to "
                f"{precision} would be another model; choose precision bfloat16, or give the "
                "unquantised checkpoint"
            )
        dtype = torch.bfloat16 if has_bfloat16(device) else torch.float16
        options["quantization_config"] = _quantisation(precision, dtype=dtype)
        options["device_map"] = {"": device}
    else:
        dtype = _DTYPES[precision]
    if location.kind == "gguf":
        check_gguf(location.path, source=location.source)
        # Without it transformers may keep blocks packed in layers that PEFT cannot adapt.
        options["quantization_config"] = GgufConfig(dequantize=True)
    else:
        options["use_safetensors"] = True
        options["key_mapping"] = _TEXT_PREFIX
    with _translated(location.source), _without_progress_bars():
        loaded = AutoModelForCausalLM.from_pretrained(
            **_where(location),
            **options,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    model, report = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    absent = sorted(report["missing_keys"])
    if absent:
        # transformers would fill them with random numbers and a warning
        raise ModelError(
            f"model {location.source}: {len(absent)} weights of {type(model).__name__} are not in "
            f"its files, {absent[0]} among them; the files are damaged or of another model"
        )
    return model


def _load_tokenizer(location: Location, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    source = location.source
    is_gguf = location.kind == "gguf"
    # AutoTokenizer would go by the class that the folder or the architecture names
    as_it_stands = is_gguf or (location.path / "tokenizer.json").is_file()
    reader = PreTrainedTokenizerFast if as_it_stands else AutoTokenizer
    pre_tokenizer = check_gguf(location.path, source=source) if is_gguf else None
    with _translated(source):
        tokenizer: PreTrainedTokenizerBase = reader.from_pretrained(
            **_where(location), trust_remote_code=trust_remote_code
        )
    repair_tokenizer(tokenizer, pre_tokenizer=pre_tokenizer)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"model {source}: its tokenizer has no EOS token, which ends every training row; "
            "set eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _where(location: Location) -> dict[str, Any]:
    """transformers' arguments for these files, which are here: nothing is to be downloaded."""
    if location.kind == "gguf":
        folder, name = location.path.parent, location.path.name
        return {
            "pretrained_model_name_or_path": str(folder),
            "gguf_file": name,
            "local_files_only": True,
        }
    return {"pretrained_model_name_or_path": str(location.path), "local_files_only": True}


@contextmanager
def _translated(source: str) -> Generator[None]:
    """transformers' errors about a source as one ModelError with its first line."""
    try:
        yield
    except ModelError:
        raise
    except _LOADING_ERRORS as error:
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelError(f"model {source} cannot be loaded by transformers: {first}") from error


@contextmanager
def _without_progress_bars() -> Generator[None]:
    """Loading takes seconds; the caller draws its own progress on stderr."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
