"""Flags that several commands take, as `serve` takes them."""

from typing import Annotated

from serving import flags

ModelOption = Annotated[str, flags.MODEL.option()]
MeshOption = Annotated[str, flags.MESH.option()]
DpAttentionOption = Annotated[bool, flags.DP_ATTENTION.option()]
DtypeOption = Annotated[str | None, flags.DTYPE.option()]
