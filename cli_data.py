"""What the command line says of data: the options of `train`, and `data prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli_parts import Json, print_json, print_report

if TYPE_CHECKING:
    from planner.plan import Plan
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


ResetPositions = Annotated[
    bool | None,
    typer.Option("--reset-position-ids/--keep-position-ids", help="Positions begin anew behind a document's end."),
]
ResetAttention = Annotated[
    bool | None,
    typer.Option(
        "--reset-attention-mask/--keep-attention-mask",
        help="Attention stays within documents. Default of both: if the plan has a document length.",
    ),
]
EodMaskLoss = Annotated[
    bool, typer.Option("--eod-mask-loss/--eod-loss", help="What follows a document's end is not learned to predict.")
]
Eod = Annotated[
    str | None, typer.Option("--eod", help="What ends documents of --data: a token of --tokenizer, or an id.")
]
DocumentLength = Annotated[
    str | None,
    typer.Option(
        "--document-length",
        metavar="N|DATA",
        help="Attention stays within documents of so many tokens in the mean, or as long as those of this data.",
    ),
]


def data_options(paths: list[str] | None, split: str | None, tokenizer: str | None, cache: Path | None) -> DataOptions:
    from runtime.data.data_options import DataOptions

    return DataOptions(paths=tuple(paths or ()), split=split, tokenizer=tokenizer, cache=cache)


def packed_options(
    options: DataOptions,
    plan: Plan,
    reset_positions: bool | None,
    reset_attention: bool | None,
    eod_mask_loss: bool,
    eod: str | None,
) -> DataOptions:
    """The options with what ends of documents change; None is what the plan is priced for."""
    from dataclasses import replace

    planned = plan.job.document_length is not None
    return replace(
        options,
        reset_positions=planned if reset_positions is None else reset_positions,
        reset_attention=planned if reset_attention is None else reset_attention,
        mask_loss=eod_mask_loss,
        eod=eod,
    )


def document_length(said: str | None, sequence: int) -> float | None:
    """The length by which documents are priced, said as such or by the data that has them."""
    if said is None:
        return None
    try:
        length = float(said)
    except ValueError:
        return data_document_length([said], sequence)
    if not 1 <= length < float("inf"):
        from profiles.input_error import InputError

        raise InputError(
            f"documents cannot have {said} tokens", where="--document-length", expected="a number >= 1", got=said
        )
    return length


def data_document_length(paths: list[str] | None, sequence: int) -> float:
    """The length that stands for the documents of --data."""
    from planner.packed_cost import even_length
    from runtime.data.open_tokens import document_lengths

    return even_length(document_lengths(tuple(paths or ()), sequence), sequence)


data_app = typer.Typer(help="Make Megatron's indexed datasets.", no_args_is_help=True, rich_markup_mode="rich")


@data_app.command(
    epilog="Examples: cli.py data prepare --input a.jsonl --input b.jsonl --tokenizer MODEL_FOLDER --append-eod "
    "--output corpus (writes corpus_text_document.bin and .idx) | cli.py train --data corpus_text_document"
)
def prepare(
    output: Annotated[
        str,
        typer.Option("--output", "--output-prefix", metavar="PREFIX", help="Writes PREFIX_text_document.bin, .idx."),
    ],
    inputs: Annotated[
        list[Path] | None, typer.Option("--input", help="File of documents: .jsonl, .txt or .parquet; repeatable.")
    ] = None,
    more: Annotated[list[Path] | None, typer.Argument(metavar="FILE", help="More of them.")] = None,
    tokenizer: Annotated[
        str,
        typer.Option("--tokenizer", "--tokenizer-model", help="Model folder with tokenizer.json, that file, or bytes."),
    ] = "bytes",
    json_key: Annotated[
        str, typer.Option("--json-key", "--json-keys", help="Where in a JSON line, or which column, the text is.")
    ] = "text",
    append_eod: Annotated[bool, typer.Option("--append-eod", help="End each document with its end token.")] = False,
    eod: Annotated[
        str | None, typer.Option("--eod", help="That token; default the tokenizer's end of sequence, of bytes 0.")
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Processes; default all cores.")] = None,
    as_json: Json = False,
) -> None:
    """Tokenize documents into a dataset that `train --data` and Megatron-LM read."""
    import os
    import time
    from dataclasses import asdict

    from profiles.input_error import InputError
    from runtime.data.prepare import Preparation, input_bytes
    from runtime.data.prepare import prepare as write
    from runtime.progress import bytes_progress

    files = (*(inputs or ()), *(more or ()))
    if not files:
        raise InputError("there is nothing to prepare", where="--input", expected="at least one file", got="none")
    wanted = Preparation(
        inputs=files,
        output=output,
        tokenizer=tokenizer,
        json_key=json_key,
        append_eod=append_eod,
        eod=eod,
        workers=workers or os.cpu_count() or 1,
    )
    start = time.perf_counter()
    try:
        with bytes_progress("tokenizing", input_bytes(files)) as on_bytes:
            found = write(wanted, on_bytes)
    except KeyboardInterrupt:
        print_report("interrupted; nothing was written", error=True)
        raise typer.Exit(130) from None
    seconds = time.perf_counter() - start
    if as_json:
        print_json(asdict(found) | {"seconds": seconds})
        return
    empty = f", {found.empty:,} of them empty" if found.empty else ""
    print_report(
        f"{found.prefix}.bin and .idx: {found.tokens:,} tokens of {found.documents:,} documents{empty}, "
        f"{found.tokens / seconds:,.0f} tokens/s\ntrain on it with: cli.py train --data {found.prefix}"
    )
