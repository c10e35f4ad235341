"""Settings by chip, against figures worked out by hand."""

from dataclasses import replace

import jax
import pytest

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError
from mixtral_jax.layout import Layout
from mixtral_jax.placement import Placement
from mixtral_jax.planning.search import known_model
from mixtral_jax.roofline.chips import CHIPS, GIB, Chip, chip_of
from mixtral_jax.roofline.page_memory import page_memory
from mixtral_jax.roofline.settings import (
    GivenSettings,
    StepSettings,
    chip_under,
    context_that_fits,
    settings_by_chip,
    step_buckets,
)
from mixtral_jax.roofline.split import Split
from mixtral_jax.roofline.workload import unsplit_placement
from mixtral_jax.sharding import ShardingRules

MISTRAL = known_model("mistral-7b-instruct-v0.3")
MIXTRAL = known_model("mixtral-8x7b-v0.1")
H100, L4, V5E = CHIPS["gpu"]["h100"], CHIPS["gpu"]["l4"], CHIPS["tpu"]["v5e"]


def placed(
    model: ModelConfig, dtype: str, platform: str, shape: tuple[int, int, int] = (1, 1, 1)
) -> Placement:
    """The placement of a model on a mesh of numbers in the place of devices."""
    split = Split.of(model, *shape)
    rules = ShardingRules.of(model, split.mesh)
    return replace(unsplit_placement(dtype, platform), layout=Layout(split.mesh, rules))


def chosen(
    model: ModelConfig, dtype: str, platform: str, chip: Chip, **given: int | str
) -> StepSettings:
    values = GivenSettings(**given)  # type: ignore[arg-type]
    return settings_by_chip(model, placed(model, dtype, platform), chip, values)


def test_mistral_7b_on_an_h100_by_hand() -> None:
    """Weights of 14.5 GB take 4.24 ms of 3.352 TB/s; a sequence of 2,048 tokens 0.27 GB, 0.080 ms.

    128 of these make a step of 14.5 ms, 256 would have no room: 0.9 of what the weights leave of
    78.1 GiB is 58.1 GiB, 232 sequences. A token takes 14.5 GFLOP and its attention over 2,048
    tokens 1.1, of 989 TFLOP/s: 15.2 microseconds, so that 954 take as long as the reads of the
    step, and 1,024 is the first power of two beyond.
    """
    settings = chosen(MISTRAL, "bfloat16", "gpu", H100)
    assert (settings.max_sequences, settings.max_step_tokens) == (128, 1024)
    assert (settings.page_size, settings.kv_dtype) == (64, "bfloat16")
    assert settings.lines[0] == (
        "--max-sequences 128: 232 sequences of 2,048 tokens fit, and a step of 128 takes about "
        "14.5 ms"
    )
    assert settings.lines[1].startswith("--max-step-tokens 1024: such a step takes about 15.6 ms")
    assert step_buckets(128, 1024, few=True) == (8, 32, 128, 1024)


def test_a_slow_card_computes_few_sequences_together() -> None:
    """An L4 reads 7.3 GB of int8 weights in 24.2 ms, and 16 sequences in 14 ms more.

    32 of them would take 52.8 ms, which is more than twice what the weights take.
    """
    settings = chosen(MISTRAL, "int8", "gpu", L4)
    assert settings.max_sequences == 16
    assert "a step of 16 takes about 38.1 ms" in settings.reasons[0]


def test_answers_keep_their_rhythm_beside_a_prompt() -> None:
    """On eight L4 a whole step of 8x22B may take 100 ms, of which answers alone take 86."""
    config = known_model("mixtral-8x22b-instruct-v0.1")
    placement = placed(config, "int8", "gpu", (1, 2, 4))
    settings = settings_by_chip(config, placement, L4)
    assert "one of 64 answers alone 85.6 ms" in settings.reasons[1]
    seconds = float(settings.reasons[1].split("about ")[1].split(" ms")[0])
    assert 86 < seconds <= 100


def test_keys_and_values_are_int8_only_where_the_context_needs_it() -> None:
    """A token takes 128 KiB in bfloat16 and 66 in int8: 5 GiB hold 40,960 tokens, 3 GiB 24,576."""
    placement = placed(MISTRAL, "int8", "gpu")
    given = GivenSettings()
    roomy = settings_by_chip(MISTRAL, placement, L4, given, 5 * GIB)
    narrow = settings_by_chip(MISTRAL, placement, L4, given, 3 * GIB)
    assert (roomy.kv_dtype, narrow.kv_dtype) == ("bfloat16", "int8")
    assert "24,576 tokens fit, and the model's context has 32,768" in narrow.reasons[3]
    assert context_that_fits(MISTRAL, placement, L4, narrow, 3 * GIB) == 32_768
    kept = settings_by_chip(MISTRAL, placement, L4, GivenSettings(kv_dtype="bfloat16"), 3 * GIB)
    assert context_that_fits(MISTRAL, placement, L4, kept, 3 * GIB) == 24_576
    no_int8 = replace(placement, kernels=replace(placement.kernels, kv_dtypes=frozenset()))
    assert settings_by_chip(MISTRAL, no_int8, L4, given, 3 * GIB).kv_dtype == "bfloat16"
    on_tpu = placed(MISTRAL, "int8", "tpu")
    assert settings_by_chip(MISTRAL, on_tpu, V5E, given, 3 * GIB).kv_dtype == "int8"


def test_what_is_given_stays_and_the_rest_follows_it() -> None:
    settings = chosen(
        MISTRAL, "bfloat16", "gpu", H100, max_sequences=20, max_step_tokens=300, page_size=128
    )
    assert (settings.max_sequences, settings.max_step_tokens, settings.page_size) == (20, 300, 128)
    assert settings.reasons[:3] == ("given", "given", "given")
    few = chosen(MISTRAL, "bfloat16", "gpu", H100, max_step_tokens=64)
    assert few.max_sequences == 64
    with pytest.raises(ConfigError, match="keys and values of 'float32' are not supported"):
        chosen(MISTRAL, "bfloat16", "gpu", H100, kv_dtype="float32")


def test_sizes_are_of_all_groups_of_sequences_together() -> None:
    lone = settings_by_chip(MISTRAL, placed(MISTRAL, "bfloat16", "gpu"), H100)
    both = settings_by_chip(MISTRAL, placed(MISTRAL, "bfloat16", "gpu", (2, 1, 1)), H100)
    assert both.max_sequences == 2 * lone.max_sequences
    assert both.max_step_tokens == 2 * lone.max_step_tokens
    assert all("groups" not in line for line in lone.lines)
    assert all(line.endswith(" ms, in each of 2 groups of sequences") for line in both.lines[:2])
    assert both.lines[0].startswith("--max-sequences 256: 232 sequences of 2,048 tokens fit, ")


def test_a_line_names_a_dtype_as_the_flag_takes_it() -> None:
    settings = chosen(MISTRAL, "bfloat16", "gpu", H100, kv_dtype="fp8")
    assert settings.kv_dtype == "float8_e4m3fn"
    assert settings.lines[3] == "--kv-dtype fp8: given"


def test_cpus_and_unknown_chips() -> None:
    """Nothing is known of the first; the second has the defaults that it always had."""
    assert chip_under(Placement.of(MIXTRAL, mesh=None)) is None
    on_cpu = settings_by_chip(MIXTRAL, placed(MIXTRAL, "float32", "cpu"), None)
    assert (on_cpu.max_sequences, on_cpu.max_step_tokens, on_cpu.page_size) == (32, 128, 16)
    assert on_cpu.kv_dtype == "float32"
    unknown = settings_by_chip(MIXTRAL, placed(MIXTRAL, "bfloat16", "gpu"), None)
    assert (unknown.max_sequences, unknown.max_step_tokens) == (32, 512)
    assert "figures are unknown" in unknown.lines[0]
    few = settings_by_chip(
        MIXTRAL, placed(MIXTRAL, "float32", "cpu"), None, GivenSettings(max_step_tokens=8)
    )
    assert (few.max_sequences, few.max_step_tokens) == (8, 8)


def test_chips_are_known_by_the_names_of_jax() -> None:
    assert chip_of("tpu", "TPU v5 lite") is V5E
    assert chip_of("gpu", "NVIDIA H100 80GB HBM3") is chip_of("cuda", "NVIDIA H100 80GB HBM3")
    assert chip_of("gpu", "NVIDIA H100 PCIe") is None  # three fifths of the bandwidth
    assert chip_of("cpu", jax.devices()[0].device_kind) is None


def test_pages_leave_room_for_temporaries() -> None:
    """A tenth of what is free, or a twentieth of the whole where that is more."""
    assert page_memory(1000, 200) == 720
    assert page_memory(1000, 800) == 150
    assert page_memory(1000, 990) == 0


def test_buckets_are_few_and_hold_every_step() -> None:
    assert step_buckets(8, 24, few=False) == (1, 8, 24)
    assert step_buckets(8, 512, few=False) == (1, 8, 32, 64, 128, 256, 512)
    assert step_buckets(8, 8192, few=True) == (8, 32, 128, 512, 2048, 8192)
    assert step_buckets(256, 4096, few=True) == (8, 64, 256, 1024, 4096)
    assert step_buckets(1, 1, few=True) == (1,)
    for rows in range(1, 257):
        for tokens in (rows, 2 * rows, 333, 512, 2048, 8192):
            buckets = step_buckets(min(rows, tokens), tokens, few=True)
            assert len(buckets) <= 6 and buckets[-1] == tokens
            assert min(max(rows, 8), tokens) in buckets  # that of a step of answers alone
            assert all(b <= 8.5 * a for a, b in zip(buckets, buckets[1:], strict=False))
