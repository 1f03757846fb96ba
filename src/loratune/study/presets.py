"""Commented study files: the paper's figures, its proxy and noise scale, published comparisons.

A preset is a base, the paper's default setting at one of two scales, with the lines that its figure
changes laid over it; so a fact stands in one place and ten files cannot drift apart. Each line
carries its YAML text, why it has this value, and whether that is our assumption because the source
does not say. Nothing here builds a `Study`: what is printed is read back like any other file.

The paper is "Beware of the Batch Size: Hyperparameter Bias in Evaluating LoRA"; its own setting
follows PiSSA (Meng et al. 2024), which fills most of the gaps.
"""

import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from loratune.errors import StudyError
from loratune.study.methods import near

ASSUMED = "our assumption"
SCALES = ("small", "paper")
_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Line:
    """One key's YAML text, why it has this value, and whether the source leaves it open."""

    value: str
    why: str = ""
    assumed: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's shape, from its published configuration; field names are the study file's."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    sliding_window: int | None = None
    num_sliding_layers: int = 0


@dataclass(frozen=True, slots=True)
class Rows:
    """A hub data set: the lines that read it, and what `plan` may assume of its size.

    The numbers of rows are published; the mean lengths, with the alpaca template and EOS and cut at
    512 tokens, are assumptions made from the files' sizes.
    """

    lines: dict[str, Line]
    num_rows: int
    mean_tokens: int
    mean_target_tokens: int


@dataclass(frozen=True, slots=True)
class Preset:
    """One printed file: what it reproduces, models and rows, and the lines over the scale's own."""

    reproduces: str
    models: tuple[str, ...]
    rows: Rows
    lines: dict[str, Line]
    model_why: str = ""
    model_assumed: bool = False


_LLAMA_7B, _LLAMA_13B = "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf"
_LLAMA_3B = "meta-llama/Llama-3.2-3B"
_QWEN, _GEMMA, _SMALL_GEMMA = "Qwen/Qwen3-0.6B", "google/gemma-3-1b-pt", "google/gemma-3-270m"
_SMOL_135M, _SMOL_360M = "HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-360M"

_SHAPES = {
    _LLAMA_7B: Shape(4096, 11008, 32, 32, 32, 128, 32000, False),
    _LLAMA_13B: Shape(5120, 13824, 40, 40, 40, 128, 32000, False),
    _LLAMA_3B: Shape(3072, 8192, 28, 24, 8, 128, 128256, True),
    _QWEN: Shape(1024, 3072, 28, 16, 8, 128, 151936, True),
    _GEMMA: Shape(1152, 6912, 26, 4, 1, 256, 262144, True, 512, 22),
    _SMALL_GEMMA: Shape(640, 2048, 18, 4, 1, 256, 262144, True, 512, 15),
    _SMOL_135M: Shape(576, 1536, 30, 9, 3, 64, 49152, True),
    _SMOL_360M: Shape(960, 2560, 32, 15, 5, 64, 49152, True),
}

_METAMATH = Rows(
    {
        "data.train": Line("meta-math/MetaMathQA"),
        "data.prompt": Line("query"),
        "data.response": Line("response"),
        "data.validation": Line(
            "{rows: 512, group_by: original_question}",
            "MetaMathQA rewrites each question many times; all of its wordings stay on one side.",
        ),
    },
    num_rows=395_000,
    mean_tokens=280,
    mean_target_tokens=180,
)
_CODEFEEDBACK = Rows(
    {
        "data.train": Line("m-a-p/CodeFeedback-Filtered-Instruction"),
        "data.prompt": Line("query"),
        "data.response": Line("answer"),
        "data.validation": Line(
            "{rows: 512}", "Rows with the same normalised query stay together."
        ),
    },
    num_rows=156_526,
    mean_tokens=450,
    mean_target_tokens=270,
)
_GSM8K = Rows(
    {
        "data.train": Line("{id: openai/gsm8k, subset: main, split: train}"),
        "data.prompt": Line("question"),
        "data.response": Line("answer"),
        "data.validation": Line("{rows: 512, group_by: question}"),
    },
    num_rows=7_473,
    mean_tokens=205,
    mean_target_tokens=117,
)

# What each key does, printed above it. The order is the order of the file.
_MEANING = {
    "study": "Name of the study, in every table and figure.",
    "model": "* Base model: hub id, local folder, file.gguf or demo:1m.",
    "precision": "Of the frozen base model. Adapters and optimizer state are float32.",
    "data": "The rows, and how they become text.",
    "data.train": "Hub id, or a local .jsonl, .json, .csv or .parquet file.",
    "data.prompt": "Field that holds the prompt; its tokens carry no loss.",
    "data.response": "Field that holds the response; its tokens carry the loss.",
    "data.template": "How a prompt is written out: alpaca, chat, chatml, plain or a text.",
    "data.suffix": "Text between the response and the end-of-sequence token.",
    "data.max_tokens": "Longest row, in tokens.",
    "data.too_long": "What becomes of longer rows: drop or truncate.",
    "data.rows": "* N, the number of training rows, counted after the hold-out.",
    "data.rows_order": "Which N rows: first or random.",
    "data.validation": "Rows held out of the training data. They choose the learning rate.",
    "protocol": "* fixed_samples: equal rows for every batch size. fixed_steps: equal updates.",
    "methods": "* LoRA variants.",
    "rank": "* r.",
    "alpha": "* rank, 2*rank or a number. The adapter is scaled by alpha/r.",
    "targets": "The linear layers that get an adapter.",
    "dropout": "On the adapters' input.",
    "batch_size": "* Sequences per update.",
    "learning_rate": "* Peak learning rates; each cell's best is chosen among them.",
    "seeds": "* A count (3 means 0, 1, 2) or a list. Moves data order, dropout, initialisation.",
    "optimizer": "",
    "optimizer.name": "",
    "optimizer.betas": "",
    "optimizer.beta2": "* fixed, or {half_life_tokens: X} in trained target tokens.",
    "optimizer.eps": "",
    "optimizer.weight_decay": "",
    "optimizer.max_grad_norm": "Clips the norm of the gradient; null: no clipping.",
    "schedule": "* cosine, linear or constant, with warmup_ratio or warmup_steps.",
    "evaluate": "Test sets. They are scored; they choose nothing unless select_on is test.",
    "evaluate.tasks": "",
    "evaluate.when": "selected: each cell's chosen learning rate alone. all: every trial.",
    "select_on": "What chooses the learning rate: validation_loss, validation_accuracy or test.",
    "keep_adapters": "none, best (one a cell) or all.",
    "noise_scale": "Of the gradient, measured while trials train, none of which it changes.",
}
# These stand in a file only where a preset is about them.
_OPTIONAL = ("noise_scale",)

_AS_PISSA = "As PiSSA, whose setting the paper follows."
_GSM8K_TASK = Line(
    "[{name: gsm8k, grader: pissa, max_new_tokens: 1024}]",
    "Greedy, 1,024 new tokens, no stop string, graded as PiSSA and MiLoRA grade: as PiSSA.",
    assumed=True,
)

# Table 1 and section 2 of the paper, and PiSSA's setting for what they leave out.
_PAPER_LINES = {
    "precision": Line("bfloat16", "", assumed=True),
    "data.template": Line("alpaca", _AS_PISSA, assumed=True),
    "data.suffix": Line('"\\n"', _AS_PISSA, assumed=True),
    "data.max_tokens": Line("512", _AS_PISSA, assumed=True),
    "data.too_long": Line("truncate", assumed=True),
    "data.rows": Line(
        "100000", "Section 2: the first 100K; here, the first that the hold-out leaves."
    ),
    "data.rows_order": Line("first"),
    "protocol": Line("{kind: fixed_samples, epochs: 1}", "Section 2 and Table 1: one epoch."),
    "methods": Line("[lora]"),
    "rank": Line("128", "Table 1."),
    "alpha": Line("rank", "Table 1."),
    "targets": Line("[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]", "Table 1."),
    "dropout": Line("0.0", "Table 1."),
    "batch_size": Line(
        "[2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]",
        "The paper lists no batch sizes: doubling over the range of its figures.",
        assumed=True,
    ),
    "learning_rate": Line(
        "paper",
        "Appendix E: 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 3e-3.",
    ),
    "seeds": Line("3", "Section 2: three seeds."),
    "optimizer.name": Line("adamw", "Table 1."),
    "optimizer.betas": Line("[0.9, 0.999]", assumed=True),
    "optimizer.beta2": Line("fixed", assumed=True),
    "optimizer.eps": Line("1e-8", assumed=True),
    "optimizer.weight_decay": Line("0.0", _AS_PISSA, assumed=True),
    "optimizer.max_grad_norm": Line("1.0", _AS_PISSA, assumed=True),
    "schedule": Line("{kind: cosine, warmup_ratio: 0.0}", "Table 1: cosine, no warm-up."),
    "evaluate.tasks": _GSM8K_TASK,
    "evaluate.when": Line("selected"),
    "select_on": Line(
        "validation_loss",
        "The paper chooses on the test questions. To do as it does, write select_on: test and "
        "evaluate.when: all, and remove data.validation; every output is then marked.",
    ),
    "keep_adapters": Line("best"),
}

# What one GPU trains in minutes: the paper's setting but for the lines below.
_SMALL_LINES = _PAPER_LINES | {
    "precision": Line("bfloat16"),
    "data.rows": Line("2048", "The paper: 100,000."),
    "data.too_long": Line("drop"),
    "rank": Line("32", "The paper: 128."),
    "batch_size": Line("[8, 32, 128, 512]", "Four sizes over the range of the paper's figures."),
    "learning_rate": Line("[1e-4, 5e-4, 2e-3]", "`paper` gives the ten of its Appendix E."),
    "seeds": Line("2", "The paper: 3."),
    "evaluate.tasks": Line(
        "[]",
        "The curve is drawn in validation loss. [gsm8k] scores the test set too; models of this "
        "size answer few of its questions.",
    ),
}

_THREE_METHODS = Line(
    "[lora, {name: pissa, niter: 16}, milora]",
    "niter: 16 is PiSSA's fast singular value decomposition; leave it out for the exact one.",
    assumed=True,
)
_ONE_SEED = Line("1", "Section 2: figures 3, 4 and 5 show one seed.")
_ONE_NOISE_SEED = Line("1", "A noise scale has an interval of its own from its rows.")
_PROBES = Line(
    "{every: 10, rows: 32, held_out: 32}",
    "One row in ten of those that train is looked at by itself; batches of fewer than 8 rows pool "
    "32. At the same weights 32 held-out rows are looked at.",
    assumed=True,
)
_SCHEDULES = Line(
    f"""
  - {{kind: cosine, warmup_ratio: 0.0}}
  - {{kind: cosine, warmup_ratio: 0.03}}  # {ASSUMED}
  - {{kind: constant}}""",
    "Appendix C: cosine without and with a warm-up, and no schedule. The ratio is PiSSA's.",
)
_HUMANEVAL = Line(
    "[humaneval]",
    "Appendix G: HumanEval. It runs generated code in a sandbox, which needs Linux with bubblewrap "
    "or user namespaces.",
)
_RANKS = Line("[32, 64, 128, 256]", "Figure 2a: ranks from 32 to 256, here by doubling.", True)
_SIZES = Line(
    "[25000, 50000, 100000, 200000]", "Figure 2b: from 25K to 200K rows, here by doubling.", True
)
_QWEN_WHY = (
    "The paper says Qwen3-0.6B, and this is the hub's model of that name, instruction-tuned; "
    "Qwen/Qwen3-0.6B-Base is the pretrained one."
)
_GEMMA_WHY = (
    "The paper says Gemma3-1B. This is the pretrained model; google/gemma-3-1b-it is the "
    "instruction-tuned one."
)

_FIG1 = "Figure 1: batch size x {LoRA, PiSSA, MiLoRA} at each cell's best learning rate"
_FIG2A = "Figure 2a (unshifted: 6a): batch size x rank"
_FIG2B = "Figure 2b (unshifted: 6b): batch size x number of training rows"
_FIG2C = "Figure 2c (unshifted: 6c): batch size x model size"
_FIG3 = "Figure 3: batch size with the number of updates fixed, so that rows grow with the batch"
_FIG4 = "Figure 4: batch size x {cosine without warm-up, cosine with warm-up, no schedule}"
_FIG5 = "Figure 5: the best learning rate against the batch size"
_FIG7A = "Figure 7a: batch size on Qwen3-0.6B"
_FIG7B = "Figure 7b: batch size on Gemma3-1B"
_FIG7C = "Figure 7c: batch size on code, CodeFeedback to HumanEval"
_PROXY = (
    "Section 4.4: is a batch size that was tuned on a smaller model, at a lower rank and with all "
    "rows, as good on the larger model as one tuned there? This trains both in full, to find out; "
    "`loratune tune` searches on the smaller one alone"
)
_NOISE = (
    "Appendix F: the gradient noise scale over batch sizes and ranks, beside the batch size that "
    "turns out best. `loratune noise-scale` prints it"
)
_ALL_ROWS = Line("null", "null: all rows that the hold-out leaves. Section 4.4: the full data.")
_LOW_AND_HIGH = "The proxy's low rank and the target's; Table 1 has 128."

_LLAMA = (_LLAMA_7B,)
_SMOL = (_SMOL_135M,)
_FIGURES: dict[str, dict[str, Preset]] = {
    "paper": {
        "fig1": Preset(_FIG1, _LLAMA, _METAMATH, {"methods": _THREE_METHODS}),
        "fig2a": Preset(_FIG2A, _LLAMA, _METAMATH, {"rank": _RANKS}),
        "fig2b": Preset(_FIG2B, _LLAMA, _METAMATH, {"data.rows": _SIZES}),
        "fig2c": Preset(_FIG2C, (_LLAMA_7B, _LLAMA_13B), _METAMATH, {}),
        "fig3": Preset(
            _FIG3,
            _LLAMA,
            _METAMATH,
            {
                "protocol": Line(
                    "{kind: fixed_steps, steps: 200}",
                    "Appendix B: 200 updates, so that batch 512 is about one epoch of 100K rows.",
                ),
                "seeds": _ONE_SEED,
            },
        ),
        "fig4": Preset(_FIG4, _LLAMA, _METAMATH, {"schedule": _SCHEDULES, "seeds": _ONE_SEED}),
        "fig5": Preset(_FIG5, _LLAMA, _METAMATH, {"seeds": _ONE_SEED}),
        "fig7a": Preset(_FIG7A, (_QWEN,), _METAMATH, {}, _QWEN_WHY, True),
        "fig7b": Preset(_FIG7B, (_GEMMA,), _METAMATH, {}, _GEMMA_WHY, True),
        "fig7c": Preset(_FIG7C, _LLAMA, _CODEFEEDBACK, {"evaluate.tasks": _HUMANEVAL}),
        "proxy": Preset(
            _PROXY,
            (_LLAMA_7B, _LLAMA_13B),
            _METAMATH,
            {"data.rows": _ALL_ROWS, "rank": Line("[8, 128]", _LOW_AND_HIGH, True)},
        ),
        "noise": Preset(
            _NOISE,
            _LLAMA,
            _METAMATH,
            {"rank": _RANKS, "seeds": _ONE_NOISE_SEED, "noise_scale": _PROBES},
        ),
    },
    "small": {
        "fig1": Preset(_FIG1, _SMOL, _GSM8K, {"methods": Line("[lora, pissa, milora]")}),
        "fig2a": Preset(
            _FIG2A, _SMOL, _GSM8K, {"rank": Line("[8, 32, 128]", "Figure 2a: from 32 to 256.")}
        ),
        "fig2b": Preset(
            _FIG2B,
            _SMOL,
            _GSM8K,
            {"data.rows": Line("[1024, 2048, 4096]", "Figure 2b: from 25K to 200K.")},
        ),
        "fig2c": Preset(
            _FIG2C, (_SMOL_135M, _SMOL_360M), _GSM8K, {}, "Figure 2c: LLaMA-2-7B and 13B."
        ),
        "fig3": Preset(
            _FIG3,
            _SMOL,
            _GSM8K,
            {
                "protocol": Line("{kind: fixed_steps, steps: 32}", "Appendix B: 200 updates."),
                "seeds": _ONE_SEED,
            },
        ),
        "fig4": Preset(_FIG4, _SMOL, _GSM8K, {"schedule": _SCHEDULES, "seeds": _ONE_SEED}),
        "fig5": Preset(
            _FIG5,
            _SMOL,
            _GSM8K,
            {"learning_rate": _PAPER_LINES["learning_rate"], "seeds": _ONE_SEED},
        ),
        "fig7a": Preset(_FIG7A, (_QWEN,), _GSM8K, {}, _QWEN_WHY, True),
        "fig7b": Preset(_FIG7B, (_SMALL_GEMMA,), _GSM8K, {}, "The paper: Gemma3-1B."),
        "fig7c": Preset(
            _FIG7C,
            _SMOL,
            _CODEFEEDBACK,
            {"evaluate.tasks": Line("[]", "The curve is drawn in validation loss.")},
        ),
        "proxy": Preset(
            _PROXY,
            (_SMOL_135M, _SMOL_360M),
            _GSM8K,
            {"data.rows": _ALL_ROWS, "rank": Line("[8, 128]", _LOW_AND_HIGH, True)},
        ),
        "noise": Preset(
            _NOISE,
            _SMOL,
            _GSM8K,
            {
                "rank": Line("[8, 32, 128]"),
                "seeds": _ONE_NOISE_SEED,
                "noise_scale": _PROBES,
            },
        ),
    },
}

# Every line of a published comparison comes from that publication's own setting.
_PUBLISHED_LINES = _PAPER_LINES | {
    "data.template": Line("alpaca"),
    "data.suffix": Line('"\\n"'),
    "data.max_tokens": Line("512"),
    "data.too_long": Line("truncate"),
    "rank": Line("128"),
    "alpha": Line("rank"),
    "targets": Line("[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"),
    "dropout": Line("0.0"),
    "batch_size": Line("128"),
    "seeds": Line("3", assumed=True),
    "optimizer.name": Line("adamw"),
    "optimizer.weight_decay": Line("0.0"),
    "optimizer.max_grad_norm": Line("1.0"),
    "select_on": Line("validation_loss", "With one learning rate there is nothing to choose."),
}

_MILORA_TASK = rf"""
    - name: gsm8k
      grader: pissa
      prompt: "Below is an instruction that describes a task. Write a response that \
        appropriately completes the request.\n\n\
        ### Instruction:\n{{prompt}}\n\n\
        ### Response: Let's think step by step."
      stop: ["Instruction:", "Instruction", "Response:", "Response"]
      max_new_tokens: 1024  # {ASSUMED}"""

_PUBLISHED: dict[str, Preset] = {
    "published-pissa": Preset(
        "PiSSA's own setting (Meng et al. 2024), for LoRA, PiSSA and MiLoRA alike. Together with "
        "published-milora: two published settings, one harness, one grader",
        _LLAMA,
        _METAMATH,
        _PUBLISHED_LINES
        | {
            "data.rows": Line(
                "100000", "The first 100,000; here, the first that the hold-out leaves."
            ),
            "protocol": Line("{kind: fixed_samples, epochs: 1}"),
            "methods": Line(
                "[lora, {name: pissa, niter: 16}, milora]",
                "PiSSA's code: fast singular value decomposition with niter 16.",
            ),
            "learning_rate": Line("[2e-5]"),
            "schedule": Line("{kind: cosine, warmup_ratio: 0.03}"),
            "evaluate.tasks": Line(
                "[{name: gsm8k, grader: pissa, max_new_tokens: 1024}]",
                "Greedy, 1,024 new tokens, no stop string.",
            ),
        },
    ),
    "published-milora": Preset(
        "MiLoRA's own setting (Wang et al. 2025), for LoRA, PiSSA and MiLoRA. Together with "
        "published-pissa: two published settings, one harness, one grader",
        _LLAMA,
        _METAMATH,
        _PUBLISHED_LINES
        | {
            "data.suffix": Line('""'),
            "data.max_tokens": Line("2048"),
            "data.rows": Line("null", "null: all rows, 395,000 less those held out."),
            "protocol": Line("{kind: fixed_samples, epochs: 3}"),
            "methods": Line(
                "[{name: lora, alpha: 128}, pissa, milora]",
                "LoRA was given alpha 128, PiSSA and MiLoRA alpha 64: LoRA at alpha/r = 2, the "
                "others at 1. To compare at one scaling, write lora alone.",
            ),
            "rank": Line("64"),
            "targets": Line("[q_proj, k_proj, v_proj, up_proj, down_proj]"),
            "dropout": Line("0.05"),
            "batch_size": Line("16"),
            "learning_rate": Line("[3e-4]"),
            "schedule": Line("{kind: linear, warmup_steps: 100}"),
            "evaluate.tasks": Line(
                _MILORA_TASK,
                "Greedy; the prompt asks to think step by step, and four strings end an answer.",
            ),
        },
    ),
    "published-peft": Preset(
        "The method comparison in PEFT's repository on MetaMathQA: LoRA, rsLoRA and DoRA at one "
        "batch size, one learning rate and one seed",
        (_LLAMA_3B,),
        _METAMATH,
        _PUBLISHED_LINES
        | {
            "precision": Line("bfloat16"),
            "data.template": Line('"Question: {prompt} Think step by step.\\nAnswer:"'),
            "data.suffix": Line('""'),
            "data.max_tokens": Line("768"),
            "data.too_long": Line(
                "drop",
                "PEFT drops rows of more than 1,300 characters instead. It also lets the prompt's "
                "tokens carry loss; here they carry none.",
                assumed=True,
            ),
            "data.rows": Line("null", "null: all rows that are left."),
            "protocol": Line("{kind: fixed_steps, steps: 5000}"),
            "methods": Line("[lora, {name: rslora, rank: 64}, dora]"),
            "rank": Line("32", "rsLoRA: 64."),
            "alpha": Line("64", "64 for all three."),
            "targets": Line("[q_proj, v_proj]", "PEFT's default for Llama."),
            "batch_size": Line("4"),
            "learning_rate": Line("[1e-4]"),
            "seeds": Line("[0]"),
            "optimizer.weight_decay": Line("0.1"),
            "schedule": Line("{kind: cosine, warmup_ratio: 0.1}", "A tenth of the updates."),
            "evaluate.tasks": Line(
                "[{name: gsm8k, grader: strict, max_new_tokens: 300}]",
                "Graded as all of ours, not as PEFT grades.",
                assumed=True,
            ),
        },
    ),
}


def preset_names() -> tuple[str, ...]:
    """The names of all presets: figures, the proxy and the noise scale, published ones."""
    return (*_FIGURES["paper"], *_PUBLISHED)


def preset_scales(name: str) -> tuple[str, ...]:
    """The scales at which a preset is offered, the default first.

    Raises:
        StudyError: unknown preset.
    """
    if name in _PUBLISHED:
        return ("paper",)
    if name in _FIGURES["paper"]:
        return SCALES
    known = dict.fromkeys(preset_names())
    raise StudyError(f"unknown preset {name!r}{near(name, known)}; known: {', '.join(known)}")


def preset_text(name: str, *, scale: str | None = None) -> str:
    """The commented study file of a preset. `scale` is small or paper; None: the preset's default.

    Raises:
        StudyError: unknown preset, or a scale at which it is not offered.
    """
    scales = preset_scales(name)
    scale = scales[0] if scale is None else scale
    if scale not in scales:
        raise StudyError(f"preset {name!r} has no scale {scale!r}; expected {' or '.join(scales)}")
    if name in _PUBLISHED:
        preset = _PUBLISHED[name]
        return _rendered(preset, name=name, lines=preset.rows.lines | preset.lines)
    preset = _FIGURES[scale][name]
    base = _PAPER_LINES if scale == "paper" else _SMALL_LINES
    lines = base | preset.rows.lines | preset.lines
    return _rendered(preset, name=f"{name}-{scale}", lines=lines)


def _rendered(preset: Preset, *, name: str, lines: dict[str, Line]) -> str:
    model = preset.models[0] if len(preset.models) == 1 else f"[{', '.join(preset.models)}]"
    lines = {
        "study": Line(name),
        "model": Line(model, preset.model_why, preset.model_assumed),
        **lines,
    }
    assert lines.keys() <= _MEANING.keys(), lines.keys() - _MEANING.keys()
    text = [
        *_comment(f"{preset.reproduces}.", indent=0),
        *_comment(
            f"Keys marked * take one value or a list, and lists are crossed. A line marked "
            f'"{ASSUMED}" is not said by the publication.',
            indent=0,
        ),
    ]
    for key, meaning in _MEANING.items():
        if key in _OPTIONAL and key not in lines:
            continue
        if "." not in key:
            text.append("")
        indent = 2 if "." in key else 0
        if key not in lines:  # the heading of a section
            text += [*_comment(meaning, indent=indent), f"{key}:"]
            continue
        line = lines[key]
        mark = f"  # {ASSUMED}" if line.assumed else ""
        text += [*_comment(meaning, indent=indent), *_comment(line.why, indent=indent)]
        value = line.value if line.value.startswith("\n") else f" {line.value}"
        text.append(f"{' ' * indent}{key.rpartition('.')[2]}:{value}{mark}")
    return "\n".join([*text, "", *_declared(preset)]) + "\n"


def _comment(text: str, *, indent: int) -> list[str]:
    mark = " " * indent + "# "
    return textwrap.wrap(
        text, _WIDTH, initial_indent=mark, subsequent_indent=mark, break_on_hyphens=False
    )


def _declared(preset: Preset) -> Iterator[str]:
    """The section that lets `plan` work where neither model nor data can be reached."""
    yield from _comment(
        "Shapes and counts for `loratune plan` where model or data cannot be reached; `run` reads "
        "the real ones.",
        indent=0,
    )
    yield "declared:"
    yield "  models:"
    for model in preset.models:
        yield f"    {model}:"
        shape = _SHAPES[model]
        sliding = ("sliding_window", "num_sliding_layers")
        for field in Shape.__dataclass_fields__:
            if field not in sliding or shape.sliding_window is not None:
                yield f"      {field}: {json.dumps(getattr(shape, field))}"
    yield "  data:"
    yield f"    rows: {preset.rows.num_rows}"
    yield f"    mean_tokens: {preset.rows.mean_tokens}  # {ASSUMED}"
    yield f"    mean_target_tokens: {preset.rows.mean_target_tokens}  # {ASSUMED}"
