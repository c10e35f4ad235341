"""--generation-config and --override-generation-config."""

from dataclasses import replace
from pathlib import Path

import pytest

from mixtral_jax.checkpoint.pretrained import open_pretrained
from mixtral_jax.errors import ConfigError
from serving.launch.sampling_defaults import chosen_defaults


def test_the_operator_chooses_whose_values_hold(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    for folder, temperature in ((own, "0.2"), (other, "0.9")):
        folder.mkdir()
        (folder / "generation_config.json").write_text(
            f'{{"temperature": {temperature}, "top_p": 0.5}}', encoding="utf-8"
        )
    model = replace(open_pretrained("tiny-random"), folder=own)
    assert chosen_defaults(model, "auto", None) == {"temperature": 0.2, "top_p": 0.5}
    assert chosen_defaults(model, "vllm", None) == {}
    assert chosen_defaults(model, str(other), None) == {"temperature": 0.9, "top_p": 0.5}
    override = '{"temperature": 1, "min_p": 0.1}'
    assert chosen_defaults(model, "auto", override) == {
        "temperature": 1.0,
        "top_p": 0.5,
        "min_p": 0.1,
    }
    assert chosen_defaults(model, "vllm", override) == {"temperature": 1.0, "min_p": 0.1}
    assert chosen_defaults(model, "auto", '{"temperature": null}') == {"top_p": 0.5}


@pytest.mark.parametrize(
    ("choice", "override", "words"),
    [
        ("nowhere", None, "--generation-config: nowhere has no generation_config.json"),
        ("auto", "{", "--override-generation-config is no JSON"),
        ("auto", "[]", "--override-generation-config is no object"),
        ("auto", '{"seed": 1}', "--override-generation-config has 'seed'; it takes temperature"),
        ("auto", '{"top_p": 2}', "--override-generation-config: top_p is 2"),
        ("auto", f'{{"top_p": 1{"0" * 400}}}', "--override-generation-config: top_p is inf"),
        ("auto", f'{{"top_p": -1{"0" * 400}}}', "--override-generation-config: top_p is -inf"),
    ],
)
def test_what_cannot_be_used_is_refused_by_the_flags_name(
    choice: str, override: str | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        chosen_defaults(open_pretrained("tiny-random"), choice, override)
