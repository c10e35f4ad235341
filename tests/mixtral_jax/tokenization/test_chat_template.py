"""Templates render in a sandbox, and may refuse a chat."""

import re
from pathlib import Path

import pytest
import transformers

from mixtral_jax.errors import ChatError, TokenizerError
from mixtral_jax.tokenization.chat_template import ChatTemplate
from mixtral_jax.tokenization.tokenizer import load
from tests.support.tokenizers import CHATML, byte_level_spec, say, turns, write

GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}\n"
    "  {% generation %}\n{{ m.content }}{%- if loop.last %} last{% endif %}<|im_end|>"
    "{%- endgeneration %}\n{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)


def test_the_tag_for_trainers_writes_what_it_encloses(tmp_path: Path) -> None:
    marked = load(write(tmp_path / "a", template=GENERATION))
    plain = re.sub(r"{%(-?) (end)?generation %}", r"{%\1 if true %}", GENERATION)
    plain = plain.replace("{%- if true %}\n{% else", "{%- endif %}\n{% else")
    unmarked = load(write(tmp_path / "b", template=plain))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "a")
    for chat in (turns("Hi"), turns("Hi", "Yo"), turns("Hi", "Yo", "Bye"), turns("", " a ", "\n")):
        expected = theirs.apply_chat_template(chat, tokenize=True, return_dict=False)
        assert marked.chat(chat) == unmarked.chat(chat) == expected


def test_a_tag_that_is_not_closed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no valid Jinja template.*endgeneration"):
        load(write(tmp_path, template="{% generation %}{{ messages }}"))


@pytest.mark.parametrize(
    "source",
    [
        "{% break %}",
        "{% for m in messages %}{% generation %}{% break %}{% endgeneration %}{% endfor %}",
        "{{ f(a=1, a=2) }}",
        "{% for m in messages %}" * 25 + "{% endfor %}" * 25,
        "{% if messages %}" * 300 + "{% endif %}" * 300,
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{{ " + "9" * 5000 + " }}",
    ],
    ids=["break", "break in a call", "argument twice", "loops", "ifs", "parentheses", "digits"],
)
def test_what_python_cannot_compile_is_no_valid_template(source: str) -> None:
    with pytest.raises(TokenizerError, match="the chat template is no valid Jinja template: .+"):
        ChatTemplate(source, {})


def test_a_template_that_writes_half_a_character_refuses_the_chat(tmp_path: Path) -> None:
    source = "{{ messages[0].content }}{{ '\\ud800' }}"
    tokenizer = load(write(tmp_path, template=source))
    with pytest.raises(ChatError, match="template writes has half of a surrogate pair at .* 2:"):
        tokenizer.chat(turns("Hi"))


def test_a_template_that_changes_the_last_message_cannot_continue_it(tmp_path: Path) -> None:
    chat = [*turns("Hi"), say("assistant", "Hel")]
    shouts = CHATML.replace("m['content']", "(m['content'] | upper)")
    tokenizer = load(write(tmp_path, byte_level_spec(), shouts))
    with pytest.raises(ChatError, match="does not write it as it is"):
        tokenizer.chat(chat, continue_last=True)
    twice = "{% for m in messages %}{{ m.content ~ m.role ~ m.content }}{% endfor %}"
    # This one writes the message twice: what comes last is continued.
    tokenizer = load(write(tmp_path, byte_level_spec(), twice))
    assert tokenizer.decode(tokenizer.chat(chat, continue_last=True)).endswith("Hel")


def test_a_control_token_put_together_from_parts_is_refused(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ '<|im_' + 'start|>' + m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="puts the control token <|im_start|> together"):
        load(write(tmp_path, template=template))


def test_a_template_may_refuse_a_chat(tmp_path: Path) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    tokenizer = load(write(tmp_path, template=template))
    assert tokenizer.decode(tokenizer.chat(turns("a"))) == "x"
    with pytest.raises(ChatError, match="refuses this chat: no system"):
        tokenizer.chat([say("system", "a")])


def test_a_template_that_fails_refuses_the_chat(tmp_path: Path) -> None:
    tokenizer = load(write(tmp_path, template="{{ messages[0].content + 1 }}"))
    with pytest.raises(ChatError, match="refuses this chat: can only concatenate str"):
        tokenizer.chat(turns("a"))


def test_a_template_cannot_leave_its_sandbox(tmp_path: Path) -> None:
    template = "{{ messages.append(1) if messages[0].content == 'go' }}"
    tokenizer = load(write(tmp_path, template=template))
    with pytest.raises(ChatError, match="unsafe"):
        tokenizer.chat(turns("go"))


def test_what_a_template_writes_has_a_bound() -> None:
    """Each message and all before it: 2,000 messages of 1,000 characters would be 2 GB."""
    source = "{% for m in messages %}{% for n in messages %}{{ n.content }}{% endfor %}{% endfor %}"
    template = ChatTemplate(source, {})
    assert template.render(turns("a", "b", "c")) == "abcabcabc"
    # 2**20 characters, and 4 for each of the messages' and of 256 around each of them.
    with pytest.raises(ChatError, match="it writes more than 11,096,576 characters"):
        template.render([say("user", "x" * 1000)] * 2000)


def test_a_refusal_quotes_a_part_of_a_message() -> None:
    template = ChatTemplate("{{ raise_exception('not ' + messages[0].content) }}", {})
    with pytest.raises(ChatError) as caught:
        template.render([say("user", "x" * 10_000)])
    assert "refuses this chat: not xxx" in str(caught.value) and len(str(caught.value)) < 600
