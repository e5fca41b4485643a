"""What the command line says of data: the options of `train`, and `data prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from runtime.data.data_options import DataOptions

Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="Text file or folder, as bytes; or prefixes of indexed datasets, 'A' or '0.3 A 0.7 B'; repeatable. "
        "Default Python's library.",
    ),
]
Split = Annotated[
    str | None, typer.Option("--split", help="Indexed data for training, validation, test; default 969,30,1.")
]
Tokenizer = Annotated[
    str | None, typer.Option("--tokenizer", help="Model folder or tokenizer.json that the data was prepared with.")
]
DataCache = Annotated[
    Path | None, typer.Option("--data-cache-path", help="Keeps sample indices here; default beside the data.")
]
ValidationEvery = Annotated[int, typer.Option("--validation-every", min=0, help="Steps; 0: at the end.")]


def data_options(paths: list[str] | None, split: str | None, tokenizer: str | None, cache: Path | None) -> DataOptions:
    from runtime.data.data_options import DataOptions

    return DataOptions(paths=tuple(paths or ()), split=split, tokenizer=tokenizer, cache=cache)


data_app = typer.Typer(
    help="Make and look at Megatron's indexed datasets.", no_args_is_help=True, rich_markup_mode="rich"
)
