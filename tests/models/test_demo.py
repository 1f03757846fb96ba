"""The demo models: found, named clearly when absent, and loadable like any Hugging Face folder."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loratune.data.demo_task import PROMPT, generate_rows
from loratune.errors import ModelError
from loratune.models.demo import (
    DEMO_MODELS,
    demo_models_folder,
    recorded_hashes,
    resolve_demo_model,
)


@pytest.mark.parametrize("name", ["demo:1m", "demo:4m"])
def test_shipped_models_are_the_recorded_ones(name: str):
    model = resolve_demo_model(name, environment={})
    assert model.matches_recorded_hash
    weights = (model.folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == model.sha256


def test_every_demo_model_has_a_recorded_hash():
    assert {f"demo:{size}" for size in recorded_hashes()} == set(DEMO_MODELS)
    assert all(len(digest) == 64 for digest in recorded_hashes().values())


def test_shipped_files_are_at_most_12_megabytes():
    folders = [resolve_demo_model(name).folder for name in ("demo:1m", "demo:4m")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert 0 < sum(path.stat().st_size for path in files) <= 12_000_000


@pytest.mark.parametrize(("name", "millions"), [("demo:1m", 1.0), ("demo:4m", 4.0)])
def test_they_load_like_any_folder_and_have_about_the_size_of_their_name(
    name: str, millions: float
):
    model = AutoModelForCausalLM.from_pretrained(resolve_demo_model(name).folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    count = sum(p.numel() for p in model.parameters())
    assert 0.85 * millions < count / 1e6 < 1.15 * millions
    head = model.get_output_embeddings()
    assert head is not None
    assert model.get_input_embeddings().weight is head.weight


def test_the_models_share_one_tokenizer():
    texts = [resolve_demo_model(n).folder / "tokenizer.json" for n in ("demo:1m", "demo:4m")]
    assert texts[0].read_bytes() == texts[1].read_bytes()


def test_the_tokenizer_adds_a_start_token_and_no_end_token_and_restores_the_text():
    tokenizer = AutoTokenizer.from_pretrained(resolve_demo_model("demo:1m").folder)
    assert tokenizer.is_fast
    for row in generate_rows(50, seed=0):
        text = PROMPT.format(question=row["question"]) + row["answer"]
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_other_text_survives_the_tokenizer_too():
    tokenizer = AutoTokenizer.from_pretrained(resolve_demo_model("demo:1m").folder)
    for text in ("Zürich, 1234.5 %", "def f(x):\n    return x**2\n", "\U0001f600  two  spaces"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_numbers_up_to_99_are_one_token():
    tokenizer = AutoTokenizer.from_pretrained(resolve_demo_model("demo:1m").folder)
    for number in range(100):
        assert len(tokenizer(f" {number}", add_special_tokens=False).input_ids) == 1


def test_rows_of_the_task_are_short():
    tokenizer = AutoTokenizer.from_pretrained(resolve_demo_model("demo:1m").folder)
    lengths = [
        len(tokenizer(PROMPT.format(question=row["question"]) + row["answer"]).input_ids) + 1
        for row in generate_rows(500, seed=0)
    ]
    assert 40 <= sum(lengths) / len(lengths) <= 60
    assert max(lengths) <= 64


def test_the_pretrained_model_knows_a_sum():
    folder = resolve_demo_model("demo:4m").folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    right = 0
    for a in range(2, 12):
        ids = tokenizer(f"{a} + 7 =", return_tensors="pt").input_ids
        with torch.no_grad():
            best = int(model(input_ids=ids).logits[0, -1].argmax())
        right += tokenizer.decode([best]).strip() == str(a + 7)
    assert right >= 9


def test_a_model_that_was_not_made_is_an_error_with_the_command(tmp_path: Path):
    with pytest.raises(ModelError, match=r"--sizes 12m --out") as caught:
        resolve_demo_model("demo:12m", environment={"LORATUNE_DEMO_MODELS": str(tmp_path)})
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rebuild_with_other_weights_is_found_but_does_not_match(tmp_path: Path):
    (tmp_path / "28m").mkdir()
    (tmp_path / "28m" / "model.safetensors").write_bytes(b"other weights")
    model = resolve_demo_model("demo:28m", environment={"LORATUNE_DEMO_MODELS": str(tmp_path)})
    assert model.folder == tmp_path / "28m"
    assert not model.matches_recorded_hash


def test_an_unknown_demo_model_is_an_error_that_lists_the_known():
    with pytest.raises(ModelError, match=r"demo:2m.*demo:1m, demo:4m, demo:12m, demo:28m"):
        resolve_demo_model("demo:2m")


def test_models_made_by_hand_are_in_the_cache_folder_unless_the_variable_names_another(
    tmp_path: Path,
):
    assert demo_models_folder(environment={"LORATUNE_DEMO_MODELS": "/a/b"}) == Path("/a/b")
    cache = demo_models_folder(environment={"XDG_CACHE_HOME": str(tmp_path)})
    assert cache == tmp_path / "loratune" / "demo-models"
    home = demo_models_folder(environment={})
    assert home == Path.home() / ".cache" / "loratune" / "demo-models"


def test_resolving_needs_no_torch():
    code = (
        "import sys; from loratune.models.demo import resolve_demo_model as r; "
        "r('demo:1m'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
