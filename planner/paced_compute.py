"""Compute at a pace: with as many ranks at work as there are at a time ([Note: Beside others] in contention.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

from profiles.hardware import HardwareProfile

from .compute_cost import ComputeModel
from .compute_seconds import ComputeCost
from .contention import Pace, ranks_that_share, with_ranks_at_work
from .layout import Layout

Price = Callable[[ComputeModel], ComputeCost]


class PacedCompute:
    """Prices parts once on the hardware as it was measured, and once for each number of ranks at work.

    `on` gives the same compute on other hardware.
    """

    def __init__(self, hardware: HardwareProfile, on: Callable[[HardwareProfile], ComputeModel]) -> None:
        self._hardware, self._on = hardware, on
        self.measured = on(hardware)
        self._with_active: dict[tuple[float, int], ComputeModel] = {}
        self._priced: dict[tuple[object, ...], ComputeCost] = {}

    def part(self, layout: Layout, name: str, logits_again: bool, pace: Pace) -> ComputeCost:
        """A layer of the kind `name`, the `embedding` or the `head`, whose logits may be computed again."""
        grid = (layout.ep, layout.etp) if name == "experts" else (1, 1)  # all else is alike whatever that is
        key = (
            *(name, layout.tp, layout.cp, layout.cp_style, layout.sequence_parallel, layout.micro_batch),
            *(grid, logits_again),
        )

        def price(compute: ComputeModel) -> ComputeCost:
            own = (id(compute), *key)
            if own not in self._priced:
                ends = {"embedding": compute.embedding, "head": compute.head}
                self._priced[own] = ends[name](layout) if name in ends else compute.block(layout, name)
            return self._priced[own]

        return self._at(pace, layout, price)

    def microbatch(self, layout: Layout, pace: Pace) -> ComputeCost:
        return self._at(pace, layout, lambda compute: compute.microbatch())

    def _at(self, pace: Pace, layout: Layout, price: Price) -> ComputeCost:
        """Each number of ranks for its share of the work."""
        if not pace.working:
            return price(self.measured) * pace.slowest
        first, *others = (price(self._with(active, layout)) * (share * pace.slowest) for active, share in pace.working)
        return reduce(ComputeCost.__add__, others, first)

    def _with(self, active: float, layout: Layout) -> ComputeModel:
        """Compute with so many at work of the ranks that share something."""
        ranks = ranks_that_share(self._hardware, layout)
        if active == ranks:
            return self.measured
        if (active, ranks) not in self._with_active:
            self._with_active[active, ranks] = self._on(with_ranks_at_work(self._hardware, active, ranks))
        return self._with_active[active, ranks]
