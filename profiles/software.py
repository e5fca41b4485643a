"""Software: placeholder, replaced by the catalogue's loader when merged."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Software:
    name: str
    family: str
    year: int
    attention: str
    norm: str
    activation: str
    dropout: bool
    residual: str
    cross_entropy: str
    logits: str
    optimizer: str
    gradients: str
    accumulation: str
    gradient_reduce: str
    weight_gather: str
    tp_overlap: bool
    p2p: str
    scatter_gather: bool
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def selective_keeps_matmuls(self) -> bool:
        return self.family in ("meshwright", "torchtitan", "fsdp", "nanotron")

    @property
    def on_fsdp2(self) -> bool:
        return self.family in ("meshwright", "torchtitan", "fsdp")

    @property
    def on_torch_pipeline(self) -> bool:
        return self.family in ("meshwright", "torchtitan")


def load_software(name: str) -> Software:
    base = dict(
        name="meshwright", family="meshwright", year=2026, attention="flash2", norm="fused", activation="eager",
        dropout=False, residual="eager", cross_entropy="eager", logits="fp32", optimizer="fused", gradients="fp32",
        accumulation="separate", gradient_reduce="overlapped", weight_gather="overlapped", tp_overlap=False,
        p2p="blocking", scatter_gather=False,
    )
    return Software(**base)
