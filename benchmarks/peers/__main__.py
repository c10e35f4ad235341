"""Ours against the peers: python -m benchmarks.peers [--install] [--peers vllm,llama.cpp]

The same prompts and answer lengths, the same weights, the same machine, in turn: for each peer and
each number of clients, ours and each variant of the peer are measured one after the other,
`--repeats` times. A peer that is not being measured stands still. Prints medians, and the median of
the ratios within each turn; above 1 ours is the faster one. Every run goes to the JSON file.

    --install       makes what is missing of the peers' environments (llama.cpp compiles for about
                    15 minutes) in ~/.cache/mixtral-jax/peers, or in --envs
    llama.cpp       serves the 4-bit GGUF that the checkpoint was made from; nobody else quantises
    transformers    has no server: static batches in its own process, without HTTP
    512 prompt      one client, a prompt of 512 tokens and one token of answer: the prefill

Nothing else should run on the machine: llama.cpp's and torch's threads spin, so that a busy
neighbour costs them far more than its share.
"""

import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.command import run
from benchmarks.peers.environments import PEERS, Environments
from benchmarks.peers.servers import Contender, Load, Setting, ours, over_http, peer
from convert.pull import pull
from mixtral_jax.paths import cache_folder
from serving.bench.load import Level, median, prompts, words_for
from serving.bench.report import facts, write_json

_PREFILL_TOKENS = 512
_MARGIN = 64  # tokens by which a template may be longer than we think


@dataclass(frozen=True, kw_only=True)
class Point:
    """A load that every server is measured under."""

    name: str
    clients: int
    requests: int
    words: int
    answer_tokens: int

    def load(self, whose: str, turn: int) -> Load:
        """Returns prompts of this point, peer and turn alone, so that no server has them cached."""
        texts = prompts(self.requests, self.words, seed=f"{whose}, {self.name}, {turn}")
        return Load(texts=texts, clients=self.clients, answer_tokens=self.answer_tokens)

    def warm_up(self, whose: str) -> Load:
        """Returns a short load that is not counted."""
        texts = prompts(self.clients, self.words, seed=f"{whose}, {self.name}, first")
        return Load(texts=texts, clients=self.clients, answer_tokens=min(4, self.answer_tokens))

    def speed(self, level: Level) -> float:
        """Returns the figure to compare: tokens/s of answers, or of the prompt if it is all."""
        if self.answer_tokens == 1:
            return level.prompt_tokens / level.ttft["p50"]
        return level.tokens_per_second


@dataclass
class Result:
    """The runs of a variant of a peer at a point, and ours of the same turns."""

    point: Point
    contender: str
    ours: list[Level] = field(default_factory=list)
    theirs: list[Level] = field(default_factory=list)
    load_averages: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """The median of our speed over theirs, turn by turn."""
        return statistics.median(
            self.point.speed(mine) / self.point.speed(other)
            for mine, other in zip(self.ours, self.theirs, strict=True)
        )

    def to_json(self) -> dict[str, Any]:
        """Returns every figure, as JSON takes it."""
        return {
            "point": vars(self.point),
            "contender": self.contender,
            "ratio": self.ratio,
            "load_averages": self.load_averages,
            "ours": self.ours,
            "theirs": self.theirs,
        }


def in_turn(
    point: Point, mine: Contender, others: list[Contender], repeats: int
) -> Iterator[Result]:
    """Measures everybody `repeats` times; prints each turn."""
    results = [Result(point, other.name) for other in others]
    whose = others[0].name
    for contender in (mine, *others):
        contender.measure(point.warm_up(whose))
    for turn in range(repeats):
        load = point.load(whose, turn)
        average = os.getloadavg()[0]
        level = mine.measure(load)
        line = f"  {point.name:>12} {turn + 1}/{repeats} ours {point.speed(level):7.1f}"
        for result, other in zip(results, others, strict=True):
            result.ours.append(level)
            result.theirs.append(other.measure(load))
            result.load_averages.append(average)
            line += f"  {other.name} {point.speed(result.theirs[-1]):7.1f}"
        print(line, file=sys.stderr, flush=True)
    yield from results


def best(results: list[Result]) -> list[Result]:
    """Returns the variant with the highest median speed for each peer and point."""
    chosen: dict[tuple[str, str], Result] = {}
    for result in results:
        key = result.contender.split()[0], result.point.name
        if key not in chosen or _speed(result) > _speed(chosen[key]):
            chosen[key] = result
    return list(chosen.values())


def _speed(result: Result) -> float:
    return statistics.median(map(result.point.speed, result.theirs))


def markdown(results: list[Result]) -> str:
    """Returns a table in markdown; times are ms, p50 of the runs' medians, ours / theirs."""
    lines = [
        "| load | peer | tokens/s, ours | theirs | **ratio** | TTFT ms | ITL ms | errors |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        mine, other = median(result.ours), median(result.theirs)
        speeds = [result.point.speed(level) for level in (mine, other)]
        ttft = " / ".join(f"{1000 * level.ttft['p50']:.0f}" for level in (mine, other))
        itl = " / ".join(f"{1000 * level.itl['p50']:.1f}" for level in (mine, other))
        lines.append(
            f"| {result.point.name} | {result.contender} | {speeds[0]:.1f} | {speeds[1]:.1f} "
            f"| **{result.ratio:.2f}** | {ttft} | {itl.replace('nan', '-')} "
            f"| {mine.errors} / {other.errors} |"
        )
    return "\n".join(lines)


def points(
    clients: list[int], words: dict[int, int], prompt_tokens: int, answer_tokens: int
) -> list[Point]:
    """Returns the loads; `words` maps the tokens of a prompt to its number of words."""
    chosen = [
        Point(
            name=f"{count} client{'s' if count > 1 else ''}",
            clients=count,
            requests=max(4, count),
            words=words[prompt_tokens],
            answer_tokens=answer_tokens,
        )
        for count in clients
    ]
    prefill = Point(
        name=f"{_PREFILL_TOKENS} prompt",
        clients=1,
        requests=3,
        words=words[_PREFILL_TOKENS],
        answer_tokens=1,
    )
    return [*chosen, prefill]


def main(
    install: Annotated[bool, typer.Option("--install", help="Make what is missing first.")] = False,
    peers: Annotated[str, typer.Option(help="Which, in this order.")] = ",".join(PEERS),
    checkpoint: Annotated[Path, typer.Option(help="Float checkpoint: the weights.")] = Path(
        "checkpoints/smollm2-135m-instruct"
    ),
    our: Annotated[
        Path | None, typer.Option(help="What we serve, such as the same in int8.")
    ] = None,
    gguf: Annotated[Path | None, typer.Option(help="For llama.cpp; default: SmolLM2's.")] = None,
    hf: Annotated[
        Path | None, typer.Option(help="For the others; default: exported from the checkpoint.")
    ] = None,
    envs: Annotated[Path | None, typer.Option(help="Where the environments are.")] = None,
    dtypes: Annotated[str, typer.Option(help="Of transformers and vLLM.")] = "float32,bfloat16",
    serve: Annotated[
        str, typer.Option(help="Options of our server, as name=value,name=value.")
    ] = "",
    concurrency: Annotated[str, typer.Option(help="Clients at once.")] = "1,8,32",
    prompt_tokens: Annotated[int, typer.Option(help="About, template included.")] = 100,
    answer_tokens: Annotated[int, typer.Option(help="Of each answer.")] = 64,
    repeats: Annotated[int, typer.Option(help="How often each is measured.")] = 5,
    json_file: Annotated[Path, typer.Option("--json", help="Every run.")] = Path("peers.json"),
) -> None:
    """Measure our server and the peers in turn, on the same weights and prompts."""
    folder = cache_folder() / "peers"
    environments = Environments((envs or folder).expanduser().absolute())
    names = [name for name in PEERS if name in peers.split(",")]
    for name in names:
        if not environments.has(name):
            if not install:
                raise SystemExit(f"{name} is not in {environments.folder}; add --install")
            environments.install(name)
    if hf is None:
        hf = folder / "hf" / checkpoint.name
        if not hf.exists():
            from convert.export import export

            export(checkpoint, hf)
    clients = [int(number) for number in concurrency.split(",")]
    setting = Setting(
        checkpoint=our or checkpoint,
        hf=hf,
        gguf=gguf or pull("smollm2-135m-instruct"),
        dtypes=dtypes.split(","),
        clients=max(clients),
        context=max(prompt_tokens, _PREFILL_TOKENS) + answer_tokens + _MARGIN,
        environments=environments,
        options=dict(pair.split("=", 1) for pair in serve.split(",") if pair),
    )
    before = facts()
    results: list[Result] = []
    with ours(setting) as endpoint:
        mine = over_http("ours", endpoint)
        lengths = (prompt_tokens, _PREFILL_TOKENS)
        words = {length: words_for(endpoint, length) for length in lengths}
        for name in names:
            print(f"{name}: {environments.version(name)}", file=sys.stderr, flush=True)
            with peer(name, setting) as others:
                for point in points(clients, words, prompt_tokens, answer_tokens):
                    results += in_turn(point, mine, others, repeats)
    write_json(
        json_file,
        {
            "facts": before,
            "serve": setting.options,
            "peers": {name: environments.version(name) for name in names},
            "results": [result.to_json() for result in results],
        },
    )
    print(markdown(best(results)))


if __name__ == "__main__":
    run(main, "benchmarks.peers")
