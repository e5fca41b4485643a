"""A Hugging Face config.json -> ModelSpec, by model_type; what cannot be expressed is refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from . import hf_readers_dense as dense
from . import hf_readers_experts as experts
from . import hf_readers_masked as masked
from .model import ModelSpec
from .store import Reader, load_json

CONFIG_FILE = "config.json"

_FAMILIES: Mapping[str, Callable[[Reader, str, str], ModelSpec]] = {
    "bert": masked.read_bert,
    "deepseek_v2": experts.read_deepseek_v2,
    "deepseek_v3": experts.read_deepseek_v3,
    "gpt2": dense.read_gpt2,
    "gpt_neox": dense.read_gpt_neox,
    "gpt_oss": experts.read_gpt_oss,
    "llama": dense.read_llama,
    "megatron-bert": masked.read_megatron_bert,
    "mistral": dense.read_mistral,
    "mixtral": experts.read_mixtral,
    "qwen2": dense.read_qwen2,
    "qwen3": dense.read_qwen3,
    "qwen3_moe": experts.read_qwen3_moe,
}


def read_hf_config(path: Path) -> ModelSpec:
    """The architecture in `path`, a config.json or a folder that holds one; the folder's name is the model's.

    Keys that are left out take the defaults of transformers' config class for the model_type. Keys that do
    not shape the network (dropout, token ids, dtype ...) are ignored. What the spec expresses and an executor
    does not train is read: `ModelSpec.features` names it, and that executor refuses the model.

    Raises:
        InputError: no such file, not JSON, a model_type that is not read, a value out of range, a
            contradiction, or a feature that ModelSpec cannot express; with the key path.
    """
    file = path / CONFIG_FILE if os.path.isdir(path) else path
    absolute = Path(os.path.abspath(file))
    name = absolute.parent.name if absolute.name == CONFIG_FILE else absolute.stem
    return read_hf_document(load_json(file, "Hugging Face config.json"), str(file), name)


def read_hf_document(document: object, source: str, name: str) -> ModelSpec:
    """`read_hf_config` of what such a file holds; `source` is where errors say that it stands."""
    reader = Reader(document, source=source)
    family = reader.text("model_type", choices=_FAMILIES)
    return _FAMILIES[family](reader, family, name or family)
