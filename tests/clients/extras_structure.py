"""Fields of vLLM and llama.cpp for structured answers, sent through openai's client."""

import re

import openai
from task import KEY, MAX_TOKENS, MODEL, QUESTION, URL, Person, check_person, step

SCHEMA = Person.model_json_schema()
EXPRESSION = "[a-f]{2}-[0-9]{2}"
CHOICES = ["yes", "no"]
LARK = 'start: "yes" | "no"'
GBNF = 'root ::= "yes" | "no"'


def is_person(text: str) -> bool:
    return bool(check_person(text))


def is_match(text: str) -> bool:
    return re.fullmatch(EXPRESSION, text) is not None


def is_choice(text: str) -> bool:
    return text in CHOICES


# Name of the call -> fields beside the others, and what holds for the answer.
CALLS = {
    "vllm structured_outputs json": ({"structured_outputs": {"json": SCHEMA}}, is_person),
    "vllm structured_outputs regex": ({"structured_outputs": {"regex": EXPRESSION}}, is_match),
    "vllm structured_outputs choice": ({"structured_outputs": {"choice": CHOICES}}, is_choice),
    "vllm structured_outputs grammar": ({"structured_outputs": {"grammar": LARK}}, is_choice),
    "vllm guided_json": ({"guided_json": SCHEMA}, is_person),
    "vllm guided_regex": ({"guided_regex": EXPRESSION}, is_match),
    "vllm guided_choice": ({"guided_choice": CHOICES}, is_choice),
    "vllm guided_grammar": ({"guided_grammar": LARK}, is_choice),
    "llama.cpp json_schema": ({"json_schema": SCHEMA}, is_person),
    "llama.cpp grammar": ({"grammar": GBNF}, is_choice),
    "llama.cpp json_object with a schema": (
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        is_person,
    ),
    "llama.cpp json_schema without its object": (
        {"response_format": {"type": "json_schema", "schema": SCHEMA}},
        is_person,
    ),
}
STRICT = {
    "type": "json_schema",
    "json_schema": {"name": "person", "strict": True, "schema": SCHEMA},
}

with openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0) as client:
    options = {"model": MODEL, "max_tokens": MAX_TOKENS, "temperature": 0}
    for name, (fields, holds) in CALLS.items():
        step(name)
        answer = client.chat.completions.create(
            **options, messages=[{"role": "user", "content": QUESTION}], extra_body=fields
        )
        assert holds(answer.choices[0].message.content), (name, answer)
    for name, fields in {
        "completion response_format": {"response_format": STRICT},
        "completion structured_outputs json": {"structured_outputs": {"json": SCHEMA}},
        "completion llama.cpp json_schema": {"json_schema": SCHEMA},
    }.items():
        step(name)
        completion = client.completions.create(**options, prompt=QUESTION, extra_body=fields)
        assert is_person(completion.choices[0].text), (name, completion)
