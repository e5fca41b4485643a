"""Later: a tuple that is made when it is first looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, overload

Item = TypeVar("Item")


class Later(Sequence[Item], Generic[Item]):
    """What `make` returns, called once, when first needed: most layouts are ruled out by their seconds alone."""

    def __init__(self, make: Callable[[], tuple[Item, ...]]) -> None:
        self._make = make
        self._made: tuple[Item, ...] | None = None

    def _items(self) -> tuple[Item, ...]:
        if self._made is None:
            self._made = self._make()
        return self._made

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Item, ...]: ...
    def __getitem__(self, index: int | slice) -> Item | tuple[Item, ...]:
        return self._items()[index]

    def __len__(self) -> int:
        return len(self._items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._items() == tuple(other)

    def __hash__(self) -> int:
        return hash(self._items())
