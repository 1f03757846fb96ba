"""Does the batch size matter on `demo:task`? Plain LoRA over a grid of batch sizes and LRs.

    python tools/check_demo_task.py --model demo:4m --rows 2000 --batch-sizes 1 4 16 64 256 \
        --lrs 1e-3 2e-3 5e-3 --out table.json

Trains one rank-8 adapter (alpha 16, every linear layer, AdamW, cosine to zero, no warm-up, one
epoch) for each batch size, LR and seed, in float32, and prints held-out loss (token mean over the
answers of the test split) and greedy accuracy. It is the proof of what docs/demo-models.md claims,
written with PEFT and torch alone: none of loratune's engine is used, so that the two can be
compared. Other LoRA methods are deliberately absent, since the task must not be chosen by them.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from loratune.data.demo_task import DEFAULT_SEED, PROMPT, generate_rows
from loratune.models.demo import resolve_demo_model

RANK, ALPHA = 8, 16


@dataclass(frozen=True)
class Row:
    prompt_ids: list[int]
    target_ids: list[int]
    result: str


@dataclass(frozen=True)
class Point:
    model: str
    num_rows: int
    num_test_rows: int
    batch_size: int
    learning_rate: float
    seed: int
    num_updates: int
    loss: float
    accuracy: float
    seconds: float


def encode(rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """BOS and prompt; then the answer and EOS, on which alone the loss falls."""
    encoded: list[Row] = []
    for row in rows:
        prompt_ids = tokenizer(PROMPT.format(question=row["question"])).input_ids
        answer_ids = tokenizer(row["answer"], add_special_tokens=False).input_ids
        result = row["answer"].rsplit("The answer is: ", 1)[1]
        encoded.append(Row(prompt_ids, [*answer_ids, tokenizer.eos_token_id], result))
    return encoded


def collate(rows: list[Row], *, pad_id: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded input ids [B, T], attention mask [B, T], labels [B, T] with -100 off target."""
    length = max(len(r.prompt_ids) + len(r.target_ids) for r in rows)
    ids_BT = torch.full((len(rows), length), pad_id)
    mask_BT = torch.zeros((len(rows), length), dtype=torch.long)
    labels_BT = torch.full((len(rows), length), -100)
    for i, row in enumerate(rows):
        prompt, end = len(row.prompt_ids), len(row.prompt_ids) + len(row.target_ids)
        ids_BT[i, :end] = torch.tensor(row.prompt_ids + row.target_ids)
        mask_BT[i, :end] = 1
        labels_BT[i, prompt:end] = ids_BT[i, prompt:end]
    return ids_BT.to(device), mask_BT.to(device), labels_BT.to(device)


def loss_sum(model: torch.nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Sum of the target tokens' losses, and how many there are."""
    ids_BT, mask_BT, labels_BT = batch
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    targets_M = labels_BT[:, 1:].flatten()
    logits_MV = logits_BTV[:, :-1].float().flatten(0, 1)
    total = functional.cross_entropy(logits_MV, targets_M, ignore_index=-100, reduction="sum")
    return total, (targets_M != -100).sum()


@torch.no_grad()
def accuracy(
    model: torch.nn.Module, rows: list[Row], tokenizer: PreTrainedTokenizerBase, *, device: str
) -> float:
    """The share of rows whose greedy answer has, after its last "The answer is: ", the result."""
    length = max(len(r.prompt_ids) for r in rows)
    pad_id = tokenizer.pad_token_id
    ids = [[pad_id] * (length - len(r.prompt_ids)) + r.prompt_ids for r in rows]
    mask = [[0] * (length - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in rows]
    out = model.generate(
        input_ids=torch.tensor(ids, device=device),
        attention_mask=torch.tensor(mask, device=device),
        max_new_tokens=40,
        do_sample=False,
        pad_token_id=pad_id,
    )
    correct = 0
    for row, generated in zip(rows, out[:, length:].tolist(), strict=True):
        text = tokenizer.decode(generated, skip_special_tokens=True)
        match = re.match(r"[0-9]+", text.rsplit("The answer is: ", 1)[-1])
        correct += "The answer is: " in text and match is not None and match[0] == row.result
    return correct / len(rows)


def measure(
    folder: str,
    *,
    model_name: str,
    num_rows: int,
    num_test_rows: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    device: str,
) -> Point:
    """Train and score one adapter; batch size 0 scores the model as it is."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0, bias="none"
    )
    model = get_peft_model(model, config).to(device)
    train = encode(generate_rows(num_rows, seed=DEFAULT_SEED), tokenizer)
    test = encode(generate_rows(num_test_rows, seed=DEFAULT_SEED, split="test"), tokenizer)
    order = list(range(num_rows))
    random.Random(seed).shuffle(order)
    num_updates = math.ceil(num_rows / batch_size) if batch_size else 0
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    started = time.perf_counter()
    for update in range(num_updates):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * update / num_updates))
        rows = [train[i] for i in order[update * batch_size : (update + 1) * batch_size]]
        total, count = loss_sum(model, collate(rows, pad_id=tokenizer.pad_token_id, device=device))
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    model.eval()
    with torch.no_grad():
        total, count = loss_sum(model, collate(test, pad_id=tokenizer.pad_token_id, device=device))
    return Point(
        model=model_name,
        num_rows=num_rows,
        num_test_rows=num_test_rows,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        num_updates=num_updates,
        loss=(total / count).item(),
        accuracy=accuracy(model, test, tokenizer, device=device),
        seconds=seconds,
    )


def table(points: list[Point]) -> str:
    """Mean loss and accuracy over the seeds; a star at each batch size's smallest loss."""
    lrs = sorted({p.learning_rate for p in points if p.batch_size})
    lines = ["batch size | " + " | ".join(f"LR {lr:g}" for lr in lrs)]
    lines.append("|".join(["---"] * (len(lrs) + 1)))
    for batch_size in sorted({p.batch_size for p in points if p.batch_size}):
        cells: dict[float, tuple[float, float]] = {}
        for lr in lrs:
            group = [p for p in points if p.batch_size == batch_size and p.learning_rate == lr]
            if group:
                loss = sum(p.loss for p in group) / len(group)
                cells[lr] = (loss, sum(p.accuracy for p in group) / len(group))
        best = min(cells, key=lambda lr: cells[lr][0] if math.isfinite(cells[lr][0]) else math.inf)
        texts = [
            f"{cells[lr][0]:.4f}, {cells[lr][1]:.3f}" + (" *" if lr == best else "")
            if lr in cells
            else ""
            for lr in lrs
        ]
        lines.append(f"{batch_size} | " + " | ".join(texts))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo:1m", help="demo:1m, demo:4m, ... or a folder")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--test-rows", type=int, default=256)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 2e-3, 5e-3, 1e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="processes, one CPU thread each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="a JSON file, rewritten after every trial")
    arguments = parser.parse_args()

    folder = arguments.model
    if folder.startswith("demo:"):
        folder = str(resolve_demo_model(folder).folder)
    # Longest first, so that the processes end together.
    grid = [(0, 0.0, arguments.seeds[0])] + [
        (batch_size, lr, seed)
        for batch_size in sorted(arguments.batch_sizes)
        for lr in arguments.lrs
        for seed in arguments.seeds
    ]
    points: list[Point] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        futures = [
            pool.submit(
                measure,
                folder,
                model_name=arguments.model,
                num_rows=arguments.rows,
                num_test_rows=arguments.test_rows,
                batch_size=batch_size,
                learning_rate=lr,
                seed=seed,
                device=arguments.device,
            )
            for batch_size, lr, seed in grid
        ]
        for future in as_completed(futures):
            point = future.result()
            points.append(point)
            print(
                f"batch {point.batch_size:4d}  LR {point.learning_rate:<7g} seed {point.seed}  "
                f"loss {point.loss:.4f}  accuracy {point.accuracy:.3f}  {point.seconds:.1f} s",
                flush=True,
            )
            if arguments.out is not None:
                arguments.out.write_text(json.dumps([asdict(p) for p in points], indent=1) + "\n")
    print(f"\n{arguments.model}, {arguments.rows} rows; loss, accuracy\n{table(points)}")


if __name__ == "__main__":
    main()
