"""A conversation on the page, as a person has it in a browser."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serving.access.credentials import Access
from serving.access.keyring import Keyring
from tests.support.fakes import KEY, Stack, running_stack

Open = Callable[..., Any]


def ask(page: Any, text: str, answer: str | None = None) -> None:
    """Sends a message; waits until its answer has ended with this text, unless it is None."""
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    if answer is not None:
        ended(page, answer)


def ended(page: Any, answer: str) -> None:
    page.wait_for_function(
        """(answer) => {
          const last = document.querySelector("article:last-child.assistant");
          return last && !last.hasAttribute("aria-busy")
            && last.querySelector(".body").textContent === answer;
        }""",
        arg=answer,
    )


def bodies(page: Any) -> list[str]:
    return [str(text) for text in page.locator("article .body").all_text_contents()]


def asked(stack: Stack) -> list[tuple[str, str]]:
    """The conversation that the service was sent last."""
    return [(turn.role, turn.content) for turn in stack.service.requests[-1].chat.messages]


def test_a_conversation_is_sent_whole_and_survives_a_reload(stack: Stack, open_page: Open) -> None:
    page = open_page(stack.url)
    page.fill("#system", "Be brief.")
    ask(page, "one **two**", "one two")
    assert page.locator("article:last-child strong").text_content() == "two"
    ask(page, "three", "three")
    turns = [("user", "one **two**"), ("assistant", "one **two**"), ("user", "three")]
    assert asked(stack) == [("system", "Be brief."), *turns]
    assert "1 token" in page.locator("article:last-child .figures").text_content()
    assert page.locator("#status").text_content() == "The answer is complete: 1 tokens."
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.reload()
    assert bodies(page) == ["one **two**", "one two", "three", "three"]
    assert page.input_value("#system") == "Be brief."
    page.click("#new")
    assert bodies(page) == []
    page.reload()
    assert bodies(page) == []


def test_an_answer_can_be_stopped_and_gone_on_with(stack: Stack, open_page: Open) -> None:
    page = open_page(stack.url)
    ask(page, "one !wait two")
    page.wait_for_selector("article:last-child .body p")
    page.click("#stop")
    ended(page, "one")
    assert stack.service.cancelled.wait(10)
    assert "stopped" in page.locator("article:last-child .figures").text_content()
    page.click("text=Go on")
    ended(page, "oneone")
    assert asked(stack)[-1] == ("assistant", "one")
    assert stack.service.requests[-1].chat.continue_last


def test_messages_are_changed_and_answered_anew(stack: Stack, open_page: Open) -> None:
    page = open_page(stack.url)
    ask(page, "one", "one")
    ask(page, "two", "two")
    page.click("article:last-child >> text=Regenerate")
    ended(page, "two")
    assert [text for _, text in asked(stack)] == ["one", "one", "two"]
    assert len(stack.service.requests) == 3
    page.locator("article.user").first.get_by_text("Edit").click()
    page.fill("article.user textarea", "three")
    page.click("text=Save and answer")
    ended(page, "three")
    assert asked(stack) == [("user", "three")]
    assert bodies(page) == ["three", "three"]


def test_parameters_are_sent_and_kept(stack: Stack, open_page: Open) -> None:
    page = open_page(stack.url)
    for name, value in (("temperature", "0.5"), ("max_tokens", "2"), ("seed", "7")):
        page.fill(f"#{name}", value)
    page.fill("#stop-texts", "x y\nz")
    page.reload()
    ask(page, "one two three", "one two")
    request = stack.service.requests[-1]
    assert (request.sampling.temperature, request.max_tokens, request.sampling.seed) == (0.5, 2, 7)
    assert list(request.stop) == ["x y", "z"] and request.top_logprobs == 5
    assert not request.sampling.HasField("top_p")  # empty: the server's own
    assert "cut at its most tokens" in page.locator("article:last-child .figures").text_content()
    page.uncheck("#probabilities")
    page.fill("#temperature", "3")
    ask(page, "one")
    assert "Temperature goes from 0 to 2." in page.locator("#problem").text_content()
    assert page.evaluate("document.activeElement.id") == "temperature"
    page.fill("#temperature", "")
    ask(page, "four", "four")
    assert not stack.service.requests[-1].HasField("top_logprobs")


def test_a_json_schema_is_sent_and_its_answer_is_laid_out(stack: Stack, open_page: Open) -> None:
    page = open_page(stack.url)
    page.select_option("#format", "json_schema")
    page.fill("#schema", "{")
    ask(page, "x")
    assert "not JSON" in page.locator("#problem").text_content()
    page.fill("#schema", '{"type": "object"}')
    ask(page, '{"a":[1]}', 'jsonCopy code{\n  "a": [\n    1\n  ]\n}\n')
    sent = stack.service.requests[-1].response_format
    assert json.loads(sent.json_schema) == {"type": "object"}


def test_tools_are_called_and_given_results(stack: Stack, open_page: Open) -> None:
    page = open_page(stack.url)
    page.click("#add-function")
    page.select_option("#tool_choice", "required")
    ask(page, '!call:weather:{"place":"Oslo"}')
    page.wait_for_selector(".call")
    assert page.locator(".call pre").text_content() == '{\n  "place": "Oslo"\n}'
    page.fill(".call textarea", "rain soon")
    page.click("text=Send results")
    ended(page, "rain soon")
    chat = stack.service.requests[-1].chat
    assert [tool.name for tool in chat.tools] == ["weather"]
    assert chat.messages[1].tool_calls[0].arguments == '{"place":"Oslo"}'
    assert (chat.messages[2].role, chat.messages[2].tool_call_id) == ("tool", "call00000")
    page.reload()
    assert page.locator("article.tool .body").text_content() == "rain soon"


def test_probabilities_are_shown_and_gone_on_from(stack: Stack, open_page: Open) -> None:
    page = open_page(stack.url)
    ask(page, "one two three", "one two three")
    page.click("article:last-child button:text-is('Tokens')")
    tokens = page.locator("article:last-child .t")
    assert tokens.all_text_contents() == ["one", " two", " three"]
    tokens.nth(1).hover()
    assert "two 36.8 %" in page.locator("#bubble").text_content()  # exp(-1)
    page.keyboard.press("Escape")
    page.focus("article:last-child .tokens")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "13.5 %" in page.locator("#bubble").text_content()  # exp(-2)
    page.keyboard.press("Enter")
    assert page.get_by_role("dialog").is_visible()
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.classList.contains('tokens')")


def test_another_token_is_gone_on_from(writing: Any, open_page: Open) -> None:
    stack, service = writing
    service.pieces = ["a", " b\n", " c"]
    page = open_page(stack.url)
    page.check("#shown")
    ask(page, "x", "a b\n c")
    page.locator("article:last-child .t").nth(1).click()
    service.pieces = [" d"]
    page.click('[aria-label="Go on with other"] >> nth=0')
    ended(page, "a other d")
    chat = service.requests[-1].chat
    assert (chat.messages[-1].content, chat.continue_last) == ("a other", True)


def test_what_is_told_of_a_token_goes_with_its_message(writing: Any, open_page: Open) -> None:
    stack, service = writing
    service.pieces = ["a", " b"]
    page = open_page(stack.url)
    page.check("#shown")
    ask(page, "x", "a b")
    page.locator("article:last-child .t").nth(1).click()
    assert page.is_visible("#bubble")
    page.click("#new")
    assert page.is_hidden("#bubble")


def test_json_is_shown_as_its_tokens_too(writing: Any, open_page: Open) -> None:
    stack, service = writing
    service.pieces = ['{"a":', " 1}"]
    page = open_page(stack.url)
    page.check("#shown")
    ask(page, "x", '{"a": 1}')
    assert page.locator("article:last-child .t").count() == 2


def test_models_and_adapters_are_chosen(stack: Stack, open_page: Open) -> None:
    stack.service.adapters = {"poems": "ab" * 32}
    page = open_page(stack.url)
    page.reload()
    page.wait_for_selector("#model option >> nth=1", state="attached")
    options = page.locator("#model option").all_text_contents()
    assert options == ["scripted-7B", "poems (adapter)"]
    page.select_option("#model", "poems")
    ask(page, "one", "one")
    assert stack.service.requests[-1].model == "poems"
    assert page.locator("article:last-child h2").text_content() == "Answer poems"
    page.reload()
    page.wait_for_selector("#model option >> nth=1", state="attached")
    assert page.input_value("#model") == "poems"


def test_the_key_stays_in_the_tab_unless_it_is_kept(stack: Stack, open_page: Open) -> None:
    page = open_page(stack.url)
    stored = "[{...sessionStorage}, {...localStorage}].map((kept) => JSON.stringify(kept))"
    tab, browser = page.evaluate(stored)
    assert KEY in tab and KEY not in browser
    page.check("#keep")
    tab, browser = page.evaluate(stored)
    assert KEY not in tab and KEY in browser
    page.reload()
    ask(page, "one", "one")
    page.click("#forget")
    assert not [text for text in page.evaluate(stored) if KEY in text]
    ask(page, "two")
    page.wait_for_function("() => document.getElementById('problem').textContent.includes('a key')")


def test_a_conversation_is_exported_and_imported(
    stack: Stack, open_page: Open, tmp_path: Path
) -> None:
    page = open_page(stack.url)
    ask(page, "one two", "one two")
    with page.expect_download() as download:
        page.click("#export")
    file = tmp_path / "conversation.json"
    download.value.save_as(file)
    written = json.loads(file.read_text(encoding="utf-8"))
    assert [turn["content"] for turn in written["messages"]] == ["one two", "one two"]
    assert KEY not in file.read_text(encoding="utf-8")
    page.click("#new")
    page.set_input_files("#file", file)
    page.wait_for_selector("article.assistant")
    assert bodies(page) == ["one two", "one two"]
    assert page.locator("article:last-child button:text-is('Tokens')").is_visible()
    file.write_text('{"version": 1, "messages": [{"role": "root", "content": "x"}]}', "utf-8")
    page.set_input_files("#file", file)
    page.wait_for_function(
        "() => document.getElementById('problem').textContent.includes('Message 1')"
    )
    assert bodies(page) == ["one two", "one two"]


def test_the_models_own_parameters_are_shown_where_none_is_given(open_page: Open) -> None:
    with running_stack() as stack:
        stack.service.sampling_defaults.temperature = 0.25
        page = open_page(stack.url)
        page.wait_for_selector("#temperature[placeholder='0.25']")
        assert page.get_attribute("#top_p", "placeholder") == ""
        ask(page, "one", "one")
        assert not stack.service.requests[-1].sampling.HasField("temperature")  # nothing was sent


def test_the_page_lives_below_a_path_of_a_proxy(open_page: Open) -> None:
    with running_stack(root_path="/models/mixtral") as stack:
        page = open_page(f"{stack.url}/models/mixtral")
        assert page.url == f"{stack.url}/models/mixtral/"
        asked_for: list[str] = []
        page.on("request", lambda request: asked_for.append(request.url))
        ask(page, "one two", "one two")
        assert asked_for[-1:] == [f"{stack.url}/models/mixtral/v1/chat/completions"]


def test_a_server_that_lets_everybody_in_asks_for_no_key(open_page: Open) -> None:
    """Its checks of foreign pages let its own page in."""
    with running_stack(access=Access(Keyring({}), is_open=True)) as stack:
        page = open_page(stack.url, key="")
        ask(page, "one two", "one two")
        assert page.locator("#problem").text_content() == ""


def test_an_answer_that_was_cut_is_gone_on_with(stack: Stack, open_page: Open) -> None:
    page = open_page(stack.url)
    page.fill("#max_tokens", "1")
    ask(page, "one two", "one")
    page.fill("#max_tokens", "")
    page.click("article:last-child .note-of >> text=Go on")
    ended(page, "oneone")
    assert stack.service.requests[-1].chat.continue_last


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_is_the_machines_until_one_is_chosen(
    scheme: str, stack: Stack, open_page: Open
) -> None:
    page = open_page(stack.url, color_scheme=scheme)
    other = {"light": "dark", "dark": "light"}[scheme]
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    page.click("#dark")
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == other
