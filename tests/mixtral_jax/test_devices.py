"""An accelerator that is there and not seen is an error; the CPU alone, or on purpose, is none."""

from pathlib import Path

import pytest

from mixtral_jax.devices import accelerator, check_seen, show_devices
from mixtral_jax.errors import TopologyError


@pytest.mark.parametrize(
    ("file", "kind"), [("accel0", "TPU"), ("vfio/0", "TPU"), ("nvidia0", "GPU")]
)
def test_an_accelerator_that_jax_does_not_use(file: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "dev" / file
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(TopologyError, match=f"has a {kind}.*{file}.*another process"):
        check_seen("cpu", {}, tmp_path)
    check_seen("cpu", {"JAX_PLATFORMS": "cpu"}, tmp_path)
    check_seen(kind.lower(), {}, tmp_path)


def test_a_cloud_tpu_is_known_by_its_variable(tmp_path: Path) -> None:
    environment = {"TPU_ACCELERATOR_TYPE": "v5litepod-8"}
    assert accelerator(environment, tmp_path) == ("TPU", "TPU_ACCELERATOR_TYPE=v5litepod-8")
    with pytest.raises(TopologyError, match="v5litepod-8"):
        check_seen("cpu", environment, tmp_path)


def test_a_machine_without_any(tmp_path: Path) -> None:
    (tmp_path / "dev" / "vfio").mkdir(parents=True)
    (tmp_path / "dev" / "vfio" / "vfio").touch()  # there without any device
    (tmp_path / "dev" / "nvidiactl").touch()
    assert accelerator({}, tmp_path) is None
    check_seen("cpu", {}, tmp_path)


def test_what_is_there_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    show_devices()
    assert "8 devices" in capsys.readouterr().out
