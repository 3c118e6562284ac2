"""The tokenizer of a model as values of a GGUF file, from the files beside its config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .container import library

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
SPACE = "\u2581"  # what sentencepiece writes for a space
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
SPLITS = {  # how a text is cut before pairs are merged, by the pattern of a tokenizer.json: llama.cpp's name for it
    _WORDS + r"|\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"|\p{N}" + _REST: "qwen2",
}
SPECIAL = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "sep": "seperator",
           "pad": "padding", "cls": "cls", "mask": "mask"}  # fmt: skip  # the format's own spelling


def vocabulary(folder: Path | None, size: int, kind: str) -> dict[str, Any]:
    """``tokenizer.*`` values for a model of ``size`` tokens; kind: "text", or "words" for WordPiece.

    Raises ValueError where there is no tokenizer, or none that llama.cpp has."""
    if folder is None or not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError(
            f"no tokenizer.json or tokenizer.model in {folder}; put one beside config.json: the file holds it"
        )
    fields = _of_json(folder, kind) if (folder / "tokenizer.json").is_file() else _of_sentencepiece(folder)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    if len(tokens) > size:
        raise ValueError(f"the tokenizer in {folder} has {len(tokens)} tokens, the model {size}")
    tokens += [f"[PAD{i}]" for i in range(len(tokens), size)]
    types += [UNUSED] * (size - len(types))
    if (scores := fields.get("tokenizer.ggml.scores")) is not None:
        scores += [-10000.0] * (size - len(scores))
    return fields | _special(folder, size)


def _special(folder: Path, size: int) -> dict[str, Any]:
    """Special tokens, whether they are added, and the template of chats, as gguf's own reading of the folder has it."""
    found = library().SpecialVocab(folder, load_merges=False, n_vocab=size)
    whole = (
        folder / "tokenizer.json"
    ).is_file()  # which says what is added; else it is what llama.cpp takes for granted
    added = ({"bos": False, "eos": False} if whole else {}) | found.add_special_token
    fields: dict[str, Any] = {f"tokenizer.ggml.{SPECIAL[k]}_token_id": i for k, i in found.special_token_ids.items()}
    fields |= {f"tokenizer.ggml.add_{k}_token": value for k, value in added.items() if k in ("bos", "eos", "sep")}
    if isinstance(found.chat_template, str):
        fields["tokenizer.chat_template"] = found.chat_template
    return fields


def _of_json(folder: Path, kind: str) -> dict[str, Any]:
    try:
        read = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        model = read["model"]
        vocab: dict[str, int] = model["vocab"]
        added = {token["id"]: token for token in read.get("added_tokens") or []}
        ids = {i: text for text, i in vocab.items()} | {i: token["content"] for i, token in added.items()}
        tokens = [ids.get(i, f"[PAD{i}]") for i in range(max(ids) + 1)]
        parts = _parts(read.get("pre_tokenizer")), _parts(read.get("normalizer")), _parts(read.get("decoder"))
        types = [UNUSED if i not in ids else NORMAL for i in range(len(tokens))]
        for i, token in added.items():
            types[i] = CONTROL if token.get("special") else USER
        if (unknown := model.get("unk_token")) in vocab:
            types[vocab[unknown]] = UNKNOWN
        wanted = {"words": ("WordPiece",), "text": ("BPE",)}[kind]
        if model["type"] not in wanted:
            raise ValueError(f"expected a tokenizer of type {wanted[0]}, got {model['type']}")
        if kind == "words":
            fields = _words(model, tokens, types, parts[1])
        elif model.get("byte_fallback"):
            fields = _pieces(model, tokens, types, parts)
        else:
            fields = _bytes(model, parts)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / 'tokenizer.json'}: no tokenizer ({type(error).__name__}: {error})") from None
    except ValueError as error:
        raise ValueError(f"{folder / 'tokenizer.json'}: {error}") from None
    return {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types} | fields


def _parts(step: Any) -> list[dict[str, Any]]:
    """The steps of a sequence, or the one that it is."""
    if not step:
        return []
    if step["type"] != "Sequence":
        return [step]
    inner = step.get("pretokenizers") or step.get("normalizers") or step.get("decoders") or []
    return [part for each in inner for part in _parts(each)]


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    return [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]  # type: ignore[misc]


def _bytes(model: dict[str, Any], parts: tuple[list, list, list]) -> dict[str, Any]:
    """Pairs of bytes that are merged: GPT-2's, Llama 3's, Qwen's."""
    cuts, normalizers, _ = parts
    if any(part["type"] != "NFC" for part in normalizers):
        raise ValueError(f"normalizers that llama.cpp has not: {', '.join(part['type'] for part in normalizers)}")
    kinds = [part["type"] for part in cuts]
    if not kinds or kinds[-1] != "ByteLevel" or cuts[-1].get("add_prefix_space"):
        raise ValueError(f"expected a pre_tokenizer that ends with ByteLevel, without a space before, got {kinds}")
    whole = cuts[-1].get("use_regex", True)
    pattern = cuts[0].get("pattern", {}).get("Regex") if kinds == ["Split", "ByteLevel"] else None
    if kinds == ["ByteLevel"] and whole:
        split = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and whole and cuts[0].get("individual_digits"):
        split = "smollm"
    elif pattern in SPLITS and not whole:
        split = SPLITS[pattern]
    else:
        raise ValueError(f"a pre_tokenizer whose name in llama.cpp is not known: {json.dumps(cuts)[:200]}")
    merges = [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in _merges(model)]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": split, "tokenizer.ggml.merges": merges}


def _pieces(model: dict[str, Any], tokens: list[str], types: list[int],
            parts: tuple[list, list, list]) -> dict[str, Any]:  # fmt: skip
    """sentencepiece's, as Llama 2 and Gemma have it: the better of two merges is the one with the lower rank."""
    cuts, normalizers, _ = parts
    scores = [-10000.0] * len(tokens)
    ids = {text: i for i, text in enumerate(tokens)}
    for rank, pair in reversed(list(enumerate(_merges(model)))):
        scores[ids["".join(pair)]] = float(-rank)
    for i, text in enumerate(tokens):
        if types[i] == NORMAL and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[i] = BYTE
    if UNKNOWN not in types:
        raise ValueError("it has no unk_token, which llama.cpp expects")
    known = {"Prepend", "Replace", "Metaspace", "Split"}
    if strange := [part["type"] for part in normalizers + cuts if part["type"] not in known]:
        raise ValueError(f"a step that llama.cpp has not: {strange[0]}")
    before = any(part["type"] == "Prepend" or part.get("prepend_scheme", "never") != "never"
                 for part in normalizers + cuts)  # fmt: skip
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.add_space_prefix": before}  # fmt: skip


def _words(model: dict[str, Any], tokens: list[str], types: list[int], normalizers: list) -> dict[str, Any]:
    """WordPiece: what goes on with a word stands bare, what begins one behind a mark."""
    mark = model.get("continuing_subword_prefix", "##")
    for i, text in enumerate(tokens):
        if types[i] == NORMAL:
            tokens[i] = text[len(mark) :] if text.startswith(mark) else SPACE + text
    bert: dict[str, Any] = next((part for part in normalizers if part["type"] == "BertNormalizer"), {})
    lower = bool(bert.get("lowercase", False))
    strip = bert.get("strip_accents")
    return {"tokenizer.ggml.model": "bert", "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.normalizer.lowercase": lower,
            "tokenizer.ggml.normalizer.strip_accents": lower if strip is None else bool(strip)}  # fmt: skip


def _of_sentencepiece(folder: Path) -> dict[str, Any]:
    try:
        pieces = library().SentencePieceVocab(folder).all_tokens()
    except ImportError as error:
        raise ImportError(f"tokenizer.model needs sentencepiece: pip install sentencepiece ({error})") from None
    tokens, scores, types = (list(column) for column in zip(*pieces, strict=True))
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": [text.decode() for text in tokens], "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": [int(t) for t in types]}  # fmt: skip
