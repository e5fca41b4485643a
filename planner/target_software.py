"""The facts of what carries out a plan: of the job's target, and of it where it compiles its blocks."""

from __future__ import annotations

from profiles.hardware import HardwareProfile
from profiles.model import ModelSpec
from profiles.software import Software, load_software

from .capabilities import CAPABILITIES
from .compile_rules import why_not_compiled
from .job import TrainingJob
from .layout import Layout


def eager_software(job: TrainingJob) -> Software:
    """The job's target as it runs block by block."""
    return load_software(CAPABILITIES[job.target].software).software


def compiled_software(job: TrainingJob, hardware: HardwareProfile) -> Software | None:
    """The same with blocks and loss compiled; None where it does not do so by default: other targets, and CPUs."""
    if job.target != "meshwright" or hardware.backend == "gloo":
        return None
    return load_software(CAPABILITIES[job.target].software).as_run("compile")


def software_of(job: TrainingJob, hardware: HardwareProfile, layout: Layout, model: ModelSpec) -> Software:
    """What runs this layout."""
    compiled = compiled_software(job, hardware)
    return eager_software(job) if compiled is None or why_not_compiled(layout, model) is not None else compiled
