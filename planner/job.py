"""TrainingJob: what is to be trained per step, and what the user has fixed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from profiles.store import Reader

from .layout import LAYOUT_KEYS, RECOMPUTE_MODES, RESHARD_CHOICES
from .pins import allows, pin_from_plain, plain_pin

PRECISIONS = ("fp32", "bf16", "fp16", "fp8")
TARGETS = ("meshwright", "megatron", "torchtitan")
OPTIMIZERS = ("adamw",)
OFFLOADS = ("none", "optimizer")

# What a user may pin (any key of a layout, and what its stages do) or ban (what has a plain value to stay at: 1, 0,
# off, none).
STAGE_KEYS = ("recompute", "reshard")
PINNABLE = (*LAYOUT_KEYS, *STAGE_KEYS)
BANNABLE = tuple(key for key in PINNABLE if key not in ("micro_batch", "schedule", "reshard"))
MOST_SEQUENCES = 10**9  # of a batch; whose divisors are looked at one by one
BANNED_VALUES = {"sequence_parallel": False, "zero": 0, "cp_style": "none", "recompute": "none"}  # of the others 1


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """One optimizer step's work: `global_batch` sequences of `sequence` tokens.

    `pins` maps a layout key to what is allowed for it (`planner.pins`); `bans` names axes that must stay at 1 (or
    off). `memory_limit_bytes` replaces the device's memory when it is not None. `expert_imbalance` is how many times
    its even share the fullest expert rank gets; a capacity drops or pads instead. `offload` is what lies in the host's
    memory ([Note: Offloaded moments] in `offload`). With a `document_length` sequences are packed documents that do not
    see each other, priced as if each had so many tokens (planner/packed_cost.py).
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
    offload: str = "none"
    document_length: float | None = None

    @property
    def tokens(self) -> int:
        return self.global_batch * self.sequence

    def allows(self, key: str, value: object) -> bool:
        """Whether pins and bans leave the layout key (or `recompute`) this value."""
        if key in self.pins and not allows(self.pins[key], value):
            return False
        return key not in self.bans or value == BANNED_VALUES.get(key, 1)

    @property
    def recompute_modes(self) -> tuple[str, ...]:
        """The recompute modes that pins and bans leave."""
        return tuple(mode for mode in RECOMPUTE_MODES if self.allows("recompute", mode))

    @property
    def reshard_choices(self) -> tuple[bool | None, ...]:
        """What pins leave a stage to choose from, where it has a choice."""
        return tuple(choice for choice in RESHARD_CHOICES if self.allows("reshard", choice))

    def to_dict(self) -> dict[str, Any]:
        return {
            "global_batch": self.global_batch,
            "sequence": self.sequence,
            "precision": self.precision,
            "optimizer": self.optimizer,
            "target": self.target,
            "memory_limit_bytes": self.memory_limit_bytes,
            "pins": {key: plain_pin(pin) for key, pin in self.pins.items()},
            "bans": list(self.bans),
            "expert_imbalance": self.expert_imbalance,
            "expert_capacity": self.expert_capacity,
            **({"offload": self.offload} if self.offload != "none" else {}),
            **({} if self.document_length is None else {"document_length": self.document_length}),
        }

    @classmethod
    def from_dict(cls, reader: Reader) -> TrainingJob:
        limit = reader.anything("memory_limit_bytes", default=None)
        capacity = reader.anything("expert_capacity", default=None)
        documents = reader.anything("document_length", default=None)
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
            global_batch=reader.integer("global_batch", minimum=1, maximum=MOST_SEQUENCES),
            sequence=reader.integer("sequence", minimum=1),
            precision=reader.text("precision", choices=PRECISIONS),
            optimizer=reader.text("optimizer", choices=OPTIMIZERS, default="adamw"),
            target=reader.text("target", choices=TARGETS, default="meshwright"),
            memory_limit_bytes=reader.number("memory_limit_bytes", above=0) if limit is not None else None,
            pins={key: pin_from_plain(pin) for key, pin in pins.items()},
            bans=tuple(bans),
            expert_imbalance=reader.number("expert_imbalance", minimum=1, default=1.0),
            expert_capacity=reader.number("expert_capacity", above=0) if capacity is not None else None,
            offload=reader.text("offload", choices=OFFLOADS, default="none"),
            document_length=reader.number("document_length", minimum=1) if documents is not None else None,
        )
        reader.finish()
        return job
