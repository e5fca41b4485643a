"""Names on the command line -> specs: the catalogue, the user's files, and this machine once it is measured."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

from .cluster import ClusterSpec, load_cluster_file
from .hf_config import read_hf_config
from .input_error import InputError
from .model import ModelSpec, load_model_file

CATALOG = Path(__file__).parent / "catalog"
LOCAL = "local"

Kind = Literal["models", "clusters", "hardware"]

_YAML_SUFFIXES = (".yaml", ".yml")
_NODES = re.compile(r"[0-9]{1,9}")


def list_catalogue(kind: Kind) -> list[str]:
    """The names of one kind in the catalogue, in alphabetical order."""
    return sorted(path.stem for path in (CATALOG / kind).glob("*.yaml"))


def local_cluster_path() -> Path:
    """Where `cli.py profile` keeps what it found out about this machine and its links."""
    # The XDG base directory specification: an empty variable counts as unset.
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(cache)) / "meshwright" / "local-cluster.yaml"


def local_hardware_path() -> Path:
    """Where `cli.py profile` keeps what it measured on one device of this machine."""
    return local_cluster_path().with_name("local-hardware.yaml")


def resolve_model(text: str) -> ModelSpec:
    """The model that `text` names: a catalogue name, a Hugging Face folder or config.json, or a YAML file.

    A catalogue name outranks a folder of the same name, which `./name` still reaches.
    """
    if text in list_catalogue("models"):
        return load_model_file(CATALOG / "models" / f"{text}.yaml")
    if os.path.isdir(text) or text.endswith(".json"):
        return read_hf_config(Path(text))
    if text.endswith(_YAML_SUFFIXES):
        return load_model_file(Path(text))
    files = "a Hugging Face folder or config.json, a .yaml file, or package.module:factory"
    raise _unknown("models", text, flag="--model", files=files, tail=text.rpartition("/")[2])


def resolve_cluster(text: str) -> ClusterSpec:
    """The cluster that `text` names: a catalogue name, with its nodes as in `dgx-h100:64`, a YAML file, or `local`."""
    if text == LOCAL:
        path = local_cluster_path()
        _require_profile(path)
        return load_cluster_file(path)
    if text.endswith(_YAML_SUFFIXES):
        return load_cluster_file(Path(text))
    name, colon, nodes = text.partition(":")
    if name not in list_catalogue("clusters"):
        files = f"{LOCAL} (without a size), or a .yaml file"
        raise _unknown("clusters", text, flag="--cluster", files=files, tail=name)
    cluster = load_cluster_file(CATALOG / "clusters" / f"{name}.yaml")
    return _with_nodes(cluster, nodes, text) if colon else cluster


def resolve_hardware_path(name: str, *, where: str = "the cluster's hardware") -> Path:
    """The hardware profile of this name: in the catalogue, at a path, or `local`. `where` is who named it."""
    if name in list_catalogue("hardware"):
        return CATALOG / "hardware" / f"{name}.yaml"
    if name == LOCAL:
        _require_profile(local_hardware_path())
        return local_hardware_path()
    if os.path.isfile(name):
        return Path(name)
    raise _unknown("hardware", name, flag=where, files=f"{LOCAL}, or a .yaml file", tail=Path(name).stem)


def _with_nodes(cluster: ClusterSpec, nodes: str, text: str) -> ClusterSpec:
    most = cluster.links[-1].span // cluster.devices_per_node
    if not _NODES.fullmatch(nodes) or not 1 <= int(nodes) <= most:
        raise InputError(
            f"{text} does not say how many nodes",
            where="--cluster",
            expected=f"{cluster.name}:NODES with NODES a whole number from 1 to {most}",
            got=repr(nodes),
            hint=f"{cluster.name}:{most} is the largest, {most * cluster.devices_per_node} devices",
        )
    return replace(cluster, nodes=int(nodes))


def _require_profile(path: Path) -> None:
    if not os.path.isfile(path):
        raise InputError(
            "this machine has not been measured yet",
            where=str(path),
            expected="the file that `cli.py profile` writes",
            got="no such file",
            hint="run `cli.py profile` first, or name a cluster: " + ", ".join(list_catalogue("clusters")),
        )


def _unknown(kind: Kind, text: str, *, flag: str, files: str, tail: str) -> InputError:
    names = list_catalogue(kind)
    lowered = {name.lower(): name for name in names}
    near = difflib.get_close_matches(tail.lower(), lowered, 1)
    return InputError(
        f"{text!r} is neither in the catalogue nor a file that can be read",
        where=flag,
        expected=f"one of {', '.join(names)}; or {files}",
        got=repr(text),
        hint=f"is {lowered[near[0]]} meant?" if near else "cli.py profile --list shows the catalogue",
    )
