"""What Megatron-LM's flags say of documents that share a sample, and which token ends them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from profiles.store import load_json

from .megatron_command import Given

_KEYS = ("reset_attention", "reset_positions", "mask_loss")
_GPT2_END = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class PackingWishes:
    """What the end of a document changes; `eod` is its id, None where text or the tokenizer has its own."""

    reset_positions: bool = False
    reset_attention: bool = False
    mask_loss: bool = False
    eod: str | None = None


def packing_wishes(given: Given, positions: str) -> PackingWishes:
    """Of a model with these positions. Raises InputError where nothing says which token ends a document."""
    asked = [key for key in _KEYS if key in given]
    if "reset_positions" in asked and "reset_attention" not in asked and positions != "learned":
        asked.remove("reset_positions")
        given.remarks.append(
            f"--reset-position-ids ignored: positions by {positions} are not looked up, in Megatron-LM neither"
        )
    if "mask_loss" in asked:
        given.remarks.append(
            "--eod-mask-loss: the loss is the mean over all tokens of a step that count, where Megatron-LM without "
            "--calculate-per-token-loss takes that of each microbatch"
        )
    if not asked:
        return PackingWishes()
    return PackingWishes(**dict.fromkeys(asked, True), eod=_end(given, asked[0]))


def _end(given: Given, key: str) -> str | None:
    """The id that ends documents, as Megatron-LM's tokenizers have it."""
    kind = given.get("tokenizer_type")
    if "paths" not in given or (kind in (None, "HuggingFaceTokenizer") and "tokenizer" in given):
        return None
    if kind == "NullTokenizer" and "vocab_size" in given:
        return str(given.get("vocab_size"))  # the id behind all others
    if kind == "GPT2BPETokenizer" and "vocab_file" in given:
        ids = load_json(Path(given.get("vocab_file")), "vocabulary")
        if isinstance(ids.get(_GPT2_END), int):
            return str(ids[_GPT2_END])
    raise given.fail(
        key,
        "nothing says which token ends a document",
        "a tokenizer that has one: --tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER, "
        "GPT2BPETokenizer with --vocab-file, or NullTokenizer with --vocab-size",
    )
