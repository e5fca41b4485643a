"""TrainingJob: what is to be trained per step, and what the user has fixed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from profiles.store import Reader

PRECISIONS = ("fp32", "bf16", "fp16", "fp8")
TARGETS = ("meshwright", "megatron", "torchtitan")
OPTIMIZERS = ("adamw",)

# Layout keys a user may pin or ban.
PINNABLE = ("tp", "pp", "dp", "sequence_parallel", "zero", "micro_batch", "schedule", "recompute")
BANNABLE = ("tp", "pp", "dp", "sequence_parallel", "zero", "recompute")


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """One optimizer step's work: `global_batch` sequences of `sequence` tokens.

    `pins` maps a layout key to the one value allowed; `bans` names axes that must stay at 1 (or off).
    `memory_limit_bytes` replaces the device's memory when it is not None.
    """

    global_batch: int
    sequence: int
    precision: str = "bf16"
    optimizer: str = "adamw"
    target: str = "meshwright"
    memory_limit_bytes: float | None = None
    pins: dict[str, Any] = field(default_factory=dict)
    bans: tuple[str, ...] = ()
    expert_imbalance: float = 1.0
    expert_capacity: float | None = None

    @property
    def tokens(self) -> int:
        return self.global_batch * self.sequence

    @property
    def recompute_pin(self) -> str | None:
        """The one recompute mode allowed for every block, if the user fixed it."""
        return "none" if "recompute" in self.bans else self.pins.get("recompute")

    def to_dict(self) -> dict[str, Any]:
        return {
            "global_batch": self.global_batch,
            "sequence": self.sequence,
            "precision": self.precision,
            "optimizer": self.optimizer,
            "target": self.target,
            "memory_limit_bytes": self.memory_limit_bytes,
            "pins": dict(self.pins),
            "bans": list(self.bans),
        }

    @classmethod
    def from_dict(cls, reader: Reader) -> TrainingJob:
        limit = reader.anything("memory_limit_bytes", default=None)
        bans = reader.anything("bans", default=[])
        if not isinstance(bans, list) or not all(isinstance(ban, str) for ban in bans):
            raise reader.fail("bans", "a list of layout keys", bans)
        pins = reader.anything("pins", default={})
        if not isinstance(pins, dict):
            raise reader.fail("pins", "a mapping of layout key to value", pins)
        for key, known, found in (("pins", PINNABLE, list(pins)), ("bans", BANNABLE, bans)):
            if unknown := [name for name in found if name not in known]:
                raise reader.fail(key, "keys of " + ", ".join(known), unknown[0])
        job = cls(
            global_batch=reader.integer("global_batch", minimum=1),
            sequence=reader.integer("sequence", minimum=1),
            precision=reader.text("precision", choices=PRECISIONS),
            optimizer=reader.text("optimizer", choices=OPTIMIZERS, default="adamw"),
            target=reader.text("target", choices=TARGETS, default="meshwright"),
            memory_limit_bytes=reader.number("memory_limit_bytes", above=0) if limit is not None else None,
            pins=dict(pins),
            bans=tuple(bans),
        )
        reader.finish()
        return job
