"""megatron-core's data sets and loss scale, the oracles for ours, with what importing them warns of kept quiet."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what an accelerator would have
    import megatron.core
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import (
        GPTDataset,
        GPTDatasetConfig,
        _get_ltor_masks_and_position_ids,  # pyright: ignore[reportPrivateUsage]
    )
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import get_blend_from_list

__all__ = ["DType", "IndexedDataset", "datasets", "ids", "loss_scales", "masks_and_positions", "write"]


class _Tokenizer:
    """What a config asks of one."""

    vocab_size = 1000
    eod = 0
    unique_identifiers: ClassVar[dict[str, str]] = {"name": "test"}


def write(prefix: Path, documents: Sequence[np.ndarray], dtype: type[np.number[Any]]) -> None:
    """Documents of one sequence each; an empty one has none, as preprocess_data.py does it."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(document, [len(document)] if len(document) else [])  # pyright: ignore
    builder.finalize(f"{prefix}.idx")


def datasets(
    paths: Sequence[str], split: str, samples: tuple[int, int], *, sequence: int, seed: int, cache: Path
) -> list[Any]:
    """Training and validation as `pretrain_gpt.py --data-path … --split …` builds them."""
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence,
        blend=get_blend_from_list(list(paths)),
        split=split,
        tokenizer=_Tokenizer(),  # pyright: ignore
        path_to_cache=None,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [*samples, 0], lambda: True, config).build()[:2]


def ids(dataset: Any, samples: int) -> np.ndarray:
    """[samples, sequence + 1] of the first so many."""
    rows = [dataset[number] for number in range(samples)]
    return np.stack([np.append(row["tokens"].numpy(), row["labels"].numpy()[-1]) for row in rows])


def masks_and_positions(row: np.ndarray, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(what is hidden from each token [1, sequence, sequence], what counts, positions) of inputs [sequence] under
    --reset-position-ids --reset-attention-mask --eod-mask-loss."""
    return _get_ltor_masks_and_position_ids(torch.from_numpy(row), end, True, True, True, True)  # pyright: ignore


def loss_scales(
    overflows: Sequence[bool], *, initial: float, minimum: float, window: int, hysteresis: int
) -> list[float]:
    """The scale after each step, of which some overflow. Its numbers lie on a GPU; here they may lie where they are."""
    # The module alone: the package around it takes a while, and wants to have been built.
    path = Path(megatron.core.__path__[0]) / "optimizer" / "grad_scaler.py"
    spec = importlib.util.spec_from_file_location("grad_scaler", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tensor = torch.tensor
    with mock.patch.object(torch, "tensor", lambda value, dtype, device: tensor(value, dtype=dtype)):
        scaler = module.DynamicGradScaler(initial, minimum, 2.0, 0.5, window, hysteresis)
    found = []
    for overflow in overflows:
        scaler.update(overflow)
        found.append(scaler.scale.item())
    return found
