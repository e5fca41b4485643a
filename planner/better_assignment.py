"""A better assignment from a good one: layers move one at a time, off the critical path or to the stage beside."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from .bounds import fits
from .first_assignment import dealt_by_rank, moved, recompute_until_it_fits
from .layout import RECOMPUTE_MODES
from .layout_costs import LayoutCosts, StageCount
from .simulation import Path, StageSeconds, simulate

_CLIMBED = 3  # starts that are climbed from: which one leads farthest is not seen beforehand
_SIMULATIONS = 300  # for each of them, and as many again for the best as long as they help
_MOST_MOVES = 5000  # from one assignment, those that promise most
_MOST_PATHS = 40  # that a climb remembers: reading one takes about a thousandth of a simulation
_CERTAINLY_LONGER = 1 + 1e-9  # relative: a path's sum and the simulation's are rounded differently


class _Move(NamedTuple):
    """A layer's stage and mode change; `gain_seconds` on the critical path, which is negative where it gets shorter."""

    gain_seconds: float
    segment: int
    source: tuple[int, str]
    target: tuple[int, str]


def better_assignment(
    costs: LayoutCosts, counts: Sequence[StageCount], limit_bytes: float, modes: Sequence[str]
) -> tuple[StageCount, ...]:
    """The best found from `counts`, which fit, and, with chunks, from layers dealt out by rank with the wider chunks
    anywhere."""
    starts = [list(counts)]
    for widest in range(costs.layout.virtual_stages):
        start = dealt_by_rank(costs, modes, widest)
        recompute_until_it_fits(costs, start, limit_bytes, modes)
        if fits(costs, start, limit_bytes):
            starts.append(start)
    climbs = sorted((_Climb(costs, start, limit_bytes, modes) for start in starts), key=lambda climb: climb.seconds)
    for climb in climbs[:_CLIMBED]:
        climb.go_on()
    best = min(climbs, key=lambda climb: climb.seconds)
    while best.go_on():
        pass
    return min((tuple(best.counts), tuple(counts)), key=costs.step)


def quicker_by_neighbours(costs: LayoutCosts, counts: Sequence[StageCount], rounds: int) -> tuple[StageCount, ...]:
    """The assignment after so many times the layer that shortens the step most went from a stage to one beside it."""
    best, seconds = tuple(counts), costs.step(counts)
    for _ in range(rounds):
        priced = ((costs.step(other), other) for other in _neighbours(best))
        least, shortest = min(priced, key=lambda pair: pair[0], default=(seconds, best))
        if least >= seconds:
            break
        best, seconds = shortest, least
    return best


def _neighbours(counts: tuple[StageCount, ...]) -> Iterator[tuple[StageCount, ...]]:
    """One layer at a boundary goes across it, in the mode it has; no inner stage is left empty."""
    for here in range(len(counts) - 1):
        for source, target, order in ((here, here + 1, -1), (here + 1, here, 1)):
            held = counts[source]
            inner = 0 < source < len(counts) - 1
            if sum(blocks.total for blocks in held) <= inner:
                continue
            k = next(k for k in range(len(held))[::order] if held[k].total)
            mode = next(mode for mode in RECOMPUTE_MODES if held[k].of(mode))
            changed = list(counts)
            changed[source], changed[target] = moved(held, k, {mode: -1}), moved(counts[target], k, {mode: 1})
            yield tuple(changed)


class _Climb:
    """One assignment, made better move by move."""

    def __init__(self, costs: LayoutCosts, counts: list[StageCount], limit_bytes: float, modes: Sequence[str]) -> None:
        self._costs, self._limit, self._modes, self.counts = costs, limit_bytes, modes, counts
        self._durations = costs.durations(counts)
        simulation = simulate(costs.pipeline, self._durations, costs.hop_seconds)
        self.seconds, self._path = simulation.seconds, simulation.critical_path
        self._seen: dict[Path, float] = {}  # the latest that ruled a move out last, and their seconds as it is now

    def go_on(self) -> bool:
        """Take moves that shorten the pipeline for some simulations; whether there may be more of them."""
        left, before = _SIMULATIONS, self.seconds
        while left > 0:
            reached = self.seconds
            for move in self._moves():
                after = self._after(move)
                if after is None:
                    continue
                left -= 1
                if self._is_better(after) or left == 0:
                    break
            if self.seconds == reached:
                return False
        return self.seconds < before

    def _moves(self) -> list[_Move]:
        """Those that shorten the critical path most, if it stays the critical one."""
        return heapq.nsmallest(_MOST_MOVES, (move for move in self._every_move() if move.gain_seconds < 0))

    def _every_move(self) -> Iterator[_Move]:
        stages = range(self._costs.layout.stages)
        for k in range(len(self._costs.segments)):
            spent = {(s, mode): self._on_path(s, k, mode) for s in stages for mode in self._modes}
            for source in spent:
                if self.counts[source[0]][k].of(source[1]):
                    for target, seconds in spent.items():
                        yield _Move(seconds - spent[source], k, source, target)

    def _on_path(self, stage: int, segment: int, mode: str) -> float:
        """Seconds that a layer there adds to the critical path."""
        path, layer = self._path, self._costs.segments_of(stage)[segment].seconds
        return (
            path.forward[stage] * layer.forward.total
            + path.backward_input[stage] * (layer.backward_input.total + layer.recompute(mode).total)
            + path.backward_weight[stage] * layer.backward_weight.total
            + path.gather[stage] * layer.gather.total
            + path.reduce[stage] * layer.reduce.total
        )

    def _is_possible(self, move: _Move) -> bool:
        """Whether no inner stage is left empty and segments stay in the order of the model."""
        (source, _), (target, _), k = move.source, move.target, move.segment
        if source == target:
            return True
        if 0 < source < len(self.counts) - 1 and sum(blocks.total for blocks in self.counts[source]) == 1:
            return False
        earlier = (blocks.total for stage in self.counts[target + 1 :] for blocks in stage[:k])
        later = (blocks.total for stage in self.counts[:target] for blocks in stage[k + 1 :])
        return not any(earlier) and not any(later)

    def _after(self, move: _Move) -> list[StageCount] | None:
        """The assignment after the move, if it is one and fits."""
        if not self._is_possible(move):
            return None
        counts, stages = list(self.counts), (move.source[0], move.target[0])
        for stage, mode, more in ((*move.source, -1), (*move.target, 1)):
            counts[stage] = moved(counts[stage], move.segment, {mode: more})
        ranks = set(map(self._costs.pipeline.rank_of, stages))
        return counts if all(self._costs.rank_bytes(rank, counts) <= self._limit for rank in ranks) else None

    def _is_better(self, counts: list[StageCount]) -> bool:
        """Whether the pipeline gets shorter; then it is the assignment from now on.

        Most moves make some path long that ruled another out before, which spares their simulation: every path is a
        lower bound (`simulation.Path`).
        """
        changed = {
            stage: self._costs.stage_durations(stage, count)
            for stage, (count, own) in enumerate(zip(counts, self.counts, strict=True))
            if count is not own
        }
        if self._stays_long(changed):
            return False
        durations = [changed.get(stage, old) for stage, old in enumerate(self._durations)]
        simulation = simulate(self._costs.pipeline, durations, self._costs.hop_seconds)
        if simulation.seconds >= self.seconds:
            self._remember(simulation.critical_path)
            return False
        self.counts, self._durations = counts, durations
        self._seen = {path: path.seconds(durations, self._costs.hop_seconds) for path in self._seen}
        self.seconds, self._path = simulation.seconds, simulation.critical_path
        return True

    def _stays_long(self, changed: Mapping[int, StageSeconds]) -> bool:
        """Whether a path that is known is no shorter than the pipeline with these stages changed."""
        least = self.seconds * _CERTAINLY_LONGER
        for path, seconds in reversed(self._seen.items()):
            for stage, new in changed.items():
                seconds += path.stage_seconds(stage, new) - path.stage_seconds(stage, self._durations[stage])
            if seconds >= least:
                self._remember(path)
                return True
        return False

    def _remember(self, path: Path) -> None:
        """Behind all others, which is where the next look begins."""
        seconds = self._seen.pop(path, None)
        self._seen[path] = path.seconds(self._durations, self._costs.hop_seconds) if seconds is None else seconds
        if len(self._seen) > _MOST_PATHS:
            del self._seen[next(iter(self._seen))]
