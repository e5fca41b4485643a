"""ClusterSpec: how many devices of which kind, their memory, and the tiers of links between them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .alpha_beta import AlphaBeta
from .input_error import InputError
from .store import Reader, dump_yaml, load_document, write_atomically

if TYPE_CHECKING:
    import networkx

SCHEMA = "meshwright.cluster/v1"
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv", "exchange")


@dataclass(frozen=True, kw_only=True)
class LinkOperation:
    """What one collective achieves on a tier where it differs from the tier's ring.

    `ranks` 0 holds for every group in the tier, another number only for groups of just so many ranks (a switch
    that reduces for all its devices at once). Other figures as in LinkTier.
    """

    operation: str
    ranks: int = 0
    bandwidth_bytes_per_second: float
    latency_seconds: float
    fixed_latency_seconds: float = 0.0
    ramp_bytes: float = 0.0
    source: str = ""

    @property
    def figures(self) -> AlphaBeta:
        return AlphaBeta(
            fixed_seconds=self.fixed_latency_seconds,
            step_seconds=self.latency_seconds,
            bandwidth_bytes_per_second=self.bandwidth_bytes_per_second,
            ramp_bytes=self.ramp_bytes,
        )

    @classmethod
    def from_dict(cls, reader: Reader) -> LinkOperation:
        operation = cls(
            operation=reader.text("operation", choices=COLLECTIVES),
            ranks=reader.integer("ranks", minimum=0, default=0),
            bandwidth_bytes_per_second=reader.number("bandwidth_bytes_per_second", above=0),
            latency_seconds=reader.number("latency_seconds", minimum=0),
            fixed_latency_seconds=reader.number("fixed_latency_seconds", minimum=0, default=0.0),
            ramp_bytes=reader.number("ramp_bytes", minimum=0, default=0.0),
            source=reader.text("source", default=""),
        )
        reader.finish()
        return operation


@dataclass(frozen=True, kw_only=True)
class LinkTier:
    """The links that join `span` devices: NVLink inside a node, the network across nodes.

    `bandwidth_bytes_per_second` is per device and direction, as a ring collective achieves it (bus
    bandwidth); `latency_seconds` is one step's of a ring, `fixed_latency_seconds` comes once a collective.
    `operations` are the collectives that differ from that ring. `shared` is one wire for all devices below this
    tier, whose share each device's bandwidth is: a message that goes alone has all of it. `source` says where the
    figures are from.
    """

    tier: str
    span: int
    bandwidth_bytes_per_second: float
    latency_seconds: float
    fixed_latency_seconds: float = 0.0
    operations: tuple[LinkOperation, ...] = ()
    shared: bool = False
    source: str = ""

    @classmethod
    def from_dict(cls, reader: Reader) -> LinkTier:
        link = cls(
            tier=reader.text("tier"),
            span=reader.integer("span", minimum=1),
            bandwidth_bytes_per_second=reader.number("bandwidth_bytes_per_second", above=0),
            latency_seconds=reader.number("latency_seconds", minimum=0),
            fixed_latency_seconds=reader.number("fixed_latency_seconds", minimum=0, default=0.0),
            operations=tuple(LinkOperation.from_dict(child) for child in reader.children("operations", default=[])),
            shared=reader.boolean("shared", default=False),
            source=reader.text("source", default=""),
        )
        reader.finish()
        return link

    def operation(self, name: str, ranks: int) -> LinkOperation:
        """How this tier carries collective `name` over `ranks` ranks: what fits best of what is known."""
        known = [o for o in self.operations if o.operation == name and o.ranks in (0, ranks)]
        if known:
            return max(known, key=lambda o: o.ranks)
        return LinkOperation(
            operation=name,
            bandwidth_bytes_per_second=self.bandwidth_bytes_per_second,
            latency_seconds=self.latency_seconds,
            fixed_latency_seconds=self.fixed_latency_seconds,
        )


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """`nodes` nodes of `devices_per_node` devices each; `links` from the narrowest tier to the widest.

    `hardware` names the profile of one device; `memory_bytes` is one device's memory.
    """

    name: str
    hardware: str
    nodes: int
    devices_per_node: int
    memory_bytes: float
    links: tuple[LinkTier, ...]

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node

    def link_within(self, span: int) -> LinkTier:
        """The narrowest tier whose links join `span` neighbouring devices."""
        for link in self.links:
            if link.span >= span:
                return link
        return self.links[-1]

    def graph(self) -> networkx.Graph:
        """Devices and switches as a tree; each edge carries its `tier` and bytes per second and device.

        A switch of a tier joins the switches (or devices) of the tier below it, so the widest tier on the
        path between two devices is the link that they share.
        """
        import networkx

        graph = networkx.Graph()
        below: list[Any] = list(range(self.devices))
        width = 1
        for link in self.links:
            per_switch = max(1, link.span // width)
            switches = [(link.tier, i) for i in range(-(-len(below) // per_switch))]
            for position, node in enumerate(below):
                graph.add_edge(
                    node,
                    switches[position // per_switch],
                    tier=link.tier,
                    bytes_per_second=link.bandwidth_bytes_per_second,
                )
            below, width = switches, link.span
        return graph

    def with_devices(self, devices: int) -> ClusterSpec:
        """The same cluster cut to `devices` devices: whole nodes, or a part of one node.

        Raises:
            InputError: none, more than there are, or a part of several nodes.
        """
        whole_nodes = devices % self.devices_per_node == 0
        if not 0 < devices <= self.devices or (devices > self.devices_per_node and not whole_nodes):
            raise InputError(
                f"{self.name} cannot be cut to {devices} devices",
                where="--devices",
                expected=f"1 to {self.devices_per_node}, or a multiple of {self.devices_per_node} up to {self.devices}",
                got=str(devices),
            )
        if devices <= self.devices_per_node:
            cut = replace(self, nodes=1, devices_per_node=devices)
        else:
            cut = replace(self, nodes=devices // self.devices_per_node)
        # The tier that joins them all is kept, as wide as they are; what is wider has nothing to join.
        narrower = [link for link in cut.links if link.span < devices and devices % link.span == 0]
        joining = next(link for link in cut.links if link.span >= devices)
        return replace(cut, links=(*narrower, replace(joining, span=devices)))

    def to_dict(self) -> dict[str, Any]:
        document = asdict(self)
        document["links"] = [asdict(link) for link in self.links]
        return document

    @classmethod
    def from_dict(cls, reader: Reader) -> ClusterSpec:
        cluster = cls(
            name=reader.text("name"),
            hardware=reader.text("hardware"),
            nodes=reader.integer("nodes", minimum=1, default=1),
            devices_per_node=reader.integer("devices_per_node", minimum=1),
            memory_bytes=reader.number("memory_bytes", above=0),
            links=tuple(LinkTier.from_dict(child) for child in reader.children("links")),
        )
        reader.finish()
        cluster.check(reader)
        return cluster

    def check(self, reader: Reader) -> None:
        """Raise an InputError where the tiers do not cover the devices."""
        if not self.links:
            raise reader.fail("links", "at least one tier of links", [])
        for index, link in enumerate(self.links):
            small, large = sorted((link.span, self.devices_per_node))
            if large % small:
                raise reader.fail(
                    f"links[{index}].span",
                    f"a divisor or a multiple of {self.devices_per_node} devices a node",
                    link.span,
                )
        for index in range(1, len(self.links)):
            narrow, wide = self.links[index - 1].span, self.links[index].span
            if wide <= narrow or wide % narrow:
                raise reader.fail(f"links[{index}].span", f"a multiple of the tier below, {narrow}", wide)
        if self.links[-1].span < self.devices:
            raise reader.fail(
                f"links[{len(self.links) - 1}].span",
                f"a widest tier that joins all {self.devices} devices",
                self.links[-1].span,
            )


def load_cluster_file(path: Path) -> ClusterSpec:
    """The cluster in a Meshwright YAML file."""
    return ClusterSpec.from_dict(load_document(path, schema=SCHEMA, kind="cluster"))


def save_cluster(cluster: ClusterSpec, path: Path) -> None:
    """Write the cluster to `path`, whole or not at all."""
    write_atomically(path, dump_yaml({"schema": SCHEMA, **cluster.to_dict()}))
