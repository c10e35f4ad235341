"""One meaning, several makers: the operations of a model for each kind of device.

`kernels_for` makes the choice, once for each Placement, and it is the only place where a platform,
or a card's compute capability, decides what is computed how. Modules hold the record and call its
functions. Each maker is a folder beside this file:

    xla   any backend; the meaning of each operation, to which tests hold the others
    cpu   C++ by JAX's foreign function interface, from the wheel or compiled here; else xla
    gpu   Mosaic GPU, or Pallas by way of Triton before jax 0.12: see gpu/form.py
    tpu   JAX's own collection of kernels, and ours: a grouped product, and attention over pages of
          small numbers

A maker's function computes by `xla` itself where its tiles do not fit, and what it does not take:
products with fp8 are XLA's, but for the grouped one on TPU and on GPU from 8.9 on.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mixtral_jax import cache
from mixtral_jax.axes import FlatKeys, FlatQueries, Pages, RowKeys, RowQueries, Segments
from mixtral_jax.cache import PageForm, RaggedBatch
from mixtral_jax.layout import Layout
from mixtral_jax.weight import Weight, is_quantized

Attended = tuple[FlatQueries, Pages]

# The compute capability that is meant where nothing is known of a GPU but its platform.
NEWEST_CARD = (9, 0)


@dataclass(frozen=True, kw_only=True, repr=False)
class Kernels:
    """The operations of a model on one kind of device, and the numbers that come with them.

    Every function stands at the top of a module, so two records of one platform are equal, and
    `nnx.split` gives equal graphs for models that were made apart.
    """

    platform: str  # cpu, gpu or tpu; "xla" for the forms that any backend computes
    # (x [R I], weights [O I]) -> one [R O] for each weight
    linear: Callable[[jax.Array, Sequence[Weight]], list[jax.Array]]
    # True where `linear` rounds rows that meet fp8 weights to fp8 too.
    multiplies_fp8: bool
    # (x [M I], sizes [E], weight [E O I]) -> [M O]: rows in groups, each against its own expert
    grouped: Callable[[jax.Array, jax.Array, Weight], jax.Array]
    # (weight [*O *I], number of its axes of inputs) -> the same weight in the order in which
    # `linear` and `grouped` read it best; they take any
    arranged: Callable[[Weight, int], Weight]
    # (sizes [E], M, shape of a weight [E O I]) -> number of experts' matrices that `grouped` reads
    expert_reads: Callable[[Sequence[int], int, jax.ShapeDtypeStruct], float]
    # (ys [R O], x [R I], groups [R], A [G U I] and B [G U O] of each) -> [R O] each: what adapters
    # add to the weights' own products, each row by the one of its group
    add_low_rank: Callable[
        [Sequence[jax.Array], jax.Array, jax.Array, Sequence[tuple[jax.Array, jax.Array]]],
        list[jax.Array],
    ]
    # (x [R D], weight [D], eps) -> [R D]
    norm: Callable[[jax.Array, jax.Array, float], jax.Array]
    # (gate [R F], up [R F]) -> [R F]
    swiglu: Callable[[jax.Array, jax.Array], jax.Array]
    # (q [T N H], k, v [T K H], pages, batch, window) -> [T N H] and the pages with k and v
    attend: Callable[
        [FlatQueries, FlatKeys, FlatKeys, Pages, RaggedBatch, int | None],
        tuple[FlatQueries, Pages],
    ]
    # (q [B T N H], k, v [B T K H], window, layout, segments [B T]) -> [B T N H]: causal, whole
    # arrays; of a packed row each segment sees itself only
    full_attention: Callable[
        [RowQueries, RowKeys, RowKeys, int | None, Layout | None, Segments | None], RowQueries
    ]
    # (x [T D]) -> [T D]: the rows that the router multiplies
    router_input: Callable[[jax.Array], jax.Array]
    # (rows, room, starts, sizes, places, arriving, axis) -> room: see xla/moves.py
    move_rows: Callable[
        [jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, str], jax.Array
    ]
    can_move_rows: Callable[[Mesh], bool]
    # (x, causes) -> x, for uses that come after the causes are computed: see xla/order.py
    after: Callable[[jax.Array, Any], jax.Array]
    # Names of the functions above through which jax.grad goes.
    differentiable: frozenset[str]
    # Up to so many tokens every expert may compute every token, where nearly all are chosen anyway
    # (model/expert_load.py): an accelerator reads weights for longer than it computes with them.
    max_dense_tokens: int
    # Tokens of a page. Prompts share whole pages, so small ones are found again more often; but a
    # kernel fetches page by page, and an accelerator's memory wants kilobytes at once.
    page_size: int
    # The dtype of what flows between weights of int8 or fp8.
    activation_dtype_between_rounded: str
    # Dtypes of cached keys and values beside the activations' own.
    kv_dtypes: frozenset[str]
    # True where a serving step is one program, not one for each layer: launching dozens of programs
    # takes an accelerator's host as long as the accelerator needs to compute them.
    whole_step: bool
    # (page size, key/value heads of one device, head size, dtype) -> the form of the pages that
    # `attend` takes; raises ConfigError where it takes none of that dtype
    page_form: Callable[[int, int, int, DTypeLike], PageForm]
    # Heads of a multiple of so many values give a row the same bits whatever runs beside it;
    # None where that is not promised.
    deterministic_heads: int | None
    # On CPU, the form of the C++ kernels (cpu/forms.py), and "xla" where they are not there.
    isa: str | None = None

    def __repr__(self) -> str:
        return f"Kernels({self.platform!r})"  # every layer of a printed model has them

    def activation_dtype(self, dtype: str) -> str:
        """The dtype of what flows between weights of `dtype`."""
        return self.activation_dtype_between_rounded if is_quantized(dtype) else dtype

    def with_gradients(self) -> "Kernels":
        """The same record with XLA's form for every function that has no gradient."""
        oracle = kernels_for("xla")
        changed: dict[str, Any] = {
            field.name: getattr(oracle, field.name)
            for field in fields(self)
            if callable(getattr(self, field.name)) and field.name not in self.differentiable
        }
        return replace(self, **changed)


def multiplies_fp8(device: jax.Device) -> bool:
    """Says whether a device, present or absent, multiplies float8_e4m3fn by itself.

    NVIDIA's do from compute capability 8.9 on (Ada, Hopper), and TPUs from v7 on.
    """
    from mixtral_jax.kernels.gpu import form

    if device.platform == "tpu":
        version = re.search(r"\d+", device.device_kind)
        return version is not None and int(version[0]) >= 7
    return form.takes_fp8(form.capability_of(device))


def kernels_for_device(device: jax.Device) -> Kernels:
    """Makes the record for a device, which may be an absent one that programs are compiled for."""
    from mixtral_jax.kernels.gpu import form

    capability = form.capability_of(device)
    return kernels_for(
        device.platform, multiplies_fp8=multiplies_fp8(device), capability=capability
    )


def kernels_for(
    platform: str,
    *,
    multiplies_fp8: bool = False,
    capability: tuple[int, int] | None = NEWEST_CARD,
) -> Kernels:
    """Makes the record for devices of a platform, as JAX names it: cpu, gpu (cuda, rocm) or tpu.

    "xla" gives the forms that any backend computes. With `multiplies_fp8`, rows that meet fp8
    weights are rounded to fp8 too. `capability` is the compute capability of an NVIDIA card, and
    None for one of AMD's; other platforms have none. Raises ValueError for another name. On CPU the
    kernels are loaded here, and compiled where the wheel had none for this machine; no other
    platform loads C++.
    """
    oracle = _xla(multiplies_fp8)
    match platform:
        case "xla":
            return oracle
        case "cpu":
            assert not multiplies_fp8, "no CPU multiplies fp8"
            return _cpu(oracle)
        case "gpu" | "cuda" | "rocm":
            return _gpu(oracle, capability)
        case "tpu":
            return _tpu(oracle)
    raise ValueError(f"there are no kernels for {platform!r}; choose cpu, gpu, tpu or xla")


def _xla(multiplies_fp8: bool) -> Kernels:
    from mixtral_jax.kernels.xla import attention, low_rank, moves, order, products

    return Kernels(
        platform="xla",
        linear=products.linear_in_fp8 if multiplies_fp8 else products.linear,
        multiplies_fp8=multiplies_fp8,
        grouped=products.grouped,
        arranged=products.arranged,
        expert_reads=products.expert_reads,
        add_low_rank=low_rank.add_low_rank,
        norm=products.norm,
        swiglu=products.swiglu,
        attend=attention.attend,
        full_attention=attention.full_attention,
        router_input=products.router_input,
        move_rows=moves.move_rows,
        can_move_rows=moves.can_move_rows,
        after=order.after,
        differentiable=frozenset(
            {
                *(
                    "linear",
                    "grouped",
                    "arranged",
                    "expert_reads",
                    "page_form",
                    "add_low_rank",
                    "norm",
                    "swiglu",
                    "full_attention",
                ),
                *("router_input", "move_rows", "can_move_rows", "after"),
            }
        ),
        max_dense_tokens=0,
        page_size=16,
        activation_dtype_between_rounded="float32",
        kv_dtypes=frozenset({"int8", "float8_e4m3fn"}),
        whole_step=False,
        page_form=cache.page_form,
        deterministic_heads=None,
    )


def _cpu(oracle: Kernels) -> Kernels:
    from mixtral_jax.kernels.cpu import attention, build, low_rank, order, products
    from mixtral_jax.kernels.xla import blockwise

    plain = replace(oracle, platform="cpu", full_attention=blockwise.full_attention, isa="xla")
    form = build.form()
    if form is None:
        return plain
    return replace(
        plain,
        linear=products.linear,
        grouped=products.grouped,
        arranged=products.arranged,
        add_low_rank=low_rank.add_low_rank,
        norm=products.norm,
        swiglu=products.swiglu,
        attend=attention.attend,
        after=order.after,
        differentiable=plain.differentiable - {"add_low_rank"},
        deterministic_heads=attention.LANES,
        isa=form.name,
    )


def _gpu(oracle: Kernels, capability: tuple[int, int] | None) -> Kernels:
    from mixtral_jax.kernels.gpu import few_rows, form, router
    from mixtral_jax.kernels.xla import blockwise, moves

    plain = replace(
        oracle,
        platform="gpu",
        whole_step=True,
        linear=few_rows.linear_in_fp8 if oracle.multiplies_fp8 else few_rows.linear,
        full_attention=blockwise.full_attention,
        router_input=router.router_input,
        move_rows=moves.move_rows_ragged,
        can_move_rows=moves.can_move_rows_ragged,
        max_dense_tokens=128,
        page_size=64,
        activation_dtype_between_rounded="bfloat16",
    )
    match form.form_for(capability):
        case "xla":
            return plain
        case "mosaic":
            from mixtral_jax.kernels.gpu.mosaic import attention, products

            return _by_form(plain, attention, products, reads_fp8=form.takes_fp8(capability))
        case "triton":
            from mixtral_jax.kernels.gpu.triton import attention as paged
            from mixtral_jax.kernels.gpu.triton import products as by_groups

            made = _by_form(plain, paged, by_groups, reads_fp8=form.takes_fp8(capability))
            in_fp8 = by_groups.linear_in_fp8
            return replace(made, linear=in_fp8 if plain.multiplies_fp8 else by_groups.linear)


def _by_form(plain: Kernels, attention: Any, products: Any, *, reads_fp8: bool) -> Kernels:
    """The record with the kernels of a form's modules, all of which have the same names."""
    if reads_fp8:
        return replace(
            plain,
            grouped=products.grouped,
            expert_reads=products.expert_reads,
            attend=attention.attend,
        )
    return replace(
        plain,
        grouped=products.grouped_without_fp8,
        expert_reads=products.expert_reads_without_fp8,
        attend=attention.attend_without_fp8,
    )


def _tpu(oracle: Kernels) -> Kernels:
    from mixtral_jax.kernels.tpu import attention, products
    from mixtral_jax.kernels.xla import moves

    return replace(
        oracle,
        platform="tpu",
        whole_step=True,
        linear=products.linear_in_fp8 if oracle.multiplies_fp8 else products.linear,
        grouped=products.grouped,
        expert_reads=products.expert_reads,
        attend=attention.attend,
        full_attention=attention.full_attention,
        move_rows=moves.move_rows_ragged,
        can_move_rows=moves.can_move_rows_ragged,
        max_dense_tokens=128,
        page_size=128,
        activation_dtype_between_rounded="bfloat16",
        page_form=attention.page_form,
    )
