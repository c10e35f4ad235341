"""langchain-openai: the class that a prompt too long for the context raises."""

import os

from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI

URL, KEY, LONG = os.environ["ENDPOINT"], os.environ["KEY"], os.environ["LONG"]
chat = ChatOpenAI(base_url=f"{URL}/v1", api_key=KEY, model="azureai", max_retries=0)
try:
    chat.invoke(LONG)
    raise AssertionError("a prompt that is too long was taken")
except ContextOverflowError as error:
    assert "maximum context length is 64 tokens" in str(error), error
