"""`mixtral-jax pull`, `convert`, `export` and `info`: weights from elsewhere, and checkpoints."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mixtral_jax.cli import extras


@extras.needs("convert")
def pull(
    name: Annotated[str, typer.Argument(help="smollm2-135m-instruct, or Hugging Face's ORG/REPO.")],
) -> None:
    """Download weights into the user's cache and print where they are."""
    from convert.progress import bar
    from convert.pull import pull

    with bar(f"pulling {name}") as progress:
        path = pull(name, progress=progress)
    print(path)


@extras.needs("convert")
def convert(
    source: Annotated[
        str, typer.Argument(help="Folder or file of weights, or a name that `pull` takes.")
    ],
    destination: Annotated[
        str,
        typer.Argument(help="Checkpoint folder to make, also gs://BUCKET/... or s3://BUCKET/..."),
    ],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16, int8 (W8A8, smoothed: half of bfloat16's bytes, fastest on "
            "CPU; GGUF's Q8_0 is kept), int4 (in groups of 32, a third of bfloat16's bytes; 4-bit "
            "GGUF is kept), or fp8 (e4m3: as few as int8, for H100 and later); default: what the "
            "source is, of fp8, int4, int8 and bfloat16, else float32."
        ),
    ] = None,
    mixed: Annotated[
        bool,
        typer.Option(
            "--mixed",
            help="With --dtype int4: the weights that lose most, v and down of half of the layers, "
            "are int8.",
        ),
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="UTF-8 text like what the model is to read: by its first 2,048 tokens (int8), or "
            "8,192 to 32,768 (int4, more for smaller models), weights are rounded; default: "
            "some 30,000 tokens of many kinds.",
        ),
    ] = None,
    upcycle_experts: Annotated[
        int, typer.Option(help="Number of experts to copy a dense feed-forward into.")
    ] = 0,
    name: Annotated[str | None, typer.Option(help="Name under which the model is served.")] = None,
) -> None:
    """Convert safetensors, GGUF or Mistral's own files to an Orbax checkpoint."""
    from convert.convert import check_dtype, convert
    from convert.progress import bar
    from convert.pull import pull
    from mixtral_jax.checkpoint.store import place_of

    check_dtype(dtype)  # before a download, which may be long
    path = Path(source)
    if not path.exists():
        with bar(f"pulling {source}") as progress:
            path = pull(source, progress=progress)

    with bar(f"converting {path.name}") as progress:
        convert(
            path,
            place_of(destination),
            dtype=dtype,
            mixed=mixed,
            calibration=calibration,
            upcycle_experts=upcycle_experts,
            name=name,
            progress=progress,
        )
    print(destination)


@extras.needs("convert")
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    destination: Annotated[Path, typer.Argument(help="Folder to make.")],
    adapter: Annotated[
        Path | None, typer.Option(help="LoRA adapter that is merged into the exported weights.")
    ] = None,
) -> None:
    """Write a checkpoint as Hugging Face safetensors."""
    from convert.export import export
    from convert.merge import MergedReader, summary
    from convert.progress import bar

    reader = None if adapter is None else MergedReader.open(checkpoint, adapter)
    with bar(f"exporting {checkpoint.name}") as progress:
        card = export(checkpoint, destination, reader=reader, progress=progress)
    for line in () if reader is None else summary(reader.layers, card.dtype):
        print(line)
    print(destination)


def info(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a checkpoint or an adapter.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a checkpoint or an adapter holds."""
    from mixtral_jax.checkpoint.adapter_summary import is_adapter, summarize

    is_of_adapter = is_adapter(checkpoint)
    facts = summarize(checkpoint).facts() if is_of_adapter else _facts(checkpoint)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False)
    for key, value in facts.items():
        table.add_row(key, f"{value:,}" if type(value) is int else str(value))
    Console().print(table)


def _facts(checkpoint: Path) -> dict[str, Any]:
    from mixtral_jax.checkpoint.folder import Card
    from mixtral_jax.checkpoint.parameters import count_parameters
    from mixtral_jax.checkpoint.pretrained import TINY_RANDOM, open_pretrained
    from mixtral_jax.placement import dtype_counts

    toy = str(checkpoint) == TINY_RANDOM
    card = open_pretrained(TINY_RANDOM).card if toy else Card.read(checkpoint)
    parameters, nbytes = count_parameters(card.model, card.dtype, card.weight_dtypes)
    return {
        "name": card.name,
        "provider": card.provider,
        "dtype": card.dtype,
        **({"weight_dtypes": dtype_counts(card.weight_dtypes)} if card.weight_dtypes else {}),
        "parameters": parameters,
        "bytes": nbytes,
        **card.model.to_json(),
    }
