"""Optimizer state in the host's memory: where that can be, and what bringing it to the device and back takes.

[Note: Offloaded moments]
AdamW's two moments lie in pinned host memory. In the update each tensor's come to the device, are updated there, and go
back, one tensor after the other: the device never holds more of them than one tensor's, and no copy hides behind
another. Weights and gradients stay on the device.
"""

from __future__ import annotations

from profiles.hardware import HardwareProfile

from .job import TrainingJob

_MOMENT_BYTES = 8  # two of a parameter, in fp32


def why_no_offload(job: TrainingJob, hardware: HardwareProfile) -> str | None:
    """The reason why the job's offload cannot be planned for this hardware."""
    if job.offload == "none":
        return None
    if job.target != "meshwright":
        return f"offload={job.offload} with target {job.target}: how it offloads is not modelled"
    if hardware.backend == "gloo":
        return f"offload={job.offload}: {hardware.name} is a CPU, whose memory is the host's already"
    if hardware.host_to_device_bytes_per_second is None or hardware.device_to_host_bytes_per_second is None:
        return (
            f"offload={job.offload}: the hardware profile {hardware.name} does not say how fast host and device "
            "exchange bytes; profile the machine"
        )
    return None


def transfer_seconds(job: TrainingJob, hardware: HardwareProfile, parameters: float) -> float:
    """Seconds that a rank's moments of so many parameters take to the device and back."""
    there, back = hardware.host_to_device_bytes_per_second, hardware.device_to_host_bytes_per_second
    if job.offload == "none" or there is None or back is None:
        return 0.0
    return _MOMENT_BYTES * parameters * (1 / there + 1 / back)


def passing_moments_bytes(job: TrainingJob, parameters: float) -> float:
    """What the moments of a tensor of so many parameters take on the device while they are updated."""
    return 0.0 if job.offload == "none" else _MOMENT_BYTES * parameters
