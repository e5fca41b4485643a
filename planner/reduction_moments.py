"""When and with what a pipeline rank's gradients are reduced, as far as it may be fuller then than in a backward."""

from __future__ import annotations

from .gradient_moments import reducing_by_torch
from .in_flight import REDUCING, ROOT, SUMMED, TURNED, InFlight, sums_nothing
from .layout import RECOMPUTE_MODES
from .layout_costs import LayoutCosts
from .memory_bytes import LaterMoment, MemoryBytes, PartMemory


def reduction_moments(costs: LayoutCosts, *, over: bool) -> tuple[tuple[LaterMoment, ...], ...]:
    """Of each rank, the moments at which one with some assignment is fuller than at any of `costs.in_flight`. `over`:
    gradients are reduced when the schedule is over, not those of each chunk when that one's backwards are."""
    if costs.layout.pp == 1:
        return ()
    pipeline = costs.pipeline
    found = []
    for rank, moments in enumerate(reducing_by_torch(pipeline)):
        of_rank = [moment for moment in moments if not (over and any(moment.full))]
        each = (_reduction(costs, rank, moment) for moment in of_rank)
        found.append(tuple(one for one in each if one is not None and _may_be_fuller(costs, rank, one)))
    return tuple(found)


def _reduction(costs: LayoutCosts, rank: int, moment: InFlight) -> LaterMoment | None:
    """None where nothing is reduced."""
    phase = ROOT if ROOT in moment.gradients else REDUCING
    chunk = moment.gradients.index(phase)
    besides: dict[bool | None, MemoryBytes] = {}
    choices = [choice for choice, _ in costs.choices] or [None]
    for choice in choices:
        groups = _layers(costs, choice) if phase == REDUCING else _ends(costs, rank, chunk)
        most = max((part.reduction for part in groups), default=0.0)
        if most <= 0:
            return None
        # Outputs of stages are gone; inputs' halves of backwards leave gradients until the step is over.
        over = not any(moment.full) and not costs.layout.splits_backward
        gone = costs.fixed_memory[rank].activations if over else 0.0
        besides[choice] = MemoryBytes(transient=most, activations=-gone)
    return LaterMoment(moment, chunk, besides)


def _layers(costs: LayoutCosts, choice: bool | None) -> list[PartMemory]:
    return [segment.memory for segment in costs.segments_if(choice)]


def _ends(costs: LayoutCosts, rank: int, chunk: int) -> list[PartMemory]:
    return [part for of, part, _, _ in costs.end_parts(rank) if of == chunk]


def _may_be_fuller(costs: LayoutCosts, rank: int, one: LaterMoment) -> bool:
    """Unless at some moment of a backward the rank has as much of everything, and more of the group's chunk than what
    its reduction has besides."""
    more = max(size.total for size in one.besides.values())
    return not any(
        _covers(costs, held, one) and more <= _surplus(costs, rank, held, one) for held in costs.in_flight[rank]
    )


def _covers(costs: LayoutCosts, held: InFlight, one: LaterMoment) -> bool:
    """Whether at that moment of a backward each chunk has no less in flight, and gradients in no lesser phase."""
    for chunk, phase in enumerate(one.moment.gradients):
        allowed = (TURNED, SUMMED) if chunk == one.chunk else (phase, SUMMED)
        if held.phase(chunk) not in allowed or held.full[chunk] < one.moment.full[chunk]:
            return False
        if held.weight_only[chunk] < one.moment.weight_only[chunk]:
            return False
    return held.full[one.chunk] > one.moment.full[one.chunk]


def _surplus(costs: LayoutCosts, rank: int, held: InFlight, one: LaterMoment) -> float:
    """Bytes that a rank has more at that moment of a backward, in whatever mode. A microbatch's activations of a layer
    stand for the weights that take their place."""
    number = held.full[one.chunk] - one.moment.full[one.chunk]
    ends = 0.0
    for chunk, part, _, _ in costs.end_parts(rank):
        now, then = (part.totals.gradients[moment.phase(chunk)]["none"] for moment in (held, one.moment))
        ends += now - then + (number * part.held.total if chunk == one.chunk else 0.0)
    layers = [(part, mode) for choice in one.besides for part in _layers(costs, choice) for mode in RECOMPUTE_MODES]
    reducing = REDUCING in one.moment.gradients
    stays = min((number - 1) * part.held_by(mode).total for part, mode in layers) if reducing else 0.0
    if TURNED in held.gradients:
        return ends + stays + min(size.total for size in costs.turned(rank, held).besides.values())
    if not reducing:
        return ends + max(part.transient for part in _ends(costs, rank, one.chunk))
    first = sums_nothing(held)
    return ends + stays + min(part.transient_by(mode, never_summed=first) for part, mode in layers)
