"""The checks of a GGUF file against its checkpoint find each planted fault and name it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from gguf import GGUFReader

from qgrid import demo
from qgrid.gguf import _library, _probes, convert, log, parity
from qgrid.types import Check
from tests.gguf import checkpoints
from tests.gguf.rewriting import Keys, rewritten, set_key


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as an F16 file."""
    file = tmp_path_factory.mktemp("tiny") / "model.gguf"
    convert.convert(demo.MODEL_DIR, file, "F16")
    return file


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a SentencePiece-style vocabulary, and its file."""
    folder = tmp_path_factory.mktemp("pieces")
    checkpoints.pieces(folder)
    checkpoints.model(folder, "LlamaForCausalLM")
    convert.convert(folder, folder / "model.gguf", "F16")
    return folder


def named(checks: tuple[Check, ...]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_the_embedded_model_passes(tiny: Path) -> None:
    checks = named(parity.check_tokenizer(tiny, demo.MODEL_DIR))
    assert all(check.ok for check in checks.values() if check.fatal)
    assert parity.check_vocabulary(tiny, demo.MODEL_DIR).ok
    assert parity.check_chat_template(tiny, demo.MODEL_DIR).ok
    logits = parity.check_logits(tiny, demo.MODEL_DIR)
    assert logits.ok
    assert "over 384 tokens" in logits.actual


def test_what_llama_cpp_does_not_normalize_is_told_and_not_fatal(tiny: Path) -> None:
    check = named(parity.check_tokenizer(tiny, demo.MODEL_DIR))["tokenizer_normalizer"]
    assert (check.ok, check.fatal) == (False, False)
    assert "strings get other ids" in check.actual


def test_plain_tokens_that_llama_cpp_takes_for_special_are_told(tmp_path: Path) -> None:
    """Qwen has a plain token `</s>`; llama.cpp knows such texts and cuts them out first."""
    checkpoints.byte_level(tmp_path, checkpoints.split_by(None))
    path = tmp_path / "tokenizer.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored["model"]["vocab"]["<|im_end|>"] = 1000
    path.write_text(json.dumps(stored), encoding="utf-8")
    checkpoints.model(tmp_path, "LlamaForCausalLM")
    convert.convert(tmp_path, tmp_path / "model.gguf", "F16")
    checks = named(parity.check_tokenizer(tmp_path / "model.gguf", tmp_path))
    assert checks["tokenizer"].ok
    assert (checks["tokenizer_control"].ok, checks["tokenizer_control"].fatal) == (False, False)
    assert "[1000, " in checks["tokenizer_control"].actual


def test_probes_are_many_and_of_every_kind() -> None:
    texts = _probes.strings(())
    assert len(texts) == len(set(texts)) > 1000
    assert texts == _probes.strings(())
    joined = "".join(texts)
    for kind in (
        "   ",
        "\n\n",
        "\t",
        "\0",
        "\u0301",
        "\u200d",
        "東",
        "ש",
        "ع",
        "न",
        "🙂",
        "٣",
        "½",
    ):
        assert kind in joined
    assert not any("<|end|>" in text for text in _probes.strings(("<|end|>",)))
    assert all("<|end|>" in text for text in _probes.strings_with(("<|end|>",)))
    assert _probes.strings_with(()) == ()


def swap_tokens(keys: Keys) -> None:
    tokens = keys["tokenizer.ggml.tokens"]
    tokens[400], tokens[401] = tokens[401], tokens[400]


def swap_merges(keys: Keys) -> None:
    merges = keys["tokenizer.ggml.merges"]
    merges[17], merges[18] = merges[18], merges[17]


def plain_special(keys: Keys) -> None:
    keys["tokenizer.ggml.token_type"][1533] = 1


FAULTS: dict[str, tuple[Callable[[Keys], Any], str, str | None]] = {
    "pre": (
        set_key("tokenizer.ggml.pre", "smollm"),
        "pre-tokenizer smollm instead of qwen2",
        "tokenizer",
    ),
    "tokens": (swap_tokens, "another token at 400", "tokenizer"),
    "merges": (swap_merges, "another merge at 17", None),
    "types": (plain_special, "type of token 1533 ('<|user|>')", "tokenizer_special"),
    "eos": (
        set_key("tokenizer.ggml.eos_token_id", 3),
        "eos token 3 instead of 1535",
        "tokenizer_boundaries",
    ),
    "eos added": (set_key("tokenizer.ggml.add_eos_token", True), "add_eos_token True", "tokenizer"),
    "model": (
        set_key("tokenizer.ggml.model", "llama"),
        "tokenizer model llama instead of gpt2",
        None,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_and_named(tiny: Path, fault: str, tmp_path: Path) -> None:
    change, words, failing = FAULTS[fault]
    file = rewritten(tiny, tmp_path / "model.gguf", change)
    check = parity.check_vocabulary(file, demo.MODEL_DIR)
    assert (check.ok, check.fatal) == (False, True)
    assert words in check.actual
    if failing is not None:
        found = named(parity.check_tokenizer(file, demo.MODEL_DIR))[failing]
        assert (found.ok, found.fatal) == (False, True)


@pytest.mark.parametrize("alias", ["deepseek-r1-qwen", "megrez"])
def test_names_for_the_same_splitting_are_equal(tiny: Path, alias: str, tmp_path: Path) -> None:
    file = rewritten(tiny, tmp_path / "model.gguf", set_key("tokenizer.ggml.pre", alias))
    assert parity.check_vocabulary(file, demo.MODEL_DIR).ok
    assert named(parity.check_tokenizer(file, demo.MODEL_DIR))["tokenizer"].ok


def test_another_chat_template_is_not_fatal(tiny: Path, tmp_path: Path) -> None:
    other = rewritten(tiny, tmp_path / "other.gguf", set_key("tokenizer.chat_template", "{{ 1 }}"))
    none = rewritten(tiny, tmp_path / "none.gguf", set_key("tokenizer.chat_template", None))
    checks = [parity.check_chat_template(file, demo.MODEL_DIR) for file in (other, none)]
    assert [(check.ok, check.fatal, check.actual) for check in checks] == [
        (False, False, "another one"),
        (False, False, "none"),
    ]


def test_pieces_are_compared_by_the_order_of_scores(pieces: Path, tmp_path: Path) -> None:
    def stretch(keys: Keys) -> None:
        keys["tokenizer.ggml.scores"] = [2 * score + 5 for score in keys["tokenizer.ggml.scores"]]

    def turn(keys: Keys) -> None:
        keys["tokenizer.ggml.scores"] = [-score for score in keys["tokenizer.ggml.scores"]]

    file = pieces / "model.gguf"
    assert parity.check_vocabulary(file, pieces).ok
    assert parity.check_vocabulary(rewritten(file, tmp_path / "a.gguf", stretch), pieces).ok
    turned = rewritten(file, tmp_path / "b.gguf", turn)
    assert "another order of scores" in parity.check_vocabulary(turned, pieces).actual
    assert not named(parity.check_tokenizer(turned, pieces))["tokenizer"].ok


def test_bos_by_default_and_by_key(pieces: Path, tmp_path: Path) -> None:
    """A file without the key gets llama.cpp's default, which is BOS for pieces."""
    silent = rewritten(
        pieces / "model.gguf", tmp_path / "a.gguf", set_key("tokenizer.ggml.add_bos_token", None)
    )
    assert parity.check_vocabulary(silent, pieces).ok
    without = rewritten(
        pieces / "model.gguf", tmp_path / "b.gguf", set_key("tokenizer.ggml.add_bos_token", False)
    )
    assert "add_bos_token False" in parity.check_vocabulary(without, pieces).actual
    assert not named(parity.check_tokenizer(without, pieces))["tokenizer_boundaries"].ok


def test_a_base_that_cannot_be_compared_by_parts(pieces: Path, tmp_path: Path) -> None:
    shutil.copytree(pieces, tmp_path / "base")
    path = tmp_path / "base" / "tokenizer.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored["model"]["merges"].pop()
    path.write_text(json.dumps(stored), encoding="utf-8")
    check = parity.check_vocabulary(pieces / "model.gguf", tmp_path / "base")
    assert (check.ok, check.fatal) == (False, False)
    assert check.actual.startswith("not done: ")


def test_logits_of_other_weights_fail(tiny: Path, tmp_path: Path) -> None:
    """A norm that is off by a tenth in one layer."""
    file = tmp_path / "model.gguf"
    shutil.copy(tiny, file)
    norm = next(t for t in GGUFReader(tiny).tensors if t.name == "blk.2.ffn_norm.weight")
    with file.open("r+b") as stored:
        stored.seek(int(norm.data_offset))
        stored.write((norm.data * 1.1).tobytes())
    check = parity.check_logits(file, demo.MODEL_DIR)
    assert (check.ok, check.fatal) == (False, True)
    assert "mean KL" in check.actual
    assert "as transformers has in 16 bits" in check.expected


def test_sharp_distributions_are_held_against_16_bit_arithmetic(tmp_path: Path) -> None:
    checkpoints.byte_level(tmp_path, checkpoints.split_by(None))
    checkpoints.model(tmp_path, "LlamaForCausalLM", initializer_range=0.6)
    convert.convert(tmp_path, tmp_path / "model.gguf", "F16")
    check = parity.check_logits(tmp_path / "model.gguf", tmp_path)
    assert check.ok
    assert "as transformers has in 16 bits" in check.expected


def test_a_16_bit_file_in_bf16_has_its_own_bound(tmp_path: Path) -> None:
    convert.convert(demo.MODEL_DIR, tmp_path / "model.gguf", "BF16")
    check = parity.check_logits(tmp_path / "model.gguf", demo.MODEL_DIR)
    assert (check.ok, check.expected) == (True, "mean KL <= 0.001 nats")


def test_logits_are_not_compared_without_memory(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000_000))
    check = parity.check_logits(tiny, demo.MODEL_DIR)
    assert (check.ok, check.fatal) == (False, False)
    assert "not done: " in check.actual
    assert "GiB needed" in check.actual


def test_an_unreadable_file_is_the_librarys_own_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    with (
        pytest.raises(log.LlamaError, match=r"cannot load model\.gguf: .*"),
        _library.model(tmp_path / "model.gguf"),
    ):
        pass
    assert capfd.readouterr().err == ""


def test_the_log_is_given_back(tiny: Path) -> None:
    with log.captured() as outer:
        with _library.model(tiny, vocabulary_only=True):
            inside = len(outer.messages)
        assert inside == 0
        with log.captured() as inner:
            pass
        import llama_cpp

        options = llama_cpp.llama_model_default_params()
        options.vocab_only = True
        llama_cpp.llama_model_free(
            llama_cpp.llama_model_load_from_file(str(tiny).encode(), options)
        )
    assert outer.messages
    assert not inner.messages
