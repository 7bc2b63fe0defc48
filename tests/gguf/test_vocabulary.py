"""Vocabularies in a GGUF file: tokens, merges, scores and ids as llama.cpp needs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from tokenizers import normalizers

from qgrid.contracts import Unsupported
from qgrid.gguf import _pieces, convert, parity, vocabulary
from tests.gguf import checkpoints
from tests.gguf.checkpoints import LLAMA3, QWEN2, TEKKEN, split_by

Write = Callable[[Path], None]


def byte_level(regex: str | None, digits: bool = False, **options: Any) -> Write:
    def write(folder: Path) -> None:
        checkpoints.byte_level(folder, split_by(regex, digits), vocab=2000, **options)

    return write


BYTE_LEVEL: dict[str, Write] = {
    "llama-bpe": byte_level(LLAMA3, ignore_merges=True, bos=True),
    "smaug-bpe": byte_level(LLAMA3),
    "qwen2": byte_level(QWEN2, normalizer=normalizers.NFC()),
    "gpt-2": byte_level(None),
    "smollm": byte_level(None, digits=True),
}


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    change(stored)
    path.write_text(json.dumps(stored), encoding="utf-8")


def fields(file: Path) -> dict[str, Any]:
    prefix = "tokenizer.ggml."
    found = GGUFReader(file).fields
    return {k.removeprefix(prefix): f.contents() for k, f in found.items() if k.startswith(prefix)}


@pytest.mark.parametrize("pre", BYTE_LEVEL)
def test_the_pre_tokenizer_is_found_and_gives_the_same_ids(pre: str, tmp_path: Path) -> None:
    BYTE_LEVEL[pre](tmp_path)
    checkpoints.model(tmp_path, "LlamaForCausalLM")
    convert.convert(tmp_path, tmp_path / "model.gguf", "F16")
    assert fields(tmp_path / "model.gguf")["pre"] == pre
    checks = parity.check_tokenizer(tmp_path / "model.gguf", tmp_path)
    assert [check for check in checks if check.fatal and not check.ok] == []
    assert {"tokenizer", "tokenizer_special", "tokenizer_boundaries"} <= {c.name for c in checks}


def test_every_part_is_stored(tmp_path: Path) -> None:
    BYTE_LEVEL["llama-bpe"](tmp_path)
    checkpoints.model(tmp_path, "LlamaForCausalLM", ids=(2002,))
    edit(tmp_path, lambda t: t["added_tokens"][3].update(special=False))
    convert.convert(tmp_path, tmp_path / "model.gguf", "F16")
    found = fields(tmp_path / "model.gguf")
    stored = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert found["model"] == "gpt2"
    by_id = sorted(stored["vocab"], key=stored["vocab"].get)
    assert found["tokens"] == [*by_id, "[PAD2000]", "[PAD2001]", "[PAD2002]"]
    assert found["token_type"] == [3, 3, 3, 4, 3] + [1] * 1995 + [5] * 3
    assert found["merges"] == [" ".join(pair) for pair in stored["merges"]]
    assert (found["bos_token_id"], found["eos_token_id"], found["padding_token_id"]) == (0, 1, 2)
    assert (found["add_bos_token"], found["add_eos_token"]) == (True, False)
    template = GGUFReader(tmp_path / "model.gguf").fields["tokenizer.chat_template"].contents()
    assert "<|user|>" in template


@pytest.mark.parametrize("scheme", ["prepend", "always", "first", "never"])
def test_pieces(scheme: str, tmp_path: Path) -> None:
    """Llama 2's form with a normalizer, and Metaspace, which newer files have."""
    checkpoints.pieces(tmp_path)
    if scheme != "prepend":
        space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
        edit(tmp_path, lambda t: t.update(normalizer=None, pre_tokenizer=space))
    checkpoints.model(tmp_path, "MistralForCausalLM", sliding_window=None)
    assert convert.refusal(tmp_path) is None
    convert.convert(tmp_path, tmp_path / "model.gguf", "F16")
    found = fields(tmp_path / "model.gguf")
    assert (found["model"], found["add_bos_token"], found["unknown_token_id"]) == ("llama", True, 0)
    assert found["add_space_prefix"] is (scheme != "never")
    checks = parity.check_tokenizer(tmp_path / "model.gguf", tmp_path)
    assert [check for check in checks if check.fatal and not check.ok] == []
    differing = {check.name for check in checks if not check.ok}
    assert (
        differing
        == {
            "prepend": set(),
            "never": set(),
            "always": {"tokenizer_space", "tokenizer_special"},
            "first": {"tokenizer_space", "tokenizer_special"},
        }[scheme]
    )


def test_scores_and_types_of_pieces(tmp_path: Path) -> None:
    checkpoints.pieces(tmp_path)
    checkpoints.model(tmp_path, "LlamaForCausalLM")
    convert.convert(tmp_path, tmp_path / "model.gguf", "F16")
    found = fields(tmp_path / "model.gguf")
    stored = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert found["token_type"][:7] == [2, 3, 3, 3, 3, 3, 6]
    assert found["token_type"].count(6) == 256
    order = dict.fromkeys("".join(pair) for pair in stored["merges"])
    scores = [found["scores"][stored["vocab"][piece]] for piece in order]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(order)
    assert "merges" not in found


# --- what is refused ------------------------------------------------------------------------------


def processor(stored: dict[str, Any]) -> None:
    stored["post_processor"] = {"type": "RobertaProcessing", "sep": ["a", 1], "cls": ["b", 2]}


def added(**flags: bool) -> Callable[[dict[str, Any]], Any]:
    return lambda stored: stored["added_tokens"][1].update(flags)


def regex(pattern: str) -> Callable[[dict[str, Any]], Any]:
    def change(stored: dict[str, Any]) -> None:
        stored["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}

    return change


def prefix_space(stored: dict[str, Any]) -> None:
    stored["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True


BYTE_LEVEL_REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "model": (lambda t: t["model"].update(type="Unigram"), "the tokenizer model is Unigram"),
    "regex": (regex(r"\w+|\s+"), r"pre-tokenizer in tokenizer.json \(\\w\+\|\\s\+"),
    "tekken": (regex(TEKKEN), r"pre-tokenizer.*ignore_merges=True"),
    "ignore_merges": (regex(QWEN2), "ignore_merges=True"),
    "prefix space": (prefix_space, "ByteLevel.*'add_prefix_space': True"),
    "none": (lambda t: t.update(pre_tokenizer=None), r"pre-tokenizer in tokenizer.json \(none"),
    "normalizer": (lambda t: t.update(normalizer={"type": "NFKC"}), "normalizer NFKC"),
    "rstrip": (added(rstrip=True), "added token `</s>` has rstrip"),
    "single word": (added(single_word=True, lstrip=True), "`</s>` has lstrip and single_word"),
    "processor": (processor, "post-processor RobertaProcessing"),
    "suffix": (lambda t: t["model"].update(end_of_word_suffix="</w>"), "`end_of_word_suffix`"),
    "rows": (lambda t: t["model"]["vocab"].update(more=2000), "id 2000 and the embedding 2000"),
}


@pytest.mark.parametrize("case", BYTE_LEVEL_REFUSED)
def test_unknown_byte_level_tokenizers_are_refused(case: str, tmp_path: Path) -> None:
    BYTE_LEVEL["llama-bpe"](tmp_path)
    checkpoints.model(tmp_path, "LlamaForCausalLM")
    assert convert.refusal(tmp_path) is None
    change, words = BYTE_LEVEL_REFUSED[case]
    edit(tmp_path, change)
    refused = convert.refusal(tmp_path)
    assert refused is not None
    with pytest.raises(Unsupported, match=words):
        raise Unsupported(refused)


def test_the_converter_refuses_what_planning_did_not_see(tmp_path: Path) -> None:
    BYTE_LEVEL["gpt-2"](tmp_path)
    checkpoints.model(tmp_path, "LlamaForCausalLM")
    edit(tmp_path, lambda t: t.update(normalizer={"type": "NFKC"}))
    with pytest.raises(Unsupported, match="normalizer NFKC"):
        convert.convert(tmp_path, tmp_path / "model.gguf", "F16")
    assert not (tmp_path / "model.gguf").exists()


def drop_byte(stored: dict[str, Any]) -> None:
    del stored["model"]["vocab"]["<0x41>"]


def scatter(stored: dict[str, Any]) -> None:
    merges = stored["model"]["merges"]
    twice = [m for m in merges if sum("".join(n) == "".join(m) for n in merges) > 1]
    merges.remove(twice[0])
    merges.append(twice[0])


def split_spaces(stored: dict[str, Any]) -> None:
    stored["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}


PIECES_REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "byte": (drop_byte, "no token <0x41>"),
    "a merge less": (lambda t: t["model"]["merges"].pop(), "no merge of"),
    "scattered": (scatter, "do not stand together"),
    "normalizer": (lambda t: t.update(normalizer={"type": "NFKC"}), "normalizers NFKC"),
    "splitting": (split_spaces, "Metaspace"),
    "no spaces": (lambda t: t.update(normalizer=None), "does not write spaces"),
    "ignore_merges": (lambda t: t["model"].update(ignore_merges=True), "`ignore_merges`"),
}


@pytest.mark.parametrize("case", PIECES_REFUSED)
def test_unknown_pieces_are_refused(case: str, tmp_path: Path) -> None:
    checkpoints.pieces(tmp_path)
    checkpoints.model(tmp_path, "LlamaForCausalLM")
    change, words = PIECES_REFUSED[case]
    edit(tmp_path, change)
    refused = convert.refusal(tmp_path)
    assert refused is not None
    with pytest.raises(Unsupported, match=words):
        raise Unsupported(refused)


def test_what_the_refusal_of_merges_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the ids would differ: llama.cpp joins pairs that are not listed."""
    learned = tmp_path / "learned"
    checkpoints.pieces(learned, all_splits=False)
    stored = json.loads((learned / "tokenizer.json").read_text(encoding="utf-8"))
    way = stored["model"]["merges"]  # how every piece was learned
    checkpoints.pieces(tmp_path)
    checkpoints.model(tmp_path, "LlamaForCausalLM")

    def block(stored: dict[str, Any]) -> None:
        merges = stored["model"]["merges"]
        others = {"".join(pair) for pair in merges if pair not in way}
        stored["model"]["merges"] = [m for m in merges if m not in way or "".join(m) not in others]

    edit(tmp_path, block)
    assert "no merge of" in str(convert.refusal(tmp_path))
    monkeypatch.setattr(_pieces, "_refuse_merges", lambda *_: None)
    convert.convert(tmp_path, tmp_path / "model.gguf", "F16")
    checks = parity.check_tokenizer(tmp_path / "model.gguf", tmp_path)
    assert not next(check for check in checks if check.name == "tokenizer").ok


def test_transformers_own_llama_tokenizer(tmp_path: Path) -> None:
    """It replaces the normalizer in the file by Metaspace, and that is what must be met."""
    checkpoints.pieces(tmp_path)
    checkpoints.model(tmp_path, "LlamaForCausalLM")
    path = tmp_path / "tokenizer_config.json"
    named = {**json.loads(path.read_text()), "tokenizer_class": "LlamaTokenizer", "legacy": False}
    path.write_text(json.dumps(named))
    tokenizer = vocabulary.load_tokenizer(tmp_path)
    assert type(tokenizer.backend_tokenizer.pre_tokenizer).__name__ == "Metaspace"
    convert.convert(tmp_path, tmp_path / "model.gguf", "F16")
    checks = parity.check_tokenizer(tmp_path / "model.gguf", tmp_path)
    assert [check for check in checks if check.fatal and not check.ok] == []
