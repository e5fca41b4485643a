"""The order of samples: what megatron-core's GPT and blended datasets have, index by index and token by token."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from profiles.input_error import InputError
from runtime.data import split_samples
from runtime.data.blend import parse_blend
from runtime.data.index_cache import cached_arrays
from runtime.data.indexed_tokens import IndexedTokens, open_indexed_tokens
from runtime.data.sample_order import Epochs, build_order, epochs_for
from runtime.data.split_samples import DatasetSamples
from tests import megatron_core

SEQUENCE, SEED, VALIDATION = 16, 1234, 8
BLENDS = [["a"], ["0.3", "a", "0.7", "b"], ["1", "a"], ["3", "a", "1", "b", "0.5", "c"], ["a", "b"], ["a", "b", "c"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets a, b and c, of documents with 0 to 60, 200 and 9 tokens."""
    path, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, number, longest in (("a", 100, 60), ("b", 40, 200), ("c", 300, 9)):
        lengths = random.integers(0, longest, size=number)
        megatron_core.write(path / name, [random.integers(0, 1000, size=length) for length in lengths], np.uint16)
    return path


def opened(folder: Path, paths: Sequence[str], split: str, samples: int, seed: int = SEED) -> IndexedTokens:
    return open_indexed_tokens(
        parse_blend(located(folder, paths)),
        split,
        cache=folder / "indices",
        vocabulary=1000,
        training_samples=samples,
        validation_samples=VALIDATION,
        sequence=SEQUENCE,
        seed=seed,
    )


def located(folder: Path, paths: Sequence[str]) -> list[str]:
    return [str(folder / path) if path.isalpha() else path for path in paths]


# Of a's 2,900 tokens an epoch is 145 samples with the split 80,15,5: below, at and beyond one, two and three epochs.
@pytest.mark.parametrize("samples", [1, 40, 140, 150, 260, 275, 290, 400])
@pytest.mark.parametrize("paths", BLENDS, ids=" ".join)
def test_every_sample_is_megatrons(samples: int, paths: Sequence[str], folder: Path) -> None:
    for split in ("80,15,5", "9,1", "100"):
        theirs = megatron_core.datasets(
            located(folder, paths), split, (samples, VALIDATION), sequence=SEQUENCE, seed=SEED, cache=folder
        )
        if len(theirs[0]) < samples:  # without weights the epoch ends
            with pytest.raises(InputError, match="the data is over before the run"):
                opened(folder, paths, split, samples)
            continue
        ours = opened(folder, paths, split, samples)
        assert len(ours.training) == len(theirs[0])
        assert np.array_equal(ours.batch(1, samples), megatron_core.ids(theirs[0], samples))
        assert (ours.validation is None) == (theirs[1] is None)
        if ours.validation is not None:
            assert np.array_equal(ours.validation_batch(0, VALIDATION), megatron_core.ids(theirs[1], VALIDATION))


@pytest.mark.full
@pytest.mark.parametrize("case", range(150))
def test_every_sample_is_megatrons_at_random(case: int, tmp_path: Path) -> None:
    random = np.random.default_rng(case)
    names = "abcdef"[: random.integers(1, 7)]
    for name in names:
        lengths = random.integers(0, random.integers(2, 90), size=random.integers(60, 300))
        lengths[-40:] = np.maximum(lengths[-40:], 3)  # a split without a token loops for ever there
        documents = [random.integers(0, 1000, size=length) for length in lengths]
        megatron_core.write(tmp_path / name, documents, np.uint16)
    sequence, seed, samples = (int(random.integers(low, high)) for low, high in ((2, 40), (0, 1000), (1, 2000)))
    weights = [f"{weight:.3g}" for weight in random.uniform(0.05, 5, len(names))]
    paths = located(tmp_path, [word for pair in zip(weights, names, strict=True) for word in pair])
    split = f"{random.integers(60, 90)},{random.integers(8, 20)}"
    theirs = megatron_core.datasets(paths, split, (samples, VALIDATION), sequence=sequence, seed=seed, cache=tmp_path)
    ours = open_indexed_tokens(
        parse_blend(paths),
        split,
        cache=tmp_path / "indices",
        vocabulary=1000,
        training_samples=samples,
        validation_samples=VALIDATION,
        sequence=sequence,
        seed=seed,
    )
    assert np.array_equal(ours.batch(1, samples), megatron_core.ids(theirs[0], samples))
    assert np.array_equal(ours.validation_batch(0, VALIDATION), megatron_core.ids(theirs[1], VALIDATION))


def test_the_three_indices_are_megatrons(folder: Path) -> None:
    seen: list[Epochs] = []
    for samples in (100, 150, 275, 400):
        theirs = megatron_core.datasets(
            located(folder, ["a"]), "80,15,5", (samples, VALIDATION), sequence=SEQUENCE, seed=SEED, cache=folder
        )[0]
        ours = opened(folder, ["a"], "80,15,5", samples).training
        assert isinstance(ours, DatasetSamples)
        assert np.array_equal(ours.order.documents, theirs.document_index)
        assert np.array_equal(ours.order.samples, theirs.sample_index)
        assert np.array_equal(ours.order.shuffle, theirs.shuffle_index)
        seen.append(ours.epochs)
    assert {epochs.last_apart for epochs in seen} == {True, False}
    assert len({epochs.number for epochs in seen}) > 2


def test_epochs_by_hand() -> None:
    # 10 samples of 4 need 41 tokens; an epoch of 41 has them, one of 40 not.
    assert epochs_for(10, 41, 4) == Epochs(1, False)
    # The first of two epochs of 40 gives 9; the second is for one sample of its 9: shuffled apart. For 8 it is not.
    assert epochs_for(10, 40, 4) == Epochs(2, True)
    assert epochs_for(17, 40, 4) == Epochs(2, False)
    assert epochs_for(None, 40, 4) == Epochs(1, False)


def test_samples_are_cut_where_they_should_be_by_hand() -> None:
    order = build_order(np.array([3, 0, 6, 2]), 0, 4, Epochs(1, False), sequence=4, seed=0)
    lengths = np.array([3, 0, 6, 2])[order.documents]
    begins = np.cumsum(lengths) - lengths
    # 11 tokens are two samples of 4 with one more, that begin at tokens 0 and 4; the next would begin at 8.
    assert (begins[order.samples[1:, 0]] + order.samples[1:, 1]).tolist() == [4, 8]
    assert (order.samples[1:, 1] < lengths[order.samples[1:, 0]]).all()
    assert order.samples[0].tolist() == [0, 0]


def test_an_index_is_built_once(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"a{suffix}").write_bytes((folder / f"a{suffix}").read_bytes())
    built: list[int] = []

    def count(*arguments: object, **options: int) -> object:
        built.append(1)
        return build_order(*arguments, **options)  # pyright: ignore

    monkeypatch.setattr(split_samples, "build_order", count)

    def first_batch(samples: int = 100, seed: int = SEED) -> np.ndarray:
        return opened(tmp_path, ["a"], "80,20", samples, seed).batch(1, 4)

    before = first_batch()
    assert len(built) == 2  # training and validation
    assert np.array_equal(first_batch(99), before)  # as many epochs
    assert len(built) == 2
    assert not np.array_equal(first_batch(seed=SEED + 1), before)
    assert len(built) == 4
    assert sorted(len(path.name) for path in (tmp_path / "indices").iterdir()) == [24] * 4  # nothing half-made

    shorter = [np.arange(length) for length in range(90)]
    megatron_core.write(tmp_path / "a", shorter, np.uint16)  # other data under the same name
    first_batch()
    assert len(built) == 6


def test_a_folder_that_cannot_be_written_keeps_nothing(folder: Path) -> None:
    file = folder / "file"
    file.touch()
    tokens = open_indexed_tokens(
        parse_blend(located(folder, ["0.5", "a", "0.5", "b"])),
        "80,20",
        cache=file,  # not a folder
        vocabulary=1000,
        training_samples=20,
        validation_samples=VALIDATION,
        sequence=SEQUENCE,
        seed=SEED,
    )
    assert np.array_equal(tokens.batch(1, 20), opened(folder, ["0.5", "a", "0.5", "b"], "80,20", 20).batch(1, 20))


def test_a_kept_index_that_is_damaged_is_named(folder: Path, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"a{suffix}").write_bytes((folder / f"a{suffix}").read_bytes())
    opened(tmp_path, ["a"], "80,20", 10)
    for path in (tmp_path / "indices").glob("*/shuffle.npy"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="an index kept from an earlier run cannot be read") as error:
        opened(tmp_path, ["a"], "80,20", 10)
    assert error.value.hint == "remove the folder: it is built anew"


def test_what_a_killed_build_has_left_goes_and_what_is_being_written_stays(tmp_path: Path) -> None:
    left, fresh = tmp_path / ".partial-left", tmp_path / ".partial-fresh"
    for partial in (left, fresh):
        partial.mkdir()
        (partial / "index.npy").write_bytes(b"half")
    for path in (left, left / "index.npy"):
        os.utime(path, (0, 0))
    cached_arrays(tmp_path, {"of": "nothing"}, lambda: {"index": np.arange(3)})
    assert not left.exists()
    assert fresh.exists()
