"""sudo python benchmarks/two_nodes.py [--rate 1gbit | --rate 100mbit | --delay-ms 5]: a plan for two nodes, tried.

Two network namespaces with a shaped link stand for two nodes of two ranks each. Profiles them under torchrun (they
must come out as two tiers), prices every legal layout of a small model, runs them all across the link, in turns with
the profiler as closed_loop.py does, and prints predicted beside measured and the regret of the planner's choice. Needs
root, iproute2, and /dev/net/tun for --delay-ms.
"""

from __future__ import annotations

import collections
import datetime
import fcntl
import multiprocessing
import os
import platform
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # before this folder, where `runtime` is a benchmark

import closed_loop
from side_by_side import Turns, read_cases, run_layouts, save_plans

from profiles.cluster import ClusterSpec, save_cluster
from profiles.hardware import HardwareProfile, save_hardware
from profiles.probes.profiler import ProfileOptions, is_first, profile_machine

RANKS_PER_NODE = 2
SPACES = ("meshwright0", "meshwright1")
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_TIMEOUT_SECONDS = 900


def shell(command: str, *, check: bool = True) -> None:
    subprocess.run(command.split(), check=check, capture_output=not check)


@contextmanager
def two_namespaces(rate: str | None, delay_ms: float) -> Iterator[list[str]]:
    """Two namespaces joined by a link; gives the interface of each. Both are removed at the end."""
    remove()
    for space in SPACES:
        shell(f"ip netns add {space}")
        shell(f"ip -n {space} link set lo up")
    relay = None
    try:
        if delay_ms:
            ready = multiprocessing.Event()
            relay = multiprocessing.Process(target=relay_packets, args=(delay_ms / 1e3, ready), daemon=True)
            relay.start()
            assert ready.wait(10), "the relay did not start"
            names = ["tun0", "tun1"]
        else:
            shell("ip link add mwveth0 type veth peer name mwveth1")
            names = ["mwveth0", "mwveth1"]
            for i, (space, name) in enumerate(zip(SPACES, names, strict=True)):
                shell(f"ip link set {name} netns {space}")
                shell(f"ip -n {space} addr add 10.77.0.{i + 1}/24 dev {name}")
                shell(f"ip -n {space} link set {name} up")
        if rate:
            for space, name in zip(SPACES, names, strict=True):
                shell(f"ip netns exec {space} tc qdisc add dev {name} root tbf rate {rate} burst 64kb latency 400ms")
        yield names
    finally:
        if relay is not None:
            relay.kill()
        remove()


def remove() -> None:
    for space in SPACES:
        shell(f"ip netns del {space}", check=False)


def relay_packets(delay_seconds: float, ready: Any) -> None:
    """Carry packets between a TUN device in each namespace, each after the delay; the kernel here has no netem."""
    files = []
    for i, space in enumerate(SPACES):
        file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH", f"tun{i}".encode(), _IFF_TUN | _IFF_NO_PI))
        files.append(file)
        shell(f"ip link set tun{i} netns {space}")
        shell(f"ip -n {space} addr add 10.77.0.{i + 1}/24 dev tun{i}")
        shell(f"ip -n {space} link set tun{i} mtu 9000 up")
    ready.set()
    waiting: collections.deque[tuple[float, int, bytes]] = collections.deque()
    while True:
        while waiting and waiting[0][0] <= time.perf_counter():
            _, file, packet = waiting.popleft()
            os.write(file, packet)
        patience = max(0.0, waiting[0][0] - time.perf_counter()) if waiting else 1.0
        for file in select.select(files, [], [], patience)[0]:
            other = files[1 - files.index(file)]
            while True:
                try:
                    waiting.append((time.perf_counter() + delay_seconds, other, os.read(file, 65536)))
                except BlockingIOError:
                    break


class Ranks:
    """A command under torchrun, RANKS_PER_NODE ranks of it in each namespace."""

    def __init__(self, names: list[str], command: list[str], port: int) -> None:
        self._command, self._started = command, []
        for node, (space, name) in enumerate(zip(SPACES, names, strict=True)):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node)]
            torchrun += ["--nproc-per-node", str(RANKS_PER_NODE), "--master-addr", "10.77.0.1"]
            environment = os.environ | {"GLOO_SOCKET_IFNAME": name, "OMP_NUM_THREADS": "1"}
            output = None if node == 0 else subprocess.DEVNULL
            line = ["ip", "netns", "exec", space, *torchrun, "--master-port", str(port), *command]
            self._started.append(subprocess.Popen(line, env=environment, stdout=output))

    def check(self) -> None:
        """Raise if some of them have failed."""
        codes = [process.poll() for process in self._started]
        assert not any(codes), f"exit codes {codes} of {' '.join(self._command)}"

    def end(self) -> None:
        """Wait for the end; kill what has not come to it in time."""
        try:
            for process in self._started:
                process.wait(timeout=_TIMEOUT_SECONDS)
            self.check()
        finally:
            for process in self._started:
                process.kill()


def main() -> None:
    options = closed_loop.parser(__doc__)
    options.add_argument("--rate", help="of the link, as tc writes it: 1gbit, 100mbit; default unshaped")
    options.add_argument("--delay-ms", type=float, default=0.0, help="each way")
    options.add_argument("--ranks", nargs=4, metavar=("FOLDER", "COUNT", "TURNS", "ROUNDS"), help="for the ranks")
    options.add_argument("--measure", type=Path, metavar="FILE", help="a profile's, for the ranks")
    options.add_argument("--budget", type=float, default=60.0, help="seconds for each profile")
    options.set_defaults(model=None, global_batch=8, turns=2, rounds=2)
    arguments = options.parse_args()
    if arguments.ranks:
        folder, *numbers = arguments.ranks
        run_layouts(Path(folder), *map(int, numbers))
        return
    if arguments.measure:
        measure(arguments.measure, arguments.budget)
        return
    (model,) = arguments.model or ["demo"]
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    print(f"{now}  {platform.node()}  {os.cpu_count()} cores  torch {torch.__version__}  {' '.join(sys.argv)}")
    with tempfile.TemporaryDirectory() as scratch, two_namespaces(arguments.rate, arguments.delay_ms) as names:
        folder = arguments.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        profiles = [profiled(names, folder, 0, arguments.budget)]
        plans = closed_loop.chosen_plans(closed_loop.question(arguments, model, *profiles[0]), arguments)
        save_plans(plans, folder)
        numbers = [str(n) for n in (len(plans), arguments.turns, arguments.rounds)]
        ranks = Ranks(names, [__file__, "--ranks", str(folder), *numbers], 29611)
        turns = Turns(folder, ranks.check)
        for turn in range(arguments.turns):
            turns.take()
            profiles.append(profiled(names, folder, turn + 1, arguments.budget))
        turns.watch()
        ranks.end()
        hardware, cluster = closed_loop.merged(profiles)
        print(f"\n{cluster.nodes} nodes of {cluster.devices_per_node}")
        for link in cluster.links:
            bandwidth, latency = link.bandwidth_bytes_per_second, link.latency_seconds
            print(f"  {link.tier}: span {link.span}, {bandwidth / 1e6:,.1f} MB/s a rank, {latency * 1e3:.2f} ms a step")
        anew = [closed_loop.priced_anew(plan, hardware, cluster) for plan in plans]
        closed_loop.report(read_cases(anew, folder, 2 * RANKS_PER_NODE), hardware, arguments)


def profiled(names: list[str], folder: Path, number: int, budget: float) -> tuple[HardwareProfile, ClusterSpec]:
    """What the profiler finds under torchrun on both nodes."""
    written = folder / f"profile{number}.yaml"
    Ranks(names, [__file__, "--measure", str(written), "--budget", str(budget)], 29613 + number).end()
    return closed_loop.load_profile(folder, number)


def measure(file: Path, budget: float) -> None:
    """One rank of the profiler; the quick cases alone are more than half a minute's work for two ranks a core."""
    options = ProfileOptions(ranks=2 * RANKS_PER_NODE, thoroughness="quick", dtypes=("fp32",), budget_seconds=budget)
    findings = profile_machine(options, " ".join(sys.argv))
    if is_first():
        save_hardware(findings.hardware(), file)
        save_cluster(findings.cluster("local"), file.with_suffix(".cluster.yaml"))


if __name__ == "__main__":
    main()
