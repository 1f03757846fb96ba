"""Many adapters at once against transformers' own generate, one adapter after another."""

import gc
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from loratune.engine import decoding as decoding_module
from loratune.engine.decoding import (
    Answered,
    ContinuationRequest,
    ContinuationScore,
    Decoder,
    Request,
)
from loratune.engine.decoding_choice import Sampling
from loratune.engine.decoding_model import DecodingModel
from loratune.errors import CapacityError, EvaluationError
from loratune.evaluation.generate import generate_answers
from loratune.methods import attach_files
from loratune.methods.adapter_files import AdapterFiles
from loratune.models.load import Base
from tiny_adapters import METHODS, mixed_adapters, tiny_adapter
from tiny_models import EOS_ID, MAX_POSITIONS, VOCAB_SIZE
from tiny_trials import tiny_base

ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FAMILIES = ("llama", "qwen3", "gemma3")


def random_prompts(count: int, *, seed: int = 0, longest: int = 24) -> list[list[int]]:
    """Prompts of 1 to `longest` tokens: more and less than Gemma's window of 8."""
    generator = np.random.default_rng(seed)
    return [
        generator.integers(4, VOCAB_SIZE, size=generator.integers(1, longest + 1)).tolist()
        for _ in range(count)
    ]


def asked(
    keys: Iterable[str], prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 12, **more: Any
) -> list[Request]:
    """Every prompt for every adapter."""
    return [Request(key, ids, max_new_tokens, **more) for key in keys for ids in prompts]


def answered(decoder: Decoder, requests: Sequence[Request]) -> list[Answered]:
    """All answers in the order of their requests, each once."""
    found = list(decoder.answers(requests))
    assert sorted(one.index for one in found) == list(range(len(requests)))
    return sorted(found, key=lambda one: one.index)


def tokens_of(answers: Iterable[Answered]) -> list[tuple[int, ...]]:
    return [one.token_ids for one in answers]


def generated(
    base: Base,
    adapter: AdapterFiles | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 12,
) -> list[tuple[int, ...]]:
    """What transformers' generate gives for one adapter through PEFT, EOS included."""
    attached = None if adapter is None else attach_files(base.model, adapter)
    width = max(len(ids) for ids in prompts)
    try:
        generate: Any = base.model.generate
        ids = torch.tensor([[0] * (width - len(ids)) + [*ids] for ids in prompts])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
        output = generate(
            ids.to(base.device),
            attention_mask=mask.to(base.device),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=EOS_ID,
                pad_token_id=0,
            ),
        )
    finally:
        if attached is not None:
            attached.detach()
    rows: list[list[int]] = output[:, width:].tolist()
    return [tuple(row[: row.index(EOS_ID) + 1] if EOS_ID in row else row) for row in rows]


def expected(
    base: Base, adapters: Mapping[str, AdapterFiles | None], prompts: Sequence[Sequence[int]]
) -> list[tuple[int, ...]]:
    return [row for one in adapters.values() for row in generated(base, one, prompts)]


# The same tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_every_method_are_those_of_generate_one_adapter_at_a_time(family: str):
    base = tiny_base(family)
    adapters, prompts = mixed_adapters(base.model), random_prompts(6)
    decoder = Decoder(base, adapters, num_slots=16)
    found = tokens_of(answered(decoder, asked(adapters, prompts)))
    assert found == expected(base, adapters, prompts)
    # The adapters do say different things.
    by_adapter = {tuple(found[begin : begin + 6]) for begin in range(0, len(found), 6)}
    assert len(by_adapter) == len(adapters)


@pytest.mark.parametrize("family", ["smollm", "qwen2", "mistral", "phi3", "olmo2"])
def test_greedy_tokens_of_the_other_families_are_those_of_generate(family: str):
    base = tiny_base(family)
    adapters = {
        method: tiny_adapter(base.model, method, seed=seed)
        for seed, method in enumerate(("lora", "dora", "pissa"))
    }
    prompts = random_prompts(5, seed=1)
    decoder = Decoder(base, adapters, num_slots=4)
    found = tokens_of(answered(decoder, asked(adapters, prompts)))
    assert found == expected(base, adapters, prompts)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_64_prompts_of_8_adapters_give_the_tokens_of_generate(family: str, method: str):
    base = tiny_base(family)
    adapters = {
        f"{method}-{seed}": tiny_adapter(
            base.model, method, seed=seed, rank=1 + seed % 4, alpha=2.0 + seed
        )
        for seed in range(8)
    }
    prompts = random_prompts(64, seed=2)
    decoder = Decoder(base, adapters, num_slots=48)
    found = tokens_of(answered(decoder, asked(adapters, prompts, max_new_tokens=24)))
    wanted = [
        row for one in adapters.values() for row in generated(base, one, prompts, max_new_tokens=24)
    ]
    assert found == wanted


def test_adapters_that_adapt_different_layers_share_a_decoder():
    base = tiny_base()
    adapters = {
        "query": tiny_adapter(base.model, "lora", targets=("q_proj",), seed=1),
        "query and value": tiny_adapter(base.model, "dora", targets=("q_proj", "v_proj"), seed=2),
        "mlp": tiny_adapter(base.model, "pissa", targets=("gate_proj", "up_proj"), seed=3),
    }
    prompts = random_prompts(6, seed=3)
    found = tokens_of(answered(Decoder(base, adapters), asked(adapters, prompts)))
    assert found == expected(base, adapters, prompts)


def test_adapters_answer_from_folders_as_from_memory(tmp_path: Path):
    base = tiny_base()
    adapters = {name: tiny_adapter(base.model, name) for name in ("lora", "rslora")}
    for name, files in adapters.items():
        files.save(tmp_path / name)
    folders = {name: tmp_path / name for name in adapters}
    requests = asked(adapters, random_prompts(4))
    from_memory = answered(Decoder(base, adapters), requests)
    assert answered(Decoder(base, folders), requests) == from_memory


# Texts and ends -----------------------------------------------------------------------------------


def test_answers_end_where_those_of_generate_do():
    base = tiny_base("qwen3")
    adapters = {name: tiny_adapter(base.model, name, seed=4) for name in ("lora", "pissa")}
    prompts = random_prompts(24, seed=5)
    stops = [("a", "b?"), ("xy",), (), ("\n", " "), ("e", "t", "o")]
    requests = list[Request]()
    wanted = list[Any]()
    for key, files in adapters.items():
        for number, stop in enumerate(stops):
            chosen = prompts[4 * number : 4 * number + 5]
            end_ids = tuple(range(10, 10 + 3 * number))
            settings: dict[str, Any] = {"max_new_tokens": 9 + number, "stop": stop}
            requests += [Request(key, ids, end_ids=end_ids, **settings) for ids in chosen]
            attached = attach_files(base.model, files)
            wanted += generate_answers(base, chosen, end_ids=end_ids, **settings)
            attached.detach()
    for behind in (0, 1):
        decoder = Decoder(base, adapters, num_slots=7, steps_behind=behind)
        found = [one.answer for one in answered(decoder, requests)]
        assert found == wanted
    assert {one.finished for one in wanted} == {True, False}
    # By stop strings as well as by end tokens.
    plain = tokens_of(
        answered(Decoder(base, adapters), [replace(one, stop=()) for one in requests])
    )
    assert any(len(ids) > one.num_tokens for ids, one in zip(plain, wanted, strict=True))


# Neighbours ---------------------------------------------------------------------------------------


def sampling_requests(keys: Sequence[str], *, count: int) -> list[Request]:
    """Greedy rows, and rows that sample at two temperatures, of different lengths."""
    return [
        Request(
            keys[index % len(keys)],
            ids,
            max_new_tokens=1 + index % 11,
            sampling=None
            if index % 3 == 0
            else Sampling(temperature=0.5 + index % 3, top_p=1.0 - 0.3 * (index % 2), seed=index),
        )
        for index, ids in enumerate(random_prompts(count, seed=6))
    ]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_answers_do_not_depend_on_neighbours_order_slots_or_seats(family: str):
    base = tiny_base(family)
    adapters = mixed_adapters(base.model)
    requests = sampling_requests(list(adapters), count=27)
    reference = answered(Decoder(base, adapters, num_slots=1), requests)
    for settings in (
        {"num_slots": 5, "num_seats": 1},
        {"num_slots": 13, "num_seats": 2, "tokens_per_prefill": 24, "steps_behind": 2},
        {"num_slots": 64, "steps_behind": 1},
    ):
        found = answered(Decoder(base, adapters, **settings), requests)
        assert tokens_of(found) == tokens_of(reference), settings
    backwards = answered(Decoder(base, adapters, num_slots=8), requests[::-1])
    assert tokens_of(backwards[::-1]) == tokens_of(reference)
    # Alone, with only its own adapter given: other ranks, no magnitudes of others.
    for index in (5, 8):
        one = requests[index]
        alone = Decoder(base, {one.adapter: adapters[one.adapter]})
        assert tokens_of(alone.answers([one])) == [reference[index].token_ids]


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    base = tiny_base()
    adapters = {"lora": tiny_adapter(base.model, "lora")}
    ids = random_prompts(1)[0]

    def texts(seeds: Sequence[int]) -> list[str]:
        requests = [
            Request("lora", ids, 20, sampling=Sampling(temperature=2.0, seed=seed))
            for seed in seeds
        ]
        return [one.answer.text for one in answered(Decoder(base, adapters), requests)]

    first = texts([0, 1, 2, 3])
    assert len(set(first)) == 4
    assert texts([3, 0, 0]) == [first[3], first[0], first[0]]


def test_a_cold_temperature_gives_the_greedy_tokens():
    base = tiny_base()
    adapters = {"lora": tiny_adapter(base.model, "lora")}
    prompts = random_prompts(6)
    greedy = answered(Decoder(base, adapters), asked(adapters, prompts))
    cold = asked(adapters, prompts, sampling=Sampling(temperature=1e-4, seed=1))
    assert tokens_of(answered(Decoder(base, adapters), cold)) == tokens_of(greedy)


# Slots --------------------------------------------------------------------------------------------


def test_a_finished_rows_place_is_taken_by_the_next_request_at_once(
    monkeypatch: pytest.MonkeyPatch,
):
    base = tiny_base()
    sizes = list[int]()
    step = DecodingModel.step

    def noted(model: DecodingModel, slots: Any, counts: Any, **more: Any) -> Any:
        assert len(set(slots.tolist())) == len(slots)
        sizes.append(len(slots))
        return step(model, slots, counts, **more)

    monkeypatch.setattr(DecodingModel, "step", noted)
    limits = [2, 9, 3, 5, 4, 7, 2, 1, 8, 3, 6]
    requests = [Request("plain", [5, 6, 7 + at], limit) for at, limit in enumerate(limits)]
    found = answered(Decoder(base, {"plain": None}, num_slots=4), requests)
    # None of these answers ends by itself.
    assert [one.answer.num_tokens for one in found] == limits
    assert sizes == steps_by_hand(limits, num_slots=4)


def steps_by_hand(limits: Sequence[int], *, num_slots: int) -> list[int]:
    """Rows of each step: a prompt gives the first token of an answer, each step one more."""
    waiting, active, sizes = list(limits), list[int](), list[int]()
    while waiting or active:
        while waiting and len(active) < num_slots:
            active += [left - 1 for left in [waiting.pop(0)] if left > 1]
        if active:
            sizes.append(len(active))
        active = [left - 1 for left in active if left > 1]
    return sizes


def test_running_out_of_memory_halves_the_slots_and_repeats_no_answer(
    monkeypatch: pytest.MonkeyPatch,
):
    base = tiny_base()
    adapters = {name: tiny_adapter(base.model, name) for name in ("lora", "dora")}
    requests = sampling_requests(list(adapters), count=20)
    wanted = tokens_of(answered(Decoder(base, adapters, num_slots=4), requests))
    step = DecodingModel.step
    num_steps = 0

    def greedy_for_memory(model: DecodingModel, slots: Any, *rest: Any, **more: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        # Not at once: some answers are there already.
        if num_steps > 3 and model._size.num_slots > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(model, slots, *rest, **more)

    monkeypatch.setattr(DecodingModel, "step", greedy_for_memory)
    decoder = Decoder(base, adapters, num_slots=8)
    assert tokens_of(answered(decoder, requests)) == wanted
    assert decoder.num_slots == 2


def test_where_not_even_one_row_fits_it_says_so(monkeypatch: pytest.MonkeyPatch):
    def no_memory(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 1 GiB")

    monkeypatch.setattr(DecodingModel, "begin", no_memory)
    monkeypatch.setattr(DecodingModel, "score", no_memory)
    decoder = Decoder(tiny_base(), {"plain": None}, num_slots=1, tokens_per_prefill=2)
    with pytest.raises(CapacityError, match=r"not even one row .*CUDA out of memory\.\)"):
        list(decoder.answers([Request("plain", [5], 3)]))
    with pytest.raises(CapacityError, match="not even one row fits"):
        list(decoder.log_likelihoods([ContinuationRequest("plain", [5], [6])]))


def test_answers_reach_up_to_the_last_position_and_no_further():
    base = tiny_base()
    ids = [5 + at % 90 for at in range(MAX_POSITIONS - 3)]
    decoder = Decoder(base, {"plain": None})
    (found,) = decoder.answers([Request("plain", ids, 3)])
    assert found.token_ids == generated(base, None, [ids], max_new_tokens=3)[0]
    with pytest.raises(EvaluationError, match=r"512 positions; .* at most 3"):
        list(decoder.answers([Request("plain", [5], 2), Request("plain", ids, 4)]))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("other", [5], 3), "'other', which is not among the 1"),
        (Request("plain", [], 3), "a prompt without a token"),
        (Request("plain", [5], 0), "give at least 1"),
        (Request("plain", list(range(5, 100)) * 6, 1), "exceeds the model's 512 positions"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_before_anything_runs(
    request_: Request, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(decoding_module, "installed_decoder", None)
    decoder = Decoder(tiny_base(), {"plain": None})
    with pytest.raises(EvaluationError, match=message):
        list(decoder.answers([Request("plain", [5], 3), request_]))


def test_no_request_gets_no_answer():
    assert list(Decoder(tiny_base(), {"plain": None}).answers([])) == []


# The base -----------------------------------------------------------------------------------------


def state_of(base: Base) -> tuple[Any, ...]:
    modules = [type(module) for module in base.model.modules()]
    names = [sorted(vars(module)) for module in base.model.modules()]
    logits = base.model(input_ids=torch.arange(4, 24)[None]).logits
    return modules, names, base.model.config._attn_implementation, logits


@pytest.mark.parametrize("num_read", [1, None])
def test_the_base_is_as_it_was_when_answers_end_or_are_closed(num_read: int | None):
    base = tiny_base()
    adapters = {name: tiny_adapter(base.model, name) for name in ("lora", "dora")}
    with torch.no_grad():
        before = state_of(base)
        running = Decoder(base, adapters, num_slots=2).answers(asked(adapters, [[5, 6], [7]]))
        for _ in range(num_read or 4):
            next(running)
        running.close()
        assert inspect.getgeneratorstate(running) == inspect.GEN_CLOSED
        after = state_of(base)
    assert after[:3] == before[:3]
    assert torch.equal(after[3], before[3])
    gc.collect()
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


# Log-likelihoods ----------------------------------------------------------------------------------


def in_order(decoder: Decoder, questions: Sequence[ContinuationRequest]) -> list[ContinuationScore]:
    """Each once, in the order of the questions."""
    told = list(decoder.log_likelihoods(questions))
    assert sorted(index for index, _ in told) == list(range(len(questions)))
    return [score for _, score in sorted(told, key=lambda one: one[0])]


@pytest.mark.parametrize("family", FAMILIES)
def test_log_likelihoods_are_those_of_a_plain_forward(family: str):
    base = tiny_base(family)
    adapters = mixed_adapters(base.model)
    generator = np.random.default_rng(7)
    questions = list[ContinuationRequest]()
    for number, context in enumerate(random_prompts(20, seed=8)):
        more = generator.integers(4, VOCAB_SIZE, size=1 + number % 6).tolist()
        questions.append(ContinuationRequest(list(adapters)[number % 9], context, more))
    # What is likeliest is asked for too, or no continuation would ever be greedy.
    for key in ("plain", "dora", "pissa"):
        said = generated(base, adapters[key], [[9, 8, 7]], max_new_tokens=4)[0]
        questions.append(ContinuationRequest(key, [9, 8, 7], said))
        questions.append(ContinuationRequest(key, [9, 8, 7], (*said[:-1], (said[-1] + 1) % 100)))
    decoder = Decoder(base, adapters, num_seats=4, tokens_per_prefill=60)
    found = in_order(decoder, questions)
    for one, score in zip(questions, found, strict=True):
        files = adapters[one.adapter]
        attached = None if files is None else attach_files(base.model, files)
        ids = torch.tensor([[*one.context_ids, *one.continuation_ids]])
        with torch.no_grad():
            logits_TV = base.model(ids).logits[0, len(one.context_ids) - 1 : -1]
        if attached is not None:
            attached.detach()
        labels = torch.tensor(one.continuation_ids)
        value = logits_TV.double().log_softmax(-1).gather(1, labels[:, None]).sum()
        # float32 logits of about 10 nats, up to six of them: rounding is about 1e-6 each.
        assert score.value == pytest.approx(float(value), abs=1e-5, rel=1e-5)
        assert score.num_tokens == len(one.continuation_ids)
        assert score.is_greedy == bool((logits_TV.argmax(-1) == labels).all())
    assert {score.is_greedy for score in found} == {True, False}


def test_log_likelihoods_go_on_in_smaller_batches_when_memory_runs_out(
    monkeypatch: pytest.MonkeyPatch,
):
    base = tiny_base()
    questions = [ContinuationRequest("plain", [5, 6, at], [7, 8]) for at in range(10, 30)]
    wanted = in_order(Decoder(base, {"plain": None}), questions)
    score = DecodingModel.score

    def greedy_for_memory(model: DecodingModel, rows: Any, seats: Any) -> Any:
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return score(model, rows, seats)

    monkeypatch.setattr(DecodingModel, "score", greedy_for_memory)
    found = in_order(Decoder(base, {"plain": None}, tokens_per_prefill=32), questions)
    assert [one.value for one in found] == pytest.approx([one.value for one in wanted], abs=1e-5)
    assert in_order(Decoder(base, {"plain": None}), []) == []


# On CUDA ------------------------------------------------------------------------------------------


def cuda_base(family: str, dtype: torch.dtype) -> Base:
    base = tiny_base(family)
    base.model.to(device="cuda", dtype=dtype)  # pyright: ignore
    return replace(base, device=torch.device("cuda"))


@pytest.mark.gpu
@ON_CUDA
@pytest.mark.parametrize("family", FAMILIES)
def test_on_cuda_greedy_tokens_in_float32_are_those_of_generate(family: str):
    base = cuda_base(family, torch.float32)
    adapters = mixed_adapters(tiny_base(family).model)
    prompts = random_prompts(16)
    for num_slots in (1, 5, 40, 200):
        decoder = Decoder(base, adapters, num_slots=num_slots)
        found = tokens_of(answered(decoder, asked(adapters, prompts)))
        wanted = expected(base, adapters, prompts)
        # Orders of sums differ: of 144 answers, a near tie may turn one.
        assert sum(a != b for a, b in zip(found, wanted, strict=True)) <= 1


@pytest.mark.gpu
@ON_CUDA
@pytest.mark.parametrize("family", FAMILIES)
def test_on_cuda_answers_do_not_depend_on_neighbours_or_slots(family: str):
    base = cuda_base(family, torch.float32)
    adapters = mixed_adapters(tiny_base(family).model)
    requests = sampling_requests(list(adapters), count=60)
    reference = tokens_of(answered(Decoder(base, adapters, num_slots=4), requests))
    for settings in ({"num_slots": 40, "num_seats": 2}, {"num_slots": 64, "steps_behind": 0}):
        found = tokens_of(answered(Decoder(base, adapters, **settings), requests))
        assert sum(a != b for a, b in zip(found, reference, strict=True)) <= 1


@pytest.mark.gpu
@ON_CUDA
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_cuda_16_bits_answer_mostly_as_generate_does(dtype: torch.dtype):
    base = cuda_base("llama", dtype)
    adapters = {
        name: tiny_adapter(tiny_base().model, name, seed=seed)
        for seed, name in enumerate(("lora", "rslora", "dora"))
    }
    prompts = random_prompts(32)
    found = tokens_of(answered(Decoder(base, adapters), asked(adapters, prompts)))
    wanted = expected(base, adapters, prompts)
    # The first token has no history that may have turned: rounding alone is between them.
    same = sum(a[0] == b[0] for a, b in zip(found, wanted, strict=True))
    assert same >= 0.85 * len(wanted)


@pytest.mark.gpu
@ON_CUDA
def test_on_cuda_log_likelihoods_are_those_of_the_cpu():
    adapters = mixed_adapters(tiny_base().model)
    questions = [
        ContinuationRequest(key, ids[:-1], ids[-1:])
        for key in adapters
        for ids in random_prompts(8, seed=9)
        if len(ids) > 1
    ]
    on_cpu = in_order(Decoder(tiny_base(), adapters), questions)
    on_cuda = in_order(Decoder(cuda_base("llama", torch.float32), adapters), questions)
    for a, b in zip(on_cpu, on_cuda, strict=True):
        assert b.value == pytest.approx(a.value, abs=1e-4)
