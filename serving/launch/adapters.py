"""Adapters of a service's process: those of the start, and those of the folder that it follows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mixtral_jax.checkpoint.store import place_of
from mixtral_jax.errors import AdapterError
from serving.engine.config import EngineConfig
from serving.launch.adapter_mirror import AdapterMirror
from serving.service.models.adapter_folder import AdapterFolder, LoadsAdapters
from serving.service.models.adapter_metrics import AdapterMetrics
from serving.service.models.served_models import ServedModels


@contextmanager
def followed_adapters(
    config: EngineConfig,
    models: ServedModels,
    loader: LoadsAdapters,
    metrics: AdapterMetrics,
    say: Callable[[str], None],
) -> Iterator[None]:
    """Loads the adapters of the start, and follows the folder until the block ends.

    Args:
        config: What the operator asked for.
        models: The names of the model, which no adapter may have.
        loader: Loads them.
        metrics: Counts those of the folder that cannot be loaded.
        say: Called with a line for each adapter of the start.

    Raises AdapterError if an adapter of the start cannot be used.
    """
    fixed = config.adapters
    for name, folder in fixed.items():
        models.check_name(name)
        loader.read(name, folder)()
        say(f"adapter {name} from {folder}")
    if config.adapters_folder is None:
        yield
        return

    def check_name(name: str) -> None:
        models.check_name(name)
        if name in fixed:
            raise AdapterError(f"--adapter names '{name}' already; call the folder otherwise")

    place, mirror = place_of(config.adapters_folder, AdapterError), None
    if isinstance(place, Path):
        folder = place
    else:
        mirror = AdapterMirror(place)
        mirror.start()
        folder = mirror.folder
    follower = AdapterFolder(folder, loader, check_name, metrics.failed)
    metrics.num_failed = lambda: follower.num_failed
    follower.start()
    say(f"adapters of {place}: {len(loader.digests()) - len(fixed)}")
    try:
        yield
    finally:
        follower.stop()
        if mirror is not None:
            mirror.stop()
