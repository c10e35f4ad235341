"""anthropic: messages at once and streamed, prefills, stop sequences, models, errors."""

import os

import anthropic

URL, KEY = os.environ["ENDPOINT"], os.environ["KEY"]
HISTORY = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": [{"type": "text", "text": "And of Italy?"}]},
]
# The package has no such parameter any more, but the API does.
GREEDY = {"temperature": 0}


def check_messages(client: anthropic.Anthropic) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id) == model
    options = {"model": model.id, "max_tokens": 8, "messages": HISTORY, "extra_body": GREEDY}
    answer = client.messages.create(**options, system="You are brief.", metadata={"user_id": "u"})
    assert answer.id.startswith("msg_") and answer.model == model.id
    assert answer.stop_reason in ("end_turn", "max_tokens")
    usage = answer.usage
    assert usage.input_tokens + usage.cache_read_input_tokens > 20 and usage.output_tokens <= 8
    counted = client.messages.count_tokens(
        model=model.id, messages=HISTORY, system="You are brief."
    )
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    with client.messages.stream(**options, system="You are brief.") as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == answer.content[0].text == final.content[0].text
    assert final.usage.output_tokens == usage.output_tokens
    assert final.usage.input_tokens + final.usage.cache_read_input_tokens == (
        usage.input_tokens + usage.cache_read_input_tokens
    )
    events = list(client.messages.create(**options, system="You are brief.", stream=True))
    assert events[0].message.usage.input_tokens > 0
    assert (events[-2].type, events[-1].type) == ("message_delta", "message_stop")
    begun = [*HISTORY[:1], {"role": "assistant", "content": "The capital of France is"}]
    prefilled = client.messages.create(**{**options, "messages": begun})
    assert not prefilled.content[0].text.startswith("The capital")
    stop = answer.content[0].text[1:3]
    stopped = client.messages.create(**options, system="You are brief.", stop_sequences=[stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop), stopped
    assert "".join(block.text for block in stopped.content) == answer.content[0].text[:1]


def check_refusals(client: anthropic.Anthropic) -> None:
    hello = {"model": "azureai", "max_tokens": 4, "messages": HISTORY[:1]}
    try:
        client.messages.create(**hello, extra_body={"temperature": 7})
        raise AssertionError("a temperature of 7 was taken")
    except anthropic.BadRequestError as error:
        assert error.type == "invalid_request_error" and error.request_id.startswith("req_")
        assert "temperature" in error.api_message
    try:
        client.with_options(api_key="wrong").messages.create(**hello)
        raise AssertionError("a wrong key was taken")
    except anthropic.AuthenticationError as error:
        assert error.type == "authentication_error"


for base in (URL, f"{URL}/anthropic"):
    with anthropic.Anthropic(
        base_url=base, api_key=KEY, max_retries=0, _strict_response_validation=True
    ) as client:
        check_messages(client)
        check_refusals(client)
with anthropic.Anthropic(base_url=URL, auth_token=KEY, max_retries=0) as client:
    assert client.models.list().data  # Authorization: Bearer
with anthropic.Anthropic(
    base_url=URL, api_key="-", default_headers={"X-Api-Key": KEY}, max_retries=0
) as client:
    assert client.models.list().data
