"""A run's checkpoint -> a Hugging Face folder: safetensors, config.json and the tokenizer, in one process."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from planner.plan import Plan, load
from planner.record import PLAN_FILE
from profiles.hf_config import CONFIG_FILE
from profiles.hf_writer import write_hf_config
from profiles.input_error import InputError
from profiles.model import ModelSpec
from profiles.store import load_json
from profiles.traced_model import TracedModel

from .checkpoint_folder import step_of
from .checkpoint_reader import CheckpointReader, checkpoint_of
from .disk import free_bytes
from .hf_files import DESCRIPTION_FOLDER, INDEX_FILE, TOKENIZER_FILES, WEIGHTS_FILE, copy_files
from .hf_names import Place
from .hf_weights import places_in

SHARD_BYTES = 4 << 30  # of one file, and so about what is held at once
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Exported:
    """What was written: `files` with weights, the bytes in them, and the tokenizer's files, if the run has one.

    `auto_class` is transformers' class that reads the folder.
    """

    folder: Path
    step: int
    dtype: str
    tensors: int
    weight_bytes: int
    files: tuple[str, ...]
    tokenizer: tuple[str, ...]
    auto_class: str

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "folder": str(self.folder),
            "files": list(self.files),
            "tokenizer": list(self.tokenizer),
        }


@dataclass(frozen=True)
class _Part:
    """What one of our parameters, or one expert of a stack, gives to a tensor of the files."""

    name: str
    expert: int | None
    place: Place


def export_run(
    run_dir: Path,
    out: Path | None,
    *,
    step: int | None,
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Write the run's last checkpoint, or that of `step`, to `out` (default: RUN/hugging_face_step_N).

    At most one file's tensors and one parameter are in memory at once. The folder appears when it is whole. Raises
    InputError where the run has no such checkpoint, the model cannot be expressed, `out` holds something, or there is
    no room.
    """
    if dtype not in DTYPES:
        raise InputError(f"{dtype!r} is not known", where="--dtype", expected="one of " + ", ".join(DTYPES), got=dtype)
    plan = _plan_of(run_dir)
    checkpoint = checkpoint_of(run_dir, step)
    config = _config_of(run_dir, plan.model)
    out = out or run_dir / f"{DESCRIPTION_FOLDER}_{checkpoint.name}"
    _require_free(out)
    reader = CheckpointReader(checkpoint)
    parts = _parts_of(plan.model, config["model_type"], reader)
    sizes = {name: DTYPES[dtype].itemsize * _elements(several) for name, several in parts.items()}
    _require_room(out, sum(sizes.values()))

    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        files = _write_weights(unfinished, parts, sizes, reader, DTYPES[dtype], shard_bytes)
        said = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
        said["torch_dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
        (unfinished / CONFIG_FILE).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        copy_files(run_dir / DESCRIPTION_FOLDER, unfinished, ("generation_config.json",))
        tokenizer = copy_files(run_dir / DESCRIPTION_FOLDER, unfinished, TOKENIZER_FILES)
        os.replace(unfinished, out)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{out} cannot be written", where=str(out), expected="a folder that may be written to", got=str(error)
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    auto_class = f"AutoModelFor{'MaskedLM' if plan.model.bidirectional else 'CausalLM'}"
    return Exported(
        *(out, step_of(checkpoint), dtype, len(parts), sum(sizes.values()), files, tuple(tokenizer)),
        auto_class=auto_class,
    )


# ---- what is exported ------------------------------------------------------------------------------------------


def _plan_of(run_dir: Path) -> Plan:
    if not run_dir.is_dir():
        raise InputError(
            f"{run_dir} is not a run folder",
            where=str(run_dir),
            expected="a folder that `train` has written",
            got="a file" if run_dir.exists() else "no such folder",
            hint="name the folder that `train` said at its end, as runs/20261121-072001",
        )
    return load(run_dir / PLAN_FILE)


def _config_of(run_dir: Path, model: ModelSpec) -> dict[str, Any]:
    """The config of the folder that the run started from, or one written for the model."""
    if isinstance(model, TracedModel):
        raise InputError(
            f"the weights of {model.factory} are not written for others",
            where=f"{run_dir / PLAN_FILE}: model",
            expected="a model of the catalogue, of Hugging Face's config.json or of YAML",
            got=f"a module of its own, {model.name}",
        )
    kept = run_dir / DESCRIPTION_FOLDER / CONFIG_FILE
    return load_json(kept, "Hugging Face config.json") if kept.exists() else write_hf_config(model)


def _parts_of(model: ModelSpec, family: str, reader: CheckpointReader) -> dict[str, list[_Part]]:
    """Tensor of the files -> what it is put together from; in an order in which parts of one parameter are neighbours.

    Raises InputError where the checkpoint is of another model.
    """
    parts: dict[str, list[_Part]] = {}
    for name, (shape, places) in places_in(model, family).items():
        reader.require(name, shape)
        stacked = len(places) > 1
        for index, place in enumerate(places):
            parts.setdefault(place.tensor, []).append(_Part(name, index if stacked else None, place))
    return parts


def _elements(parts: list[_Part]) -> int:
    return torch.Size(parts[0].place.shape).numel()


# ---- writing it -------------------------------------------------------------------------------------------------


def _write_weights(
    folder: Path,
    parts: dict[str, list[_Part]],
    sizes: dict[str, int],
    reader: CheckpointReader,
    dtype: torch.dtype,
    shard_bytes: int,
) -> tuple[str, ...]:
    """Files of at most `shard_bytes`, or one tensor, and their index if there are several; their names."""
    shards = _shards(sizes, shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [WEIGHTS_FILE]
    assembled = _assembled(parts, reader, dtype)
    for file, shard in zip(names, shards, strict=True):
        tensors = dict(islice(assembled, len(shard)))
        assert list(tensors) == shard, "tensors come in the order of their sizes"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        os.chmod(folder / file, 0o644)  # safetensors lets nobody else read it
    if len(shards) > 1:
        of_tensor = {tensor: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": of_tensor}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return tuple(names)


def _shards(sizes: dict[str, int], most: int) -> list[list[str]]:
    """The tensors in order, cut where one more would be too much."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > most:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _assembled(
    parts: dict[str, list[_Part]], reader: CheckpointReader, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor of the files, contiguous. A parameter is held while the next tensor has a part of it."""
    held_name, held = "", torch.empty(0)
    for tensor, several in parts.items():
        whole = torch.empty(several[0].place.shape, dtype=dtype)
        for part in several:
            if part.name != held_name:
                held_name, held = part.name, reader.read(part.name)
            ours = held if part.expert is None else held[part.expert]
            target = whole[part.place.box(tuple(slice(0, length) for length in ours.shape))]
            target.copy_(ours.t() if part.place.transposed else ours)
        yield tensor, whole


def _require_free(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(
            f"{out} is there already",
            where=f"--out {out}",
            expected="a folder that is new or empty",
            got="a folder with files" if out.is_dir() else "a file",
            hint="another --out, or remove it",
        )


def _require_room(out: Path, needed: int) -> None:
    free = free_bytes(out)
    if free < needed:
        raise InputError(
            f"{out} has no room for the weights",
            where=f"--out {out}",
            expected=f"{needed / 2**30:.2f} GiB free",
            got=f"{free / 2**30:.2f} GiB free",
            hint="--out on another disk, or --dtype bf16",
        )
