"""A Hugging Face folder: the tensors in its safetensors files by name, and the small files that describe the model."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from profiles.hf_config import CONFIG_FILE
from profiles.input_error import InputError
from profiles.lists_in_words import first_of
from profiles.store import Reader, load_json

from .hf_names import Box

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DESCRIPTION_FOLDER = "hugging_face"  # of a run folder
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
_MODEL_FILES = (CONFIG_FILE, "generation_config.json")
_DESCRIPTION_FILES = (*_MODEL_FILES, *TOKENIZER_FILES)
_DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names of what can be read as numbers without a scale


class TensorFiles:
    """The tensors of a folder by name: one model.safetensors, or several with an index. Closes them when it exits.

    Opening reads headers alone; `read` reads no more than the part it is asked for. `file_of` is the file that holds
    a tensor. Raises InputError for files that are missing, are not safetensors, or do not hold what the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file_of: dict[str, Path] = {}
        self._stack = ExitStack()
        self._slices: dict[str, Any] = {}
        index = folder / INDEX_FILE
        if not folder.is_dir():
            raise _no_weights(folder, "no such folder" if not folder.exists() else "a file")
        if index.exists():
            self._open_indexed(index)
        elif (folder / WEIGHTS_FILE).exists():
            self._open(folder / WEIGHTS_FILE)
        else:
            raise _no_weights(folder, _listing(folder))

    def _open_indexed(self, index: Path) -> None:
        reader = Reader(load_json(index, "safetensors index"), source=str(index))
        said = reader.child("weight_map")
        place = {tensor: self.folder / said.text(tensor) for tensor in said}
        for file in sorted(set(place.values())):
            self._open(file)
        for tensor, file in place.items():
            if self.file_of.get(tensor) != file:
                raise InputError(
                    f"{file.name} does not hold what the index says",
                    where=f"{index}: weight_map.{tensor}",
                    expected=f"the tensor {tensor} in {file}",
                    got="no such tensor there",
                )

    def _open(self, file: Path) -> None:
        try:
            opened = self._stack.enter_context(safe_open(file, framework="pt", device="cpu"))
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file.name} cannot be read", where=str(file), expected="a safetensors file", got=str(error)
            ) from None
        for tensor in opened.keys():  # noqa: SIM118 (it is no mapping)
            self._slices[tensor] = opened.get_slice(tensor)
            self.file_of[tensor] = file

    def shape(self, tensor: str) -> tuple[int, ...]:
        return tuple(self._slices[tensor].get_shape())

    def require_numbers(self, tensor: str) -> None:
        """Raise InputError for a tensor of 8-bit or packed values, which mean nothing without what scales them."""
        if self._slices[tensor].get_dtype() not in _DTYPES:
            raise InputError(
                f"{tensor} is quantised",
                where=f"{self.file_of[tensor]}: {tensor}",
                expected="one of " + ", ".join(_DTYPES),
                got=self._slices[tensor].get_dtype(),
                hint="dequantise the model first",
            )

    def read(self, tensor: str, box: Box) -> torch.Tensor:
        """The part `box` of a tensor, in the file's dtype."""
        dense = tuple(slice(part.start, part.stop) for part in box)  # safetensors takes no steps
        return self._slices[tensor][dense][tuple(slice(None, None, part.step) for part in box)]

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._slices.clear()
        self._stack.close()


def keep_description(run_dir: Path, folder: Path | None, tokenizer: Path | None = None) -> None:
    """Copy config and tokenizer of the folder that a run starts from into the run's own; None leaves none there.

    `tokenizer`, the folder or file that the run's data were made with, takes the place of the folder's.
    """
    kept = run_dir / DESCRIPTION_FOLDER
    shutil.rmtree(kept, ignore_errors=True)
    if folder is not None:
        copy_files(folder, kept, _DESCRIPTION_FILES if tokenizer is None else _MODEL_FILES)
    if tokenizer is not None and tokenizer.is_dir():
        copy_files(tokenizer, kept, TOKENIZER_FILES)
    elif tokenizer is not None and tokenizer.is_file():
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tokenizer, kept / TOKENIZER_FILES[0])


def copy_files(source: Path, target: Path, names: tuple[str, ...]) -> list[str]:
    """Copy those of the files that are there; their names."""
    there = [name for name in names if (source / name).is_file()]
    target.mkdir(parents=True, exist_ok=True)
    for name in there:
        shutil.copyfile(source / name, target / name)
    return there


def _no_weights(folder: Path, got: str) -> InputError:
    return InputError(
        f"{folder} holds no weights",
        where=f"--from {folder}",
        expected=f"a folder with {WEIGHTS_FILE}, or {INDEX_FILE} and the files that it names",
        got=got,
        hint="files of other kinds become safetensors by transformers' from_pretrained and save_pretrained",
    )


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return first_of(names) if names else "nothing"
