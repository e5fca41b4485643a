"""First values from a Hugging Face folder: each rank reads the part of each tensor that its layout gives it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from planner.plan import Plan, Stage
from profiles.hf_config import CONFIG_FILE, read_hf_config
from profiles.input_error import InputError
from profiles.lists_in_words import first_of
from profiles.model import ModelSpec
from profiles.traced_model import TracedModel

from .hf_files import TensorFiles
from .hf_names import FAMILIES, Place, full_name, head_of, is_no_parameter, places_of
from .local_parameters import local_part
from .parameters import named_buffers, named_parameters, own_box
from .transformer import Chunk, build_chunk

_SHOWN = 3  # of the tensors that are wrong in the same way
_ROWS = 4096  # of an embedding that are compared at once

Places = dict[str, tuple[torch.Size, tuple[Place, ...]]]  # our name -> whole shape, and where it stands


def places_in(model: ModelSpec, family: str) -> Places:
    """Everything that a model holds, in the order of the chain."""
    chunk = build_chunk(model, Stage.whole(model))
    held = (*named_parameters([chunk]), *named_buffers([chunk]))
    return {name: (tensor.shape, places_of(family, name, tensor.shape)) for name, tensor in held}


def load_weights(folder: Path, chunks: Sequence[Chunk], model: ModelSpec) -> None:
    """Fill this rank's chunks, which have memory, in place; values are cast to the parameters' dtype.

    Raises InputError for whatever `check_weights` would find, but a head that is not tied in the file.
    """
    family = _family_of(folder, model)
    places = places_in(model, family)
    with TensorFiles(folder) as files, torch.no_grad():
        name_in = _matched(files, places, family, model)
        for name, tensor in (*named_parameters(chunks), *named_buffers(chunks)):
            own, box = local_part(tensor), own_box(tensor)
            _, there = places[name]
            stacked = len(there) > 1
            for index, place in enumerate(there[box[0]] if stacked else there):
                target = own[index] if stacked else own
                if target.numel():
                    part = files.read(name_in[place.tensor], place.box(box[1:] if stacked else box))
                    part = part if place.expert is None else part[0]
                    target.copy_(part.t() if place.transposed else part)


def check_weights(folder: Path, model: ModelSpec) -> None:
    """Raise InputError unless the folder holds exactly the tensors of this model, each in its shape.

    Reads config and headers alone, and where a tied head has a tensor of its own, that and the embedding.
    """
    family = _family_of(folder, model)
    places = places_in(model, family)
    with TensorFiles(folder) as files:
        name_in = _matched(files, places, family, model)
        head = head_of(family)
        if model.tied_embeddings and head in files.file_of:
            _require_same(files, head, name_in[places["embedding.tokens.weight"][1][0].tensor])


def model_to_start_from(
    folder: Path | None, plan_file: Path | None, model: str | None, *, resume: bool = False
) -> str | None:
    """The model to plan for when a run starts `--from` a folder: `model`, or without a plan either the folder's own.

    Looks at the folder before anything is measured; raises InputError as `check_weights` does, and for a resumed run.
    """
    if folder is None:
        return model
    if resume:
        raise InputError(
            "--from and --resume do not go together",
            where="--from",
            expected="one of the two: a resumed run has its weights in its checkpoint",
            got="both",
        )
    if plan_file is not None or model is not None:
        return model
    with TensorFiles(folder):
        check_weights(folder, read_hf_config(folder))
    return os.path.abspath(folder)  # a catalogue name would outrank a folder of the same name


def check_before_start(folder: Path | None, plan: Plan) -> None:
    """`check_weights` for a run that starts from a folder, if it does."""
    if folder is not None and isinstance(plan.model, TracedModel):
        raise InputError(
            f"{plan.model.factory} makes its own first values",
            where="--from",
            expected="no folder: the factory may load what it likes",
            got=str(folder),
        )
    if folder is not None:
        check_weights(folder, plan.model)


# ---- parts -------------------------------------------------------------------------------------------------


def _family_of(folder: Path, model: ModelSpec) -> str:
    """The family whose names the folder uses; an InputError where its config is of another model than `model`."""
    with_names = read_hf_config(folder)
    theirs, ours = asdict(with_names), asdict(model)
    # A plan may call the model what it likes, and how many positions RoPE was made for changes no weight.
    left_out = {"name", "family"} | ({"max_positions"} if model.positions == "rope" else set())
    differing = [key for key in ours if key not in left_out and ours[key] != theirs[key]]
    if differing:
        raise InputError(
            f"{folder} holds another model than the plan's {model.name}",
            where=f"{folder / CONFIG_FILE}",
            expected=", ".join(f"{key} {ours[key]}" for key in differing),
            got=", ".join(f"{key} {theirs[key]}" for key in differing),
            hint=f"plan with --model {folder}",
        )
    if with_names.family not in FAMILIES:
        raise InputError(
            f"weights of the family {with_names.family} are not read",
            where=f"{folder / CONFIG_FILE}: model_type",
            expected="one of " + ", ".join(FAMILIES),
            got=with_names.family,
        )
    return with_names.family


def _matched(files: TensorFiles, places: Places, family: str, model: ModelSpec) -> dict[str, str]:
    """Full name -> the name in the files, of every tensor that the model needs. An InputError names what is wrong."""
    there = {full_name(family, name): name for name in files.file_of}
    wanted = {place.tensor: place.shape for _, several in places.values() for place in several}
    missing = [name for name in wanted if name not in there]
    if missing:
        raise _wrong(files, f"lacks tensors of {model.name}", missing, f"the tensor {missing[0]}", "no such tensor")
    spare = {head_of(family)} if model.tied_embeddings else set()
    extra = [there[name] for name in there if name not in wanted and name not in spare]
    extra = [name for name in extra if not is_no_parameter(family, name)]
    if extra:
        raise _wrong(files, f"has tensors that {model.name} has not", extra, "no tensor of this name", extra[0])
    for name, shape in wanted.items():
        tensor, got = there[name], files.shape(there[name])
        if got != shape:
            what = f"has a tensor of another shape than {model.name}"
            raise _wrong(files, what, [tensor], str(list(shape)), str(list(got)))
        files.require_numbers(tensor)
    return {name: there[name] for name in wanted}


def _wrong(files: TensorFiles, what: str, tensors: list[str], expected: str, got: str) -> InputError:
    return InputError(
        f"{files.folder} {what}: {first_of(tensors, _SHOWN)}",
        where=f"{files.file_of.get(tensors[0], files.folder)}: {tensors[0]}",
        expected=expected,
        got=got,
    )


def _require_same(files: TensorFiles, head: str, embedding: str) -> None:
    rows, width = files.shape(embedding)
    same = files.shape(head) == (rows, width)
    for first in range(0, rows if same else 0, _ROWS):
        box = (slice(first, min(first + _ROWS, rows)), slice(0, width))
        same = same and torch.equal(files.read(head, box), files.read(embedding, box))
    if not same:
        raise InputError(
            "the head is not the embedding, to which the config ties it",
            where=f"{files.file_of[head]}: {head}",
            expected=f"no such tensor, or the values of {embedding}",
            got="other values",
            hint='"tie_word_embeddings": false in config.json, and a plan made from it',
        )
