"""Software: what a trainer of its year fuses, overlaps and keeps in which dtype; facts, each with its reason."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .catalogue import CATALOG
from .store import Reader, load_document

SCHEMA = "meshwright.software/v1"
FOLDER = CATALOG / "software"
EARLIEST_YEAR = 2017  # of the transformer (arXiv 1706.03762)

# Every fact and the values it may have; None is yes or no. There is no number among them, so nothing to fit.
FACTS: dict[str, tuple[str, ...] | None] = {
    "attention": ("unfused", "fused_softmax", "flash", "flash2", "flash3"),
    "norm": ("eager", "fused"),
    "activation": ("eager", "fused"),
    "rotation": ("eager", "fused"),
    "heads_layout": ("one_copy", "sequence_first"),
    "dropout": None,
    "residual": ("eager", "fused"),
    "cross_entropy": ("eager", "chain", "fused", "pieces", "fused_pieces"),
    "logits": ("fp32", "compute"),
    "optimizer": ("eager", "fused"),
    "gradients": ("fp32", "compute"),
    "accumulation": ("fused", "separate"),
    "gradient_reduce": ("after_backward", "overlapped"),
    "weight_gather": ("after_step", "overlapped"),
    "tp_overlap": ("none", "input_gradient", "own_shard", "pieces"),
    "p2p": ("blocking", "described", "overlapped", "overlapped_if_split"),
    "scatter_gather": None,
    "stage_layers": ("even", "by_cost"),
    "linear_bias": ("separate", "following", "epilogue"),
    "grouped_heads": ("native", "repeated"),
    "recomputed": ("whole", "as_needed"),
    "selective": ("core_attention", "keep_matmuls", "keep_half_matmuls"),
    "loss_metrics": None,
    "fp8_scaling": ("delayed", "dynamic"),
    "elementwise": ("scalar", "vectorized"),
    "shards": ("of_tensors", "of_buckets"),
    "cp_shards": ("contiguous", "balanced"),
    "overflow_check": ("tensor_by_tensor", "sums_read", "sums_read_clip_unscales", "one_kernel", "by_norm"),
    "mpu_layers": None,
    "peak_memory": ("allocated_gb", "reserved_gb", "reserved_gib"),
}
# Whose facts stand in for a trainer of which not even the family is known: the one most others were built from.
_FALLBACK_FAMILY = "megatron"
_NAME_AND_YEAR = re.compile(r"(?P<family>.*?)-?(?P<year>20[0-9]{2})")


@dataclass(frozen=True, kw_only=True)
class Software:
    """A trainer of its year. `reasons` says of every fact why, or where it is known from.

    `attention`: "unfused" (a chain of eager kernels), "fused_softmax" (scale, mask and softmax in one kernel, the s × s
    scores in memory), or the FlashAttention generation whose speed it has. "fused" is one kernel where "eager" is
    several: `activation` with its bias, `rotation` of positions, `residual` bias + dropout + sum, `cross_entropy` all
    of the loss ("chain": of the elementary operations that a loss over a vocabulary cut by tp is written in; "pieces":
    product, loss and gradients of some tokens at a time, so that the logits of a microbatch never exist as a whole;
    "fused_pieces": all but the products of a piece in one kernel).
    "compute" is the dtype of the GEMMs: `logits` as kept for the loss, `gradients` as accumulated and reduced.
    `accumulation` "fused" happens inside the weight-gradient GEMM. `gradient_reduce` and `weight_gather` (of a
    distributed optimizer or ZeRO) say whether compute goes on meanwhile; `tp_overlap` how far tp's collectives hide:
    "pieces" of them run beside the pieces of their GEMMs, "own_shard": a gather runs beside the product of the rank's
    own share, "input_gradient": those of the backward run beside the weight-gradient GEMM; `p2p` whether a pipeline
    stage computes while its messages are under way, or does so where backwards are split; "described": it waits, and
    the host besides for messages that say what comes. `scatter_gather`: stage boundaries are cut over tp and gathered
    on the other side (arXiv 2104.04473, section 4.1). `heads_layout`: queries, keys and values reach attention in a
    copy of one of them, or come in one tensor, the sequence first, and are copied until attention can take them
    ("sequence_first"). `stage_layers`: as many in each stage, or stages are filled up to an even share of the products'
    FLOPs, the head's included ("by_cost"). `linear_bias`: added in the GEMM ("epilogue"), by the kernel that follows
    (all but that of queries, keys and values) or by one of its own ("separate"). `grouped_heads` "repeated": keys and
    values are copied for each query head. A `recomputed` layer runs its forward again "whole", or "as_needed": until it
    has all that its backward reads. `selective` recomputation runs the core attention again, or all but the products
    and the attention, or but every second product. `loss_metrics`: cross-entropy and perplexity are taken of the logits
    besides the loss. `fp8_scaling` "dynamic" looks for the largest element of a tensor before it casts it.
    `elementwise` kernels of torch move one element at a time ("scalar") or as many as a load takes. `shards` of a
    distributed optimizer are cut out of the joined buckets, or of each tensor: copied together for a message (buckets
    of torch's DDP, all weights) and apart behind it. `cp_shards` of a sequence are one piece, of which the last attends
    to most, or two that together attend evenly. `overflow_check`, how fp16's gradients are looked at before a step: one
    after the other cast to fp32, summed and read by the host ("sums_read"; then unscaled, or while they are clipped),
    each norm too and no kernel for more than a tensor but Adam's ("tensor_by_tensor"); by one kernel, which unscales
    them; or by the norm alone. `mpu_layers`: Megatron-LM's own, autograd functions in Python on either side of the
    products; attention's dropout draws from a random state of its own, which the host puts in place and takes back, and
    a recomputed layer has the states it had. `peak_memory` as its runs print it: of tensors, or of the allocator's
    blocks, in 1e9 bytes or GiB.
    """

    name: str
    family: str
    year: int
    attention: str
    norm: str
    activation: str
    rotation: str
    heads_layout: str
    dropout: bool
    residual: str
    cross_entropy: str
    logits: str
    optimizer: str
    gradients: str
    accumulation: str
    gradient_reduce: str
    weight_gather: str
    tp_overlap: str
    p2p: str
    scatter_gather: bool
    stage_layers: str
    linear_bias: str
    grouped_heads: str
    recomputed: str
    selective: str
    loss_metrics: bool
    fp8_scaling: str
    elementwise: str
    shards: str
    cp_shards: str
    overflow_check: str
    mpu_layers: bool
    peak_memory: str
    reasons: dict[str, str]

    # What follows from the family: how PyTorch's own parts and Megatron's differ.

    @property
    def on_fsdp(self) -> bool:
        """State in fp32 shards, gathered in the compute dtype; else weights in that dtype beside a master copy."""
        return self.family in ("meshwright", "torchtitan", "fsdp1")

    @property
    def on_torch_pipeline(self) -> bool:
        """Pipelines by torch.distributed.pipelining."""
        return self.family in ("meshwright", "torchtitan")

    @property
    def separate_projections(self) -> bool:
        """Queries, keys and values, and the gate, have weights of their own; else they are one matrix."""
        return self.on_torch_pipeline

    def joined_tensors(self, tensors: int, joined: int, root: bool) -> int:
        """Parameter tensors of a layer that has so many with all weights apart, of which `joined` are parts of others.

        `root`: those of embedding or head, where none are.
        """
        return tensors if root or self.separate_projections else max(1, tensors - joined)

    @property
    def adds_first_gradient(self) -> bool:
        """16-bit gradients are added to fp32 buffers from the first microbatch on; else the first is left as it is."""
        return self.gradients == "fp32" and not self.on_fsdp

    @property
    def loss_in_pieces(self) -> bool:
        """The head's gradients are computed in its forward, a piece after the other ([Note: Loss in pieces])."""
        return self.cross_entropy in ("pieces", "fused_pieces")

    @property
    def compiled(self) -> bool:
        """Blocks are compiled, and the loss with them, which is how our runtime does it."""
        return self.cross_entropy == "fused_pieces"

    @property
    def head_of_predicted(self) -> bool:
        """The head of a masked language model looks at what is predicted alone ([Note: Masked language model])."""
        return self.family == "meshwright"

    def computes_meanwhile(self, split: bool) -> bool:
        """Whether a stage computes while its messages are under way; `split`: its backwards are split."""
        return self.p2p == "overlapped" or self.on_torch_pipeline or (split and self.p2p == "overlapped_if_split")

    @property
    def counts_tensors(self) -> bool:
        """The peak memory that runs print is of tensors, not of the blocks that the allocator reserved for them."""
        return self.peak_memory.startswith("allocated")

    @property
    def memory_unit_bytes(self) -> float:
        """What one unit of the peak memory that runs print is."""
        return 2.0**30 if self.peak_memory.endswith("gib") else 1e9

    @property
    def posts_receives_early(self) -> bool:
        """On gloo all receives of a pipeline's step are posted before its first action."""
        return self.family == "meshwright"

    @property
    def sums_alone(self) -> bool:
        """Weights that are neither cut nor widened stay out of FSDP2 ([Note: Gradient sum] in runtime/replicas.py)."""
        return self.family == "meshwright"

    @property
    def own_context_parallelism(self) -> bool:
        """cp as in runtime/context_parallel.py, of which it is known what it does besides attending and sending."""
        return self.family == "meshwright"

    @property
    def selective_keeps_matmuls(self) -> bool:
        """Selective recomputation keeps what GEMMs (or half of them) and attention give."""
        return self.selective != "core_attention"

    @classmethod
    def from_dict(cls, reader: Reader) -> Software:
        """Read the keys of a software from `reader`, all but `variants`."""
        facts = {fact: _fact(reader, fact) for fact in FACTS}
        why = reader.child("reasons")
        reasons = {fact: why.text(fact) for fact in FACTS}
        why.finish()
        return cls(
            name=reader.text("name"),
            family=reader.text("family"),
            year=reader.integer("year", minimum=EARLIEST_YEAR),
            reasons=reasons,
            **facts,
        )


@dataclass(frozen=True)
class Variant:
    """Facts of a run that switched on what `word` names, which the notes about the run then say."""

    word: str
    facts: dict[str, str | bool]
    reason: str


@dataclass(frozen=True)
class SoftwareEntry:
    """A file of the catalogue: the software as it comes, and what switches change."""

    software: Software
    variants: tuple[Variant, ...] = ()

    def as_run(self, notes: str) -> Software:
        """The software with the switches that the notes about a run name."""
        software, said = self.software, notes.lower()
        for variant in self.variants:
            if variant.word.lower() in said:
                reasons = software.reasons | dict.fromkeys(variant.facts, variant.reason)
                software = replace(software, reasons=reasons, **variant.facts)
        return software


def _fact(reader: Reader, fact: str) -> Any:
    choices = FACTS[fact]
    return reader.boolean(fact) if choices is None else reader.text(fact, choices=choices)


def load_software(name: str) -> SoftwareEntry:
    """The catalogue's entry of this name, which must be there (`list_software`)."""
    reader = load_document(FOLDER / f"{name}.yaml", schema=SCHEMA, kind="software")
    software = Software.from_dict(reader)
    variants = []
    switches = reader.child("variants", default={})
    for word in switches:
        switch = switches.child(word)
        reason = switch.text("reason")
        facts = {fact: _fact(switch, fact) for fact in FACTS if fact in switch}
        switch.finish()
        variants.append(Variant(word, facts, reason))
    reader.finish()
    return SoftwareEntry(software, tuple(variants))


def list_software() -> list[str]:
    """The names in the catalogue, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_all_software() -> dict[str, SoftwareEntry]:
    """Every entry of the catalogue by its name; a caller that resolves many names loads it once."""
    return {name: load_software(name) for name in list_software()}


def resolve_software(name: str, entries: Mapping[str, SoftwareEntry], notes: str = "") -> tuple[Software, str]:
    """The software of this name as a run with these notes had it, and a warning, "" where the catalogue has it.

    `name` is FAMILY-YEAR. Otherwise the nearest family (most words in common, then the most alike name) and in it
    the nearest year stand in; where no word is in common, megatron of the nearest year.
    """
    if name in entries:
        return entries[name].as_run(notes), ""
    near = _nearest(name, [entry.software for entry in entries.values()])
    warning = f"software {name or '(not stated)'} is not in the catalogue: {near.name} stands in for it"
    return entries[near.name].as_run(notes), warning


def _nearest(name: str, known: list[Software]) -> Software:
    found = _NAME_AND_YEAR.match(name)
    family = (found["family"] if found else name).lower()
    newest = max(software.year for software in known)
    year = int(found["year"]) if found else newest

    def likeness(other: str) -> tuple[int, float]:
        words, others = set(re.findall(r"[a-z]+", family)), set(re.findall(r"[a-z]+", other))
        return len(words & others), difflib.SequenceMatcher(None, family, other).ratio()

    best = max({software.family for software in known}, key=lambda other: (likeness(other), other))
    if likeness(best)[0] == 0:
        best = _FALLBACK_FAMILY
    years = [software for software in known if software.family == best]
    return min(years, key=lambda software: (abs(software.year - year), software.year))
