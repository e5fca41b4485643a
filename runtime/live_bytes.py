"""Bytes of every live tensor storage, op by op, and what they were for at the peak."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .local_parameters import local_part
from .ring_attention import seen_through


class LiveBytes(TorchDispatchMode):
    """Follows each storage from the op that returns it to its release, and every resize in between (FSDP2 frees and
    fills its gathered weights by resizing them). Works on real and on fake tensors.

    A storage counts under `purpose` as it stands when the storage appears; `book` moves it later, for the past
    too, since what a storage is for is often known only once something holds it.

    Fake tensors hold no numbers, so a number read from one is `number_read`.
    """

    def __init__(self, purpose: str, number_read: float = 1.0) -> None:
        super().__init__()
        self.purpose = purpose
        self._number_read = number_read
        self._serial_of: dict[int, int] = {}  # address of a live storage -> which one it is
        self._bytes: list[int] = []  # by serial, as of now
        self._purposes: list[str] = []  # by serial
        self._changes: list[tuple[int, int]] = []  # (serial, bytes more than before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented  # DTensor unfolds first; its plain ops come back here
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self._number_read if args[0].dtype.is_floating_point else int(self._number_read)
        if func is torch.ops._c10d_functional.wait_tensor.default and isinstance(args[0], FakeTensor):
            return args[0]  # as the real one does; that of fake tensors makes another (torch 2.13, `_wait_tensor_meta`)
        output = (seen_through(self, func) or func)(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return output

    def __enter__(self) -> LiveBytes:
        resize = self._resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._see(storage)
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def book(self, tensor: torch.Tensor | None, purpose: str) -> None:
        """Say what a live tensor's storage is for. One that no op has returned is none of ours."""
        if tensor is None:
            return
        local = local_part(tensor)
        if (serial := self._serial_of.get(local.untyped_storage()._cdata)) is not None:
            self._purposes[serial] = purpose

    @contextmanager
    def during(self, purpose: str) -> Iterator[None]:
        """New storages are for `purpose`."""
        before, self.purpose = self.purpose, purpose
        yield
        self.purpose = before

    def mark(self) -> int:
        """This moment, for `peak`."""
        return len(self._changes)

    def totals(self, purpose: str) -> list[int]:
        """Bytes of a purpose by mark: the entry of a mark is what was live at that moment."""
        changes = (more if self._purposes[serial] == purpose else 0 for serial, more in self._changes)
        return list(accumulate(changes, initial=0))

    def peak(self, start: int) -> dict[str, int]:
        """Bytes by purpose at the moment since `start` at which they were most in all."""
        total = most = 0
        worst: int | None = None
        for moment, (_, more) in enumerate(self._changes):
            total += more
            if moment >= start and total > most:
                most, worst = total, moment
        if worst is None:
            return {}
        summed: dict[str, int] = {}
        for serial, more in self._changes[: worst + 1]:
            purpose = self._purposes[serial]
            summed[purpose] = summed.get(purpose, 0) + more
        return {purpose: size for purpose, size in summed.items() if size}

    def _see(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if (serial := self._serial_of.get(address)) is None:
            serial = self._serial_of[address] = len(self._bytes)
            self._bytes.append(0)
            self._purposes.append(self.purpose)
            weakref.finalize(storage, self._release, address)
        self._change(serial, size)

    def _release(self, address: int) -> None:
        self._change(self._serial_of.pop(address), 0)

    def _change(self, serial: int, size: int) -> None:
        if size != self._bytes[serial]:
            self._changes.append((serial, size - self._bytes[serial]))
            self._bytes[serial] = size
