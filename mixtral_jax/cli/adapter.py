"""`mixtral-jax merge` and `export-adapter`: adapters as weights, and for other programs."""

from pathlib import Path
from typing import Annotated

import typer

from mixtral_jax.cli import extras


@extras.needs("convert")
def merge(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder of the base.")],
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA adapter, as PEFT saves it.")],
    destination: Annotated[Path, typer.Argument(help="Checkpoint folder to make.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, which loses nothing, or bfloat16; default: the base's."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name under which it is served; default: the folder's.")
    ] = None,
) -> None:
    """Add an adapter to a checkpoint's weights, in float32, and show what rounding loses."""
    from convert.merge import merge, summary
    from convert.progress import bar

    with bar(f"merging {adapter.name}") as progress:
        merged = merge(checkpoint, adapter, destination, dtype=dtype, name=name, progress=progress)
    for line in summary(merged.layers, merged.card.dtype):
        print(line)
    print(destination)


def export_adapter(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder of the base.")],
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA adapter, as PEFT saves it.")],
    destination: Annotated[Path, typer.Argument(help="Folder to make.")],
    base: Annotated[
        str | None,
        typer.Option(help="Name of the base for others, such as mistralai/Mixtral-8x7B-v0.1."),
    ] = None,
) -> None:
    """Check an adapter against its base and write it as PEFT, vLLM and SGLang read it."""
    from mixtral_jax.checkpoint.adapter import read_adapter, write_adapter
    from mixtral_jax.checkpoint.folder import Card

    stored = read_adapter(adapter, Card.read(checkpoint).model)
    write_adapter(destination, stored.adapter, stored.settings, base or stored.base)
    print(destination)
