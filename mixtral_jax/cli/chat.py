"""`mixtral-jax chat`: a conversation in the terminal."""

import sys
from typing import Annotated

import typer

from mixtral_jax.cli.options import DtypeOption, ModelOption
from mixtral_jax.errors import UserError


def chat(
    model: ModelOption,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes answers repeatable.")] = None,
    dtype: DtypeOption = None,
) -> None:
    """Talk to a model in the terminal. Ctrl-C ends an answer, Ctrl-D the conversation."""
    from mixtral_jax import generate, load
    from mixtral_jax.compilation import keep_programs
    from mixtral_jax.tokenization.messages import Message

    keep_programs()
    transformer, tokenizer = load(model, dtype=dtype)
    first: list[Message] = []
    if system is not None:
        first.append({"role": "system", "content": system})
    said: list[Message] = []  # user and assistant in turn
    interactive = sys.stdin.isatty()
    while True:
        try:
            text = input("> " if interactive else "")
        except (EOFError, KeyboardInterrupt):
            break
        if not text.strip():
            continue
        said.append({"role": "user", "content": text})
        answer = ""
        try:
            for piece in generate(
                transformer,
                tokenizer,
                [*first, *said],
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
            ):
                answer += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except UserError as error:
            # Most likely the context is full; what was said last may still fit without the rest.
            print(f"[{error}. The conversation starts anew]", end="")
            said = []
            print()
            continue
        print()
        said.append({"role": "assistant", "content": answer})
