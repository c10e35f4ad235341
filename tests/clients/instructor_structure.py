"""instructor over openai's client: each of its modes for OpenAI's API, whole and in parts."""

import instructor
import openai
from instructor.core import IncompleteOutputException, InstructorRetryException
from task import KEY, MAX_TOKENS, MODEL, QUESTION, URL, Person, step

ASK = [{"role": "user", "content": QUESTION}]
MODES = ("TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA", "MD_JSON")
# They send no schema that a server could hold the answer to: any object, or any text, may come.
UNHELD = ("JSON", "MD_JSON")
OPTIONS = {"model": MODEL, "messages": ASK, "max_tokens": MAX_TOKENS, "temperature": 0}

with openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0) as plain:
    for mode in MODES:
        client = instructor.from_openai(plain, mode=getattr(instructor.Mode, mode))
        step(mode)
        try:
            person = client.chat.completions.create(**OPTIONS, response_model=Person, max_retries=1)
            assert isinstance(person, Person), person
        except (IncompleteOutputException, InstructorRetryException) as error:
            # What was answered is looked at, so that no refusal passes as an odd answer.
            assert mode in UNHELD, (mode, error)
            answer = error.last_completion.choices[0].message.content
            assert answer and (mode == "MD_JSON" or answer.lstrip()[0] == "{"), error
        if mode not in UNHELD:
            step(f"{mode}, streamed")
            *_, last = client.chat.completions.create_partial(**OPTIONS, response_model=Person)
            assert Person.model_validate(last.model_dump()), last
