"""The questions whose answers say what would help: memory, each link, compute by a tenth, the batch by two."""

from __future__ import annotations

from dataclasses import replace

from profiles.cluster import ClusterSpec, LinkTier
from profiles.hardware import HardwareProfile
from profiles.points import CollectivePoint

from .question import Question

MORE = 1.1


def relaxed_questions(question: Question) -> list[tuple[str, Question]]:
    """(the change in words, the question with it); everything else stays as it is."""
    job, percent = question.job, f"+{MORE - 1:.0%}"
    found = [
        (
            f"device memory {percent}",
            replace(question, job=replace(job, memory_limit_bytes=MORE * question.limit_bytes)),
        ),
        (f"compute {percent}", replace(question, hardware=faster_compute(question.hardware))),
    ]
    found += [
        (
            f"{link.tier} bandwidth {percent}",
            replace(
                question,
                cluster=wider_link(question.cluster, index),
                hardware=wider_points(question.hardware, question.cluster, index),
            ),
        )
        for index, link in enumerate(question.cluster.links)
        if question.cluster.devices > 1
    ]
    twice = 2 * job.global_batch
    return [*found, (f"global batch {twice}", replace(question, job=replace(job, global_batch=twice)))]


def faster_compute(hardware: HardwareProfile) -> HardwareProfile:
    """GEMM and attention take 1/1.1 of their seconds; what memory bounds stays."""
    faster = {part: hardware.correction(part) / MORE for part in ("gemm", "attention")}
    return replace(hardware, corrections={**hardware.corrections, **faster})


def wider_link(cluster: ClusterSpec, index: int) -> ClusterSpec:
    """The tier's bandwidth, of every collective, times 1.1."""
    return replace(
        cluster,
        links=tuple(_wider(link) if position == index else link for position, link in enumerate(cluster.links)),
    )


def _wider(link: LinkTier) -> LinkTier:
    operations = tuple(
        replace(each, bandwidth_bytes_per_second=MORE * each.bandwidth_bytes_per_second) for each in link.operations
    )
    return replace(link, bandwidth_bytes_per_second=MORE * link.bandwidth_bytes_per_second, operations=operations)


def wider_points(hardware: HardwareProfile, cluster: ClusterSpec, index: int) -> HardwareProfile:
    """Measured collectives of groups that this tier carries: what takes longer than the smallest message does, / 1.1.

    Groups that cross several tiers count for the widest.
    """
    smallest: dict[tuple[str, int, int], CollectivePoint] = {}
    for point in hardware.collectives:
        key = (point.operation, point.ranks, point.stride)
        if key not in smallest or point.bytes < smallest[key].bytes:
            smallest[key] = point

    def scaled(point: CollectivePoint) -> CollectivePoint:
        if cluster.link_within(point.ranks * point.stride) != cluster.links[index]:
            return point
        least = min(smallest[point.operation, point.ranks, point.stride].seconds, point.seconds)
        return replace(point, seconds=least + (point.seconds - least) / MORE)

    return replace(hardware, collectives=tuple(scaled(point) for point in hardware.collectives))
