"""The best split of a model over chips: all by arithmetic, the best of these with the compiler."""

import math
import time
from collections.abc import Callable

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError
from mixtral_jax.planning.chips import Topology
from mixtral_jax.planning.compiler import CompileError, compile_elsewhere
from mixtral_jax.planning.estimate import Load, Split, candidates, split
from mixtral_jax.planning.plan import Answer, estimate, job_of, measured, ranked
from mixtral_jax.planning.topology import installed
from mixtral_jax.sharding import mesh_sizes

# Another split is tried only if it is likely to end within so many seconds of the start.
_PATIENCE = 150.0
# Arithmetic must miss the memory by more than this to spare the compiler the question.
_NEAR = 1.1

_KNOWN: dict[str, Callable[[], ModelConfig]] = {
    "mistral-7b-v0.1": ModelConfig.mistral_7b_v01,
    "mistral-7b-instruct-v0.1": ModelConfig.mistral_7b_v01,
    "mistral-7b-instruct-v0.2": ModelConfig.mistral_7b_instruct_v02,
    "mistral-7b-v0.3": ModelConfig.mistral_7b_instruct_v03,
    "mistral-7b-instruct-v0.3": ModelConfig.mistral_7b_instruct_v03,
    "mixtral-8x7b-v0.1": ModelConfig.mixtral_8x7b_v01,
    "mixtral-8x7b-instruct-v0.1": ModelConfig.mixtral_8x7b_v01,
    "mixtral-8x22b-instruct-v0.1": ModelConfig.mixtral_8x22b_instruct_v01,
    "smollm2-135m-instruct": ModelConfig.smollm2_135m,
    "tiny-random": lambda: ModelConfig.tiny(vocab_size=260),
}


def known_model(name: str) -> ModelConfig:
    """By Hugging Face's name, with or without its owner; raises ConfigError for any other."""
    plain = name.rpartition("/")[2].lower()
    if plain not in _KNOWN:
        raise ConfigError(
            f"no model is known as {name!r}; give one of {', '.join(_KNOWN)}, or --checkpoint "
            "FOLDER"
        )
    return _KNOWN[plain]()


class Search:
    """Finds the best split of a load.

    Args:
        load: what is to be served.
        mesh: "auto", or the only split to look at, such as "data=1,expert=8,tensor=1".
        dp_attention: of that split.
        tries: how many splits the compiler is asked about.
        note: told what went otherwise than asked.
        compiles: False for arithmetic alone.
    """

    def __init__(
        self,
        load: Load,
        mesh: str,
        dp_attention: bool,
        tries: int,
        note: Callable[[str], None],
        compiles: bool,
    ) -> None:
        self.load = load
        self.mesh = mesh
        self.dp_attention = dp_attention
        self.tries = tries
        self.note = note
        self.compiles = compiles
        self.start = time.monotonic()

    def best_of(self, sizes: list[Topology], say: Callable[[str], None]) -> list[Answer]:
        """Answers for the first topology that holds the load, or the last; the best first.

        What the compiler found comes before what was only reckoned. Raises ConfigError where the
        model cannot be split so. `say` is told what is being done.
        """
        if self.compiles and not installed(sizes[0].platform):
            self.compiles = False
            extra = "plan" if sizes[0].platform == "tpu" else "plan-gpu"
            self.note(
                f"no compiler for {sizes[0].platform} is installed, so this is arithmetic: "
                f"pip install 'mixtral-jax[{extra}]'"
            )
        if self.mesh != "auto" and len(sizes) > 1:
            chips = math.prod(mesh_sizes(self.mesh))
            sizes = [size for size in sizes if size.chips == chips] or sizes[-1:]
        answers: list[Answer] = []
        for topology in sizes:
            found = self._one(topology, say, is_last=topology is sizes[-1])
            answers = found or answers
            if found and found[0].fits:
                break
        if not answers:
            raise ConfigError(
                f"{self.load.model.num_experts or 'no'} experts, "
                f"{self.load.model.num_kv_heads} key/value heads and a batch of {self.load.batch} "
                f"cannot be split over {sizes[-1].chips} chips; take fewer, or a larger batch"
            )
        return answers

    def _one(self, topology: Topology, say: Callable[[str], None], is_last: bool) -> list[Answer]:
        say(f"{topology}: comparing splits")
        answers = ranked([estimate(self.load, topology, one) for one in self._splits(topology)])
        if not answers or not self.compiles:
            return answers
        if answers[0].total > _NEAR * topology.chip.memory and not is_last:
            return answers
        # What does not fit by arithmetic is asked once, for its padding may be less than reckoned.
        tries = self.tries if answers[0].fits else 1
        tried: list[Answer] = []
        failed: set[Split] = set()
        longest = 0.0
        for answer in answers:
            began = time.monotonic()
            if len(tried) == tries or began - self.start + longest > _PATIENCE:
                break
            try:
                tried.append(self._compiled(answer, f"{len(tried) + 1}/{tries}", say))
            except CompileError as error:
                failed.add(answer.split)
                self.note(f"{topology}, {answer.split}: {error}")
            longest = max(longest, time.monotonic() - began)
        if not tried:
            self.note("so this is arithmetic")
            return answers
        known = failed | {one.split for one in tried}
        return [*ranked(tried), *(one for one in answers if one.split not in known)]

    def _splits(self, topology: Topology) -> list[Split]:
        if self.mesh == "auto":
            return candidates(self.load, topology.chips)
        one = split(self.load.model, *mesh_sizes(self.mesh), self.dp_attention)
        if one.chips != topology.chips:
            raise ValueError(
                f"--mesh {self.mesh} is for {one.chips} chips, {topology} has {topology.chips}; "
                "the sizes must multiply to that, or give --mesh auto"
            )
        return [one]

    def _compiled(self, answer: Answer, number: str, say: Callable[[str], None]) -> Answer:
        what = f"{answer.topology}, split {number} ({answer.split})"
        say(f"{what}: starting the compiler")
        return measured(
            answer, compile_elsewhere(job_of(answer), lambda line: say(f"{what}: {line}"))
        )
