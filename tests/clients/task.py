"""Task: what every client asks in its script on structured answers and calls of functions.

A record of six fields and a set of two functions. All their values are bounded, so that the answer
of a model that makes no sense of them still ends.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

URL = os.environ["ENDPOINT"]
KEY = os.environ["KEY"]
MODEL = os.environ.get("MODEL", "SmolLM2-135M-Instruct")
MAX_TOKENS = 160
QUESTION = "Ada is 36, lives in Paris, likes chess and tea, and is a member. Describe her."
WEATHER_QUESTION = "What is the weather in Paris?"
RESULT = "12 degrees, rain"


class Person(BaseModel):
    """A person."""

    name: Annotated[str, Field(max_length=12)]
    town: Literal["Paris", "Rome", "Oslo"]
    age: Annotated[int, Field(ge=0, le=120)]
    likes: Annotated[list[Annotated[str, Field(max_length=8)]], Field(max_length=2)]
    is_member: bool
    note: Annotated[str, Field(max_length=12)] | None


class GetWeather(BaseModel):
    """The weather in a town."""

    town: Annotated[str, Field(max_length=12)]
    unit: Literal["c", "f"]


class Add(BaseModel):
    """Adds two numbers."""

    a: Annotated[int, Field(ge=0, le=99)]
    b: Annotated[int, Field(ge=0, le=99)]


FUNCTIONS: dict[str, type[BaseModel]] = {"get_weather": GetWeather, "add": Add}


def tool(name: str) -> dict[str, Any]:
    """A function as OpenAI's chat route takes it."""
    model = FUNCTIONS[name]
    function = {
        "name": name,
        "description": model.__doc__,
        "parameters": model.model_json_schema(),
    }
    return {"type": "function", "function": function}


TOOLS = [tool(name) for name in FUNCTIONS]
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def step(label: str) -> None:
    """Names the call that follows for whoever records the requests."""
    print(label)
    if place := os.environ.get("STEP_FILE"):
        Path(place).write_text(label, encoding="utf-8")


def check_person(text: str) -> Person:
    """The person of a whole answer."""
    return Person.model_validate_json(text)


def check_call(name: str, arguments: str) -> BaseModel:
    """The arguments of a call, held to its function."""
    return FUNCTIONS[name].model_validate(json.loads(arguments))
