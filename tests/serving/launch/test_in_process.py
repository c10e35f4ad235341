"""A service in threads of this process: a model and an adapter answer by their names."""

import threading
from pathlib import Path

import pytest

import mixtral_jax
from mixtral_jax.errors import AdapterError
from mixtral_jax.model.adapter import AdapterConfig
from serving.client import Client
from serving.errors import ModelNotFound, Unauthenticated
from serving.launch.in_process import InProcessService
from tests.support.adapters import random_adapter

PROMPT = "Once upon a time"
OPTIONS = {"max_tokens": 8, "temperature": 0.0}


@pytest.mark.slow
def test_the_model_and_an_adapter_answer_from_this_process(tmp_path: Path) -> None:
    model, tokenizer = mixtral_jax.load("tiny-random", mesh=None)
    assert tokenizer is not None
    settings = AdapterConfig(rank=4)
    adapter = random_adapter(model.config, settings).folded(settings)
    mixtral_jax.save_adapter(adapter, tmp_path / "mine", base="tiny-random")
    tuned = mixtral_jax.merge(model, mixtral_jax.load_adapter(tmp_path / "mine", model))
    expected = {
        name: "".join(mixtral_jax.generate(each, tokenizer, PROMPT, **OPTIONS))
        for name, each in {"base": model, "mine": tuned}.items()
    }
    assert expected["base"] != expected["mine"]
    before = set(threading.enumerate())
    with InProcessService(model, tokenizer, adapters={"mine": tmp_path / "mine"}) as service:
        answers = {
            name: service.client.complete(PROMPT, model=name, **OPTIONS).text for name in expected
        }
        assert answers == expected
        with pytest.raises(ModelNotFound, match="'base'"):
            service.client.complete(PROMPT, model="other", **OPTIONS)
        stranger = Client(service.target, key="x" * 32)
        with pytest.raises(Unauthenticated):
            stranger.complete(PROMPT, **OPTIONS)
        stranger.close()
    running = {thread.name for thread in set(threading.enumerate()) - before}
    assert not running & {"engine", "service"}
    with pytest.raises(AdapterError, match="nowhere"):
        InProcessService(model, tokenizer, adapters={"mine": tmp_path / "nowhere"})
