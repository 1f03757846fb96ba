"""One adapter at a time, without loratune's engines: what a pack has to beat.

`peft_eager` is what a PEFT user writes: padded batches, labels, torch's AdamW as it comes.
`peft_compiled` is the best single-adapter loop that we know of: rows laid end to end in one
sequence, attention that knows where each begins, compiled blocks, only target tokens through the
head, fused AdamW. Neither clips, schedules or reads the loss back, which would cost time.

Legend: B rows, T tokens of the longest, M tokens end to end, N target tokens, H heads, K key-value
heads, D width of a head, V vocabulary.
"""

import inspect
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from loratune.data.order import row_order
from loratune.data.prepare import PreparedData
from loratune.data.rows import EncodedRows, pad_rows
from loratune.methods.resident import Resident
from loratune.models.load import Base
from measure import Advance
from model_shapes import TARGETS

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # CPU builds of some releases leave it out
    varlen_attn = None

LEARNING_RATE = 1e-5


@contextmanager
def peft_eager(
    base: Base,
    data: PreparedData,
    *,
    batch_size: int,
    rank: int,
    rows_per_microbatch: int,
    method: str = "lora",
) -> Generator[Advance]:
    """`get_peft_model`, its own loss, `torch.optim.AdamW` with its defaults; float32 adapters."""
    with _attached(base, rank=rank, method=method, float32=True) as model:
        optimizer = torch.optim.AdamW(_trained(model), lr=LEARNING_RATE)
        batches = _batches(data.train, batch_size=batch_size)

        def advance() -> tuple[int, int]:
            rows = next(batches)
            for part in _cut(rows, rows_per_microbatch):
                padded = pad_rows(data.train, part, pad_id=0)
                ids_BT, mask_BT, is_target_BT = (
                    torch.from_numpy(array).to(base.device, non_blocking=True) for array in padded
                )
                labels_BT = ids_BT.masked_fill(~is_target_BT, -100)
                loss = model(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT).loss
                (loss * (len(part) / len(rows))).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return len(rows), int(data.train.lengths[rows].sum())

        yield advance


@contextmanager
def peft_compiled(
    base: Base,
    data: PreparedData,
    *,
    batch_size: int,
    rank: int,
    rows_per_microbatch: int,
    float32: bool,
    backend: str = "inductor",
) -> Generator[Advance]:
    """Compiled blocks over rows end to end; adapters in float32 as PEFT makes them, or bfloat16."""
    longest = data.facts.max_row_tokens
    AttentionInterface.register("end_to_end", _attend)
    implementation = base.model.config._attn_implementation
    with _attached(base, rank=rank, method="lora", float32=float32) as model:
        base.model.config._attn_implementation = "end_to_end"
        for layer in base.model.model.layers:
            layer.compile(backend=backend)
        loss_of = torch.compile(_loss_sum, backend=backend)
        optimizer = torch.optim.AdamW(_trained(model), lr=LEARNING_RATE, fused=True)
        batches = _batches(data.train, batch_size=batch_size)
        decoder, head = base.model.model, base.model.lm_head

        def advance() -> tuple[int, int]:
            rows = next(batches)
            num_targets = int(data.train.take(rows).is_target.sum())
            for part in _cut(rows, rows_per_microbatch):
                end_to_end = _EndToEnd(data.train, part, device=base.device)
                hidden_MD = decoder(
                    input_ids=end_to_end.ids_M[None],
                    position_ids=end_to_end.positions_M[None],
                    use_cache=False,
                    cu_seq_lens_q=end_to_end.starts,
                    max_length_q=longest,
                ).last_hidden_state[0]
                total = loss_of(hidden_MD[end_to_end.before_N], end_to_end.targets_N, head.weight)
                (total / num_targets).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return len(rows), int(data.train.lengths[rows].sum())

        try:
            yield advance
        finally:
            base.model.config._attn_implementation = implementation


class _EndToEnd:
    """Rows laid end to end on the device: `starts` are int32[B + 1], `before_N` the positions
    whose output predicts `targets_N`.
    """

    def __init__(self, rows: EncodedRows, indices: np.ndarray, *, device: torch.device) -> None:
        taken = rows.take(indices)
        target_N = np.flatnonzero(taken.is_target)
        positions_M = np.arange(len(taken.input_ids)) - np.repeat(taken.offsets[:-1], taken.lengths)

        def put(array: np.ndarray, dtype: torch.dtype) -> Tensor:
            return torch.from_numpy(array).to(device, dtype, non_blocking=True)

        self.ids_M = put(taken.input_ids, torch.int64)
        self.positions_M = put(positions_M, torch.int64)
        self.starts = put(taken.offsets, torch.int32)
        self.before_N = put(target_N - 1, torch.int64)
        self.targets_N = put(taken.input_ids[target_N], torch.int64)


def _loss_sum(hidden_ND: Tensor, targets_N: Tensor, head_VD: Tensor) -> Tensor:
    logits_NV = functional.linear(hidden_ND, head_VD).float()
    return functional.cross_entropy(logits_NV, targets_N, reduction="sum")


def _varlen_options() -> tuple[dict[str, Any], bool]:
    """How this torch's `varlen_attn` is told to be causal, and whether it repeats key heads."""
    if varlen_attn is None:
        return {}, False
    known = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return causal, "enable_gqa" in known


_CAUSAL, _REPEATS_KEYS = _varlen_options()


def _attend(
    module: torch.nn.Module,
    query_BHMD: Tensor,
    key_BKMD: Tensor,
    value_BKMD: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: causal within each row; the scale is 1/sqrt(D)."""
    if query_BHMD.device.type == "cpu":
        return _attend_on_cpu(query_BHMD, key_BKMD, value_BKMD, cu_seq_lens_q), None
    assert varlen_attn is not None
    query_MHD, key_MKD, value_MKD = (
        part[0].transpose(0, 1) for part in (query_BHMD, key_BKMD, value_BKMD)
    )
    options: dict[str, Any] = dict(_CAUSAL)
    groups = query_MHD.shape[1] // key_MKD.shape[1]
    if groups > 1 and _REPEATS_KEYS:
        options["enable_gqa"] = True
    elif groups > 1:
        key_MKD = key_MKD.repeat_interleave(groups, dim=1)
        value_MKD = value_MKD.repeat_interleave(groups, dim=1)
    out_MHD = varlen_attn(
        query_MHD,
        key_MKD,
        value_MKD,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        **options,
    )
    assert isinstance(out_MHD, Tensor)
    return out_MHD[None], None


def _attend_on_cpu(
    query_BHMD: Tensor, key_BKMD: Tensor, value_BKMD: Tensor, starts: Tensor
) -> Tensor:
    """The same by a mask of M x M, for tests: there is no kernel for it on a CPU."""
    position_M = torch.arange(query_BHMD.shape[2])
    row_M = torch.bucketize(position_M, starts.long(), right=True)
    mask_MM = (row_M[:, None] == row_M[None]) & (position_M[:, None] >= position_M[None])
    out_BHMD = functional.scaled_dot_product_attention(
        query_BHMD, key_BKMD, value_BKMD, attn_mask=mask_MM, enable_gqa=True
    )
    return out_BHMD.transpose(1, 2)


@contextmanager
def _attached(base: Base, *, rank: int, method: str, float32: bool) -> Generator[Any]:
    resident = Resident(base.model)
    config = LoraConfig(
        r=rank,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=list(TARGETS),
        bias="none",
        task_type="CAUSAL_LM",
        use_dora=method == "dora",
    )
    try:
        # float32 adapters are PEFT's default; otherwise they take the base's bfloat16.
        model = get_peft_model(base.model, config, autocast_adapter_dtype=float32)
        model.train()
        yield model
    finally:
        resident.restore()


def _trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _batches(rows: EncodedRows, *, batch_size: int) -> Iterator[np.ndarray]:
    start = 0
    while True:
        yield row_order(0, num_rows=len(rows), start=start, count=batch_size)
        start += batch_size


def _cut(rows: np.ndarray, rows_per_microbatch: int) -> list[np.ndarray]:
    starts = range(0, len(rows), rows_per_microbatch)
    return [rows[start : start + rows_per_microbatch] for start in starts]
