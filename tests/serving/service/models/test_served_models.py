"""Names of the model and of its adapters."""

import pytest

from serving.errors import ModelNotFound
from serving.service.models.served_models import BASE, ServedModels


def test_a_name_means_the_model_an_adapter_or_nothing() -> None:
    loaded = {"tuned": "ab", "other": "cd"}
    models = ServedModels("toy", ["azureai"], lambda: loaded)
    for name in ("", "toy", "azureai"):
        assert models.adapter_of(name) == BASE
    assert models.adapter_of("tuned") == "tuned"
    for name in ("Tuned", "toy ", "*", "x" * 1000):
        with pytest.raises(ModelNotFound, match="does not exist") as caught:
            models.adapter_of(name)
        assert len(str(caught.value)) < 300
    del loaded["tuned"]
    with pytest.raises(ModelNotFound, match="'tuned'"):
        models.adapter_of("tuned")
    assert [(info.name, info.digest) for info in models.listed()] == [("other", "cd")]


def test_any_name_is_the_models_but_an_adapters() -> None:
    models = ServedModels("toy", ["*"], lambda: {"tuned": "ab"})
    assert models.adapter_of("whatever") == BASE
    assert models.adapter_of("tuned") == "tuned"
