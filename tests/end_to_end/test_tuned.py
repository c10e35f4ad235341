"""A mixture learns a form of answer by `mixtral-jax train`, and is served beside its base.

The data set is that of `mixtral_jax.training.bookings`. Requests for the base and for the adapter
run in the same steps.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from typer.testing import CliRunner

from convert.convert import convert
from mixtral_jax.cli.main import app
from mixtral_jax.training.bookings import Booking, bookings, write_bookings
from tests.support.servers import Server, running, serve_command

pytestmark = pytest.mark.soak  # minutes of both cores
HELD_OUT = bookings(60, seed=1, held_out=True)


def exact(server: Server, models: tuple[str, str]) -> list[int]:
    """The number of held-out requests that each of the models answers as wanted."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, timeout=600) as client:

        def is_exact(model: str, booking: Booking) -> bool:
            answer = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": booking.request}],
                max_tokens=24,
                temperature=0,
            )
            return answer.choices[0].message.content == booking.answer

        asked = [(model, booking) for booking in HELD_OUT for model in models]
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda pair: is_exact(*pair), asked))
    return [sum(answers[i::2]) for i in range(2)]


def test_a_mixture_learns_a_form_and_is_served_beside_its_base(
    smollm2_gguf: Path, tmp_path: Path
) -> None:
    model = tmp_path / "base"
    convert(smollm2_gguf, model, dtype="int8", upcycle_experts=8, name="base")
    write_bookings(tmp_path / "bookings.jsonl", bookings(400, seed=0))
    command = [
        *("train", f"--model={model}", f"--data={tmp_path}/bookings.jsonl"),
        *(f"--output={tmp_path}/bookings", "--steps=24", "--rows=2", "--length=208"),
        *("--rank=8", "--learning-rate=2e-3", "--set=samples=0"),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    adapter = f"--adapter=bookings={tmp_path}/bookings/adapter"
    options = (adapter, "--max-sequences=8", "--max-adapters=1")
    with running(serve_command(model, *options)) as server:
        before, after = exact(server, ("base", "bookings"))
    assert before < 6
    assert after > 48  # 53 when it was measured for docs/train.md
