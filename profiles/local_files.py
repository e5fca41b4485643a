"""The two files that measuring writes: the profile of a device, and the cluster of those that were measured."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .catalogue import LOCAL, local_cluster_path, local_hardware_path
from .cluster import ClusterSpec, save_cluster
from .hardware import HardwareProfile, save_hardware


@dataclass(frozen=True)
class ProfileFiles:
    """Where profile and cluster go; `name` is what the cluster calls its hardware."""

    hardware: Path
    cluster: Path
    name: str

    @classmethod
    def at(cls, output: Path | None) -> ProfileFiles:
        """Those of `local`, or OUTPUT and, beside it, OUTPUT with .cluster before its suffix."""
        if output is None:
            return cls(local_hardware_path(), local_cluster_path(), LOCAL)
        return cls(output, output.with_suffix(f".cluster{output.suffix or '.yaml'}"), os.path.realpath(output))

    def write(self, hardware: HardwareProfile, cluster: ClusterSpec) -> None:
        """Each file whole or not at all."""
        save_hardware(hardware, self.hardware)
        save_cluster(cluster, self.cluster)
