"""`mixtral-jax chat`: a conversation in the terminal."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixtral_jax.cli.options import DpAttentionOption, DtypeOption, MeshOption, ModelOption
from mixtral_jax.errors import UserError

if TYPE_CHECKING:
    from mixtral_jax.cli.answers import Answers
    from mixtral_jax.tokenization.messages import Message


def chat(
    model: ModelOption,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=2, help="0 is greedy; default: the model's, or 0.7.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Probability of the likeliest tokens to draw among; default: the model's, or 1.",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed that makes answers repeatable.")] = None,
    json_schema: Annotated[
        Path | None,
        typer.Option(dir_okay=False, exists=True, help="JSON Schema that every answer matches."),
    ] = None,
    tools: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            exists=True,
            help="JSON list of functions that the model may call; you are asked for the results.",
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="LoRA adapter of PEFT's form that is merged into the model."
        ),
    ] = None,
    dtype: DtypeOption = None,
    mesh: MeshOption = "auto",
    dp_attention: DpAttentionOption = False,
) -> None:
    """Talk to a model in the terminal. Ctrl-C ends an answer, Ctrl-D the conversation."""
    from mixtral_jax import SamplingParams, load, load_adapter, merge
    from mixtral_jax.checkpoint.pretrained import open_pretrained
    from mixtral_jax.cli.answers import Answers, form_of, tools_of
    from mixtral_jax.compilation import keep_programs
    from mixtral_jax.sampling_params import SamplingFields
    from mixtral_jax.tokenization.messages import Message

    functions = () if tools is None else tools_of(tools)
    schema = None if json_schema is None else json_schema.read_text(encoding="utf-8")
    keep_programs()
    transformer, tokenizer = load(model, mesh, dtype, dp_attention)
    if tokenizer is None:
        raise UserError(f"{model} has no tokenizer that is supported, which a chat needs")
    if adapter is not None:
        transformer = merge(transformer, load_adapter(adapter, transformer))
    form = form_of(transformer, tokenizer, schema, functions)
    if form is not None and form.weakened:
        print(f"[not enforced: {'; '.join(form.weakened)}]", file=sys.stderr)
    own = SamplingParams(**open_pretrained(model).sampling_defaults)
    given: SamplingFields = {"seed": seed}
    if temperature is not None:
        given["temperature"] = temperature
    if top_p is not None:
        given["top_p"] = top_p
    answers = Answers(transformer, tokenizer, replace(own, **given), max_tokens, functions, form)
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
        try:
            _answer(answers, beginning, turns, interactive)
        except UserError as error:
            # Most likely the context is full; a new conversation has room again.
            print(f"[{error}. The conversation starts anew]")
            turns = []


def _answer(
    answers: "Answers", beginning: "list[Message]", turns: "list[Message]", interactive: bool
) -> None:
    """Prints the answer to the turns and adds it to them, until it calls no function."""
    from mixtral_jax.cli.answers import results, written
    from mixtral_jax.tokenization.messages import Message

    while True:
        text, calls = "", []
        try:
            for new in answers.answer([*beginning, *turns]):
                if isinstance(new, str):
                    text += new
                    print(new, end="", flush=True)
                else:
                    calls.append(new)
                    print(f"{written(new)}", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        if not calls:
            print()
        message: Message = {"role": "assistant", "content": text}
        if calls:
            message["tool_calls"] = calls
        turns.append(message)
        if not calls:
            return
        try:
            turns += results(calls, lambda name: input(f"{name} = " if interactive else ""))
        except (EOFError, KeyboardInterrupt):
            turns.pop()  # a call without its result
            return
