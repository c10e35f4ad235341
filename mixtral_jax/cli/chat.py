"""`mixtral-jax chat`: a conversation in the terminal."""

import sys
from typing import Annotated

import typer

from mixtral_jax.cli.options import DpAttentionOption, DtypeOption, MeshOption, ModelOption
from mixtral_jax.errors import UserError


def chat(
    model: ModelOption,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is greedy.")] = 0.7,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Probability of the likeliest tokens to draw among.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed that makes answers repeatable.")] = None,
    dtype: DtypeOption = None,
    mesh: MeshOption = "auto",
    dp_attention: DpAttentionOption = False,
) -> None:
    """Talk to a model in the terminal. Ctrl-C ends an answer, Ctrl-D the conversation."""
    from mixtral_jax import generate, load
    from mixtral_jax.compilation import keep_programs
    from mixtral_jax.tokenization.messages import Message

    keep_programs()
    transformer, tokenizer = load(model, mesh, dtype, dp_attention)
    if tokenizer is None:
        raise UserError(f"{model} has no tokenizer that is supported, which a chat needs")
    beginning: list[Message] = []
    if system is not None:
        beginning.append({"role": "system", "content": system})
    turns: list[Message] = []  # of the user and the assistant
    interactive = sys.stdin.isatty()
    while True:
        try:
            text = input("> " if interactive else "")
        except (EOFError, KeyboardInterrupt):
            break
        if not text.strip():
            continue
        turns.append({"role": "user", "content": text})
        answer = ""
        try:
            for piece in generate(
                transformer,
                tokenizer,
                [*beginning, *turns],
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
            # Most likely the context is full; a new conversation has room again.
            print(f"[{error}. The conversation starts anew]", end="")
            turns = []
            print()
            continue
        print()
        turns.append({"role": "assistant", "content": answer})
