"""How many numbers of the model somebody chose: the nominal figures behind a set of predictions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields

from profiles.hardware import HardwareProfile

from .run_case import RunCase

_NOMINAL_LINK = re.compile(r"\b(bandwidth|latency): nominal")
_ATTENTION_OF = {"fp8": "bf16"}  # attention stays in bf16 where the GEMMs are fp8


def free_constants(cases: Iterable[RunCase], hardware: Mapping[str, HardwareProfile]) -> tuple[str, ...]:
    """The name of each free constant that the predictions of `cases` use.

    Free is a figure of the hardware catalogue whose source calls it `nominal`: a data sheet's figure times an
    efficiency that somebody stated, or a value that somebody held to be usual, where nobody published a
    measurement. It could have been another; none of them was fitted to a row. Not counted: published and measured
    figures; the facts of a trainer, which are yes/no or one of a list; counts that follow from code (passes over
    memory, operations of a schedule). A figure counts once for each device or cluster that has it, even where it
    is the same one carried over, and only if a case uses that device, its precision or that tier.
    """
    found: set[str] = set()
    for case in cases:
        profile = hardware[case.hardware]
        found |= _of_device(profile, case.job.precision)
        for link in case.cluster.links:
            for quantity in _NOMINAL_LINK.findall(link.source):
                found.add(f"{case.cluster.name}: {link.tier} {quantity}")
    return tuple(sorted(found))


def _of_device(profile: HardwareProfile, precision: str) -> set[str]:
    scalars = {f.name for f in fields(profile)}
    found = {
        f"{profile.name}: {name}"
        for name, source in profile.provenance.items()
        if name in scalars and str(source).startswith("nominal")
    }
    dtypes = {precision, _ATTENTION_OF.get(precision, precision)}
    for model in profile.gemm_models:
        if model.dtype in dtypes and model.source.startswith("nominal"):
            found.add(f"{profile.name}: {model.dtype} GEMM rate")
    for model in profile.attention_models:
        if model.dtype == _ATTENTION_OF.get(precision, precision) and model.source.startswith("nominal"):
            found |= {f"{profile.name}: {model.dtype} attention {way}" for way in ("forward", "backward")}
    return found
