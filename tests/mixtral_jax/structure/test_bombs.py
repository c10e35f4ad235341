"""What overflows, exhausts or stalls a compiler is refused or served, and harms nobody else."""

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.compiler import Compiler
from mixtral_jax.structure.specification import Kind, Specification
from mixtral_jax.tokenization.tokenizer import Tokenizer
from tests.mixtral_jax.structure.bombs import BOMBS

# These take all of the two seconds, after which the process that tries them is ended.
ENDLESS = {
    "8,000 properties",
    "const of 200 KB",
    "multipleOf",
    "repetition of repetition",
}
CASES = [
    pytest.param(name, marks=pytest.mark.slow if name in ENDLESS else ()) for name in sorted(BOMBS)
]


@pytest.fixture(scope="module")
def compiler(vocabularies: Callable[[str], Tokenizer]) -> Iterator[Compiler]:
    tokenizer = vocabularies("v3")
    with Compiler(tokenizer, tokenizer.vocab_size) as compiler:
        yield compiler


@pytest.mark.parametrize("name", CASES)
def test_bombs(name: str, compiler: Compiler) -> None:
    """An accepted form also answers for sixty tokens, or says that it cannot."""
    rng = random.Random(name)
    starts = sum(trial.starts for trial in compiler.trials)
    try:
        form = compiler.compile(BOMBS[name], continues=False, salt=b"attacker")
        matcher = form.matcher()
        mask = np.zeros(matcher.words, np.int32)
        for _ in range(60):
            matcher.fill(mask)
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            matcher.consume([int(rng.choice(allowed))])
            if matcher.has_ended:
                break
    except StructureError as error:
        assert len(str(error)) < 1000
    # Its process may have died, and was started anew at most once.
    assert sum(trial.starts for trial in compiler.trials) <= starts + len(compiler.trials)
    # Of another caller, and nowhere in a cache.
    bystander = Specification(Kind.REGEX, f"[0-9]{{3}} {rng.random()}")
    assert compiler.compile(bystander, continues=False, salt=b"bystander").matcher()
