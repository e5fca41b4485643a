"""The verb that writes what other programs read; today a run's weights for Hugging Face's transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli_parts import Json, print_json, print_report

if TYPE_CHECKING:
    from rich.console import RenderableType


def export(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a training run.")],
    to: Annotated[str, typer.Option("--to", help="For whom: hf (transformers).")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write; default inside RUN.")] = None,
    step: Annotated[int | None, typer.Option("--step", min=1, help="Of which checkpoint; default the last.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="fp32 (as trained) or bf16.")] = "fp32",
    as_json: Json = False,
) -> None:
    """Write a run's weights so that others load them; needs neither its ranks nor its layout."""
    if to not in _TARGETS:
        from profiles.input_error import InputError

        raise InputError(f"{to!r} is not known", where="--to", expected="one of " + ", ".join(_TARGETS), got=to)
    document, report = _TARGETS[to](source, out, step, dtype)
    print_json(document) if as_json else print_report(report)


def _export_to_hugging_face(
    run_dir: Path, out: Path | None, step: int | None, dtype: str
) -> tuple[dict[str, Any], RenderableType]:
    from runtime.hf_export import export_run
    from runtime.progress import spinner

    with spinner(f"writing the weights of {run_dir}"):
        found = export_run(run_dir, out, step=step, dtype=dtype)
    files = found.files[0] if len(found.files) == 1 else f"{len(found.files)} files and their index"
    tokenizer = ", ".join(found.tokenizer) or "none: the run has none recorded"
    lines = (
        f"step {found.step} of {run_dir}: {found.tensors} tensors in {found.dtype}, "
        f"{found.weight_bytes / 2**20:.1f} MiB, in {files}",
        f"tokenizer: {tokenizer}",
        f"load it with: {found.auto_class}.from_pretrained({str(found.folder)!r})",
    )
    return found.to_dict(), "\n".join(lines)


# Target -> what writes for it and tells as a document and for a person.
_TARGETS: Mapping[str, Callable[..., tuple[dict[str, Any], Any]]] = {"hf": _export_to_hugging_face}
