"""Pretrain the demo models: Llama architecture, one shared BPE tokenizer, a synthetic corpus.

    python tools/pretrain_demo_models.py --sizes 12m 28m --out DIR

makes DIR/12m and DIR/28m, folders that load like any Hugging Face folder, and prints the SHA-256 of
each model.safetensors. Seeds and deterministic algorithms are set, so a rebuild with the same
versions on the same kind of device gives the same bytes; on another device or version it gives
another model, which `loratune` notices by the hash. `--record` writes the hashes to sha256.json.

It needs the package's own dependencies only, and `src` beside this folder; a GPU is used if there
is one. Nothing here knows of fine-tuning or of the methods that are compared on these models.
"""

import argparse
import hashlib
import json
import math
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Before torch starts: cuBLAS is deterministic only with a fixed workspace.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from demo_corpus import generate_documents
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 20
VOCABULARY = 1024
SEQUENCE_TOKENS = 128
NUM_DOCUMENTS = 500_000


@dataclass(frozen=True)
class Recipe:
    """The shape of one model and how it is trained."""

    width: int
    layers: int
    heads: int
    feed_forward: int
    peak_lr: float
    num_updates: int


# Peak LRs: smaller for wider models, by rule of thumb; none was tuned.
RECIPES = {
    "1m": Recipe(width=128, layers=4, heads=4, feed_forward=384, peak_lr=4e-3, num_updates=3000),
    "4m": Recipe(width=256, layers=5, heads=4, feed_forward=640, peak_lr=2e-3, num_updates=3000),
    "12m": Recipe(width=384, layers=7, heads=6, feed_forward=896, peak_lr=1.5e-3, num_updates=1800),
    "28m": Recipe(width=512, layers=9, heads=8, feed_forward=1280, peak_lr=1e-3, num_updates=1500),
}


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: a BOS at the start, no EOS; numbers up to 99 are one token."""
    tokenizer = Tokenizer(models.BPE())
    # A word or a number takes the space before it along, as in GPT-2; at most two digits together.
    words = Regex(r" ?[A-Za-z]+| ?[0-9]{1,2}| ?[^\sA-Za-z0-9]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    numbers = [f"{n} {n}" for n in range(100) for _ in range(200)]
    tokenizer.train_from_iterator([*documents[:50_000], *numbers], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def pack_documents(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All documents end to end, each between BOS and EOS, cut into [num_sequences, tokens]."""
    eos = tokenizer.eos_token_id
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(documents):
        ids.extend(encoding.ids)
        ids.append(eos)
    num_sequences = len(ids) // SEQUENCE_TOKENS
    return torch.tensor(ids[: num_sequences * SEQUENCE_TOKENS]).view(num_sequences, -1)


def pretrain(
    recipe: Recipe,
    *,
    tokenizer: PreTrainedTokenizerFast,
    sequences_ST: Tensor,
    batch_size: int,
    device: str,
) -> LlamaForCausalLM:
    """Train with AdamW, warm-up, cosine to a tenth; float32 weights, bfloat16 products on CUDA."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            intermediate_size=recipe.feed_forward,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="sdpa",
        )
    ).to(device)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.peak_lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    sequences_ST = sequences_ST.to(device)
    generator = torch.Generator().manual_seed(SEED)
    order = torch.empty(0, dtype=torch.long)
    warmup = max(1, min(100, recipe.num_updates // 10))
    started = time.perf_counter()
    for update in range(recipe.num_updates):
        if len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(sequences_ST), generator=generator)])
        rows, order = order[:batch_size].to(device), order[batch_size:]
        tokens_BT = sequences_ST[rows]
        progress = (update - warmup) / max(1, recipe.num_updates - warmup)
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * max(0.0, progress)))
        for group in optimizer.param_groups:
            group["lr"] = recipe.peak_lr * min((update + 1) / warmup, cosine)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
        loss = functional.cross_entropy(
            logits_BTV[:, :-1].float().flatten(0, 1), tokens_BT[:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if update % 200 == 0 or update + 1 == recipe.num_updates:
            seconds = time.perf_counter() - started
            print(f"  update {update:5d}  loss {loss.item():.4f}  {seconds:6.1f} s", flush=True)
    return model


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=sorted(RECIPES), default=["12m", "28m"])
    parser.add_argument("--out", type=Path, required=True, help="a folder; made if absent")
    parser.add_argument("--record", type=Path, help="a JSON file to which the SHA-256s are added")
    parser.add_argument("--batch-size", type=int, default=128, help="sequences per update")
    parser.add_argument("--num-updates", type=int, help="for a trial: fewer than the recipe's")
    parser.add_argument("--num-documents", type=int, default=NUM_DOCUMENTS, help="for a trial")
    arguments = parser.parse_args()

    torch.use_deterministic_algorithms(True)
    # No operation here reads memory that it did not write; filling it first would only cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False
    random.seed(SEED)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.perf_counter()
    documents = generate_documents(arguments.num_documents, seed=SEED)
    tokenizer = train_tokenizer(documents)
    sequences_ST = pack_documents(documents, tokenizer)
    print(
        f"{len(documents)} documents, {sequences_ST.numel()} tokens, vocabulary {len(tokenizer)}, "
        f"{time.perf_counter() - started:.0f} s",
        flush=True,
    )
    hashes: dict[str, str] = {}
    for size in arguments.sizes:
        recipe = RECIPES[size]
        if arguments.num_updates is not None:
            recipe = Recipe(**{**vars(recipe), "num_updates": arguments.num_updates})
        print(f"{size}: {recipe}", flush=True)
        model = pretrain(
            recipe,
            tokenizer=tokenizer,
            sequences_ST=sequences_ST,
            batch_size=arguments.batch_size,
            device=device,
        )
        folder = arguments.out / size
        model.to(device="cpu", dtype=torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        hashes[size] = sha256_of(folder / "model.safetensors")
        count = sum(p.numel() for p in model.parameters())
        print(f"{size}: {count} parameters, {folder}, sha256 {hashes[size]}", flush=True)
    if arguments.record is not None:
        known = json.loads(arguments.record.read_text()) if arguments.record.exists() else {}
        arguments.record.write_text(json.dumps({**known, **hashes}, indent=2) + "\n")


if __name__ == "__main__":
    main()
