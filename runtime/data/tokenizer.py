"""Text to token ids: bytes as they are, or a Hugging Face tokenizer from a model's folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from profiles.input_error import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HfTokenizer

BYTES = "bytes"  # the name of the tokenizer that needs no file
_FILE = "tokenizer.json"
_MASK = "[MASK]"  # BERT's


class Tokenizer(Protocol):
    """Every id is below `vocabulary`; `end_of_document` is what --append-eod appends, None where it is not known."""

    @property
    def name(self) -> str: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def end_of_document(self) -> int | None: ...

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, no special tokens added; whole numbers, 1-d."""
        ...


@dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes; a document ends with byte 0, which does not occur in text."""

    name: str = BYTES
    vocabulary: int = 256
    end_of_document: int = 0

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8) for text in texts]


@dataclass(frozen=True)
class FolderTokenizer:
    """A tokenizer.json, with the end of a document as tokenizer_config.json or config.json beside it has it."""

    name: str
    vocabulary: int
    end_of_document: int | None
    _tokenizer: HfTokenizer = field(repr=False)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]


def load_tokenizer(name: str, eod: str | None = None) -> Tokenizer:
    """`bytes`, a folder with a tokenizer.json, or that file; `eod` names the token that ends documents.

    Raises InputError where there is no such file, it cannot be read, or has no such token.
    """
    if name == BYTES:
        if eod is not None:
            raise InputError(
                "bytes end documents with byte 0", where="--eod", expected="no --eod with --tokenizer bytes", got=eod
            )
        return ByteTokenizer()
    path = Path(name) / _FILE if Path(name).is_dir() else Path(name)
    tokenizer = _read(path, name)
    if eod is not None and tokenizer.token_to_id(eod) is None:
        raise InputError(
            "the tokenizer has no such token",
            where=f"--eod {eod}",
            expected=f"a token of {path}",
            got="none of that name",
        )
    vocabulary = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    end = tokenizer.token_to_id(eod) if eod is not None else _end_of_document(path, tokenizer)
    return FolderTokenizer(name, vocabulary, end, tokenizer)


def mask_token(name: str) -> tuple[int, int]:
    """(id of the mask token, size of the vocabulary) of the tokenizer that `load_tokenizer` reads under this name.

    The token is what tokenizer_config.json beside it calls mask_token, else `[MASK]`. Raises InputError where the
    tokenizer has none, or is `bytes`.
    """
    path = Path(name) / _FILE if Path(name).is_dir() else Path(name)
    tokenizer = _read(path, name)
    said = _json(path.with_name("tokenizer_config.json")).get("mask_token")
    text = said.get("content") if isinstance(said, dict) else said
    text = text if isinstance(text, str) else _MASK
    found = tokenizer.token_to_id(text)
    if found is None:
        raise InputError(
            "the tokenizer has no mask token, and a masked language model needs one",
            where=f"--tokenizer {name}",
            expected=f"the token {text} in {path}",
            got="none of that name",
            hint="take the tokenizer that the data was prepared with, of a BERT model",
        )
    return found, max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _read(path: Path, name: str) -> HfTokenizer:
    try:
        from tokenizers import Tokenizer as HfTokenizer
    except ImportError:
        raise InputError(
            "the package that reads tokenizers is not installed",
            where=f"--tokenizer {name}",
            expected="the package `tokenizers`",
            got="no such package",
            hint="pip install 'meshwright[data]', or --tokenizer bytes",
        ) from None
    if not path.is_file():
        raise InputError(
            f"there is no tokenizer at {name}",
            where=f"--tokenizer {name}",
            expected=f"a folder with a {_FILE}, as Hugging Face models have, or that file; or {BYTES}",
            got=f"a folder without {_FILE}" if Path(name).is_dir() else "no such file or folder",
        )
    try:
        tokenizer = HfTokenizer.from_file(str(path))
    except Exception as error:  # what the package raises is a bare Exception
        raise InputError(
            f"{path} is no tokenizer that can be read",
            where=f"--tokenizer {name}",
            expected=f"the {_FILE} of a Hugging Face model",
            got=str(error),
        ) from None
    tokenizer.no_truncation()  # some files ask for what their model's examples need
    tokenizer.no_padding()
    return tokenizer


def _end_of_document(path: Path, tokenizer: HfTokenizer) -> int | None:
    """The end-of-sequence token: Megatron's end of document for Hugging Face tokenizers too."""
    said = _json(path.with_name("tokenizer_config.json")).get("eos_token")
    text = said.get("content") if isinstance(said, dict) else said
    if isinstance(text, str) and tokenizer.token_to_id(text) is not None:
        return tokenizer.token_to_id(text)
    number = _json(path.with_name("config.json")).get("eos_token_id")
    number = number[0] if isinstance(number, list) and number else number
    return number if isinstance(number, int) else None


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
