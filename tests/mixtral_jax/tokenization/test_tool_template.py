"""Forms of calls that chat templates write."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken

from mixtral_jax.tokenization.messages import Message
from mixtral_jax.tokenization.tokenizer import Tokenizer, load
from mixtral_jax.tokenization.tool_form import Slot, ToolForm
from mixtral_jax.tokenization.tool_prompt import PROMPT_FORM
from tests.support.tokenizers import CHATML, SPECS, control_ids, say, write
from tests.support.tools import ROME, SUM, TOOLS, answered, asked

TURN = "'<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n'"
TAIL = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
TOOLS_LINE = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
BLOCKS = (  # as Hermes, Qwen and others write calls
    TOOLS_LINE + "{% for m in messages %}{% if m.tool_calls %}"
    "{{ '<|im_start|>assistant' }}{% for c in m.tool_calls %}"
    '{{ \'\\n<tool_call>\\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ c.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% else %}{{ " + TURN + " }}{% endif %}{% endfor %}" + TAIL
)
LIST = (  # as Mistral's, with ids
    TOOLS_LINE + "{% for m in messages %}{% if m.tool_calls %}{{ '<|im_start|>assistant\\n"
    "[TOOL_CALLS] [' }}{% for c in m.tool_calls %}{{ '{\"name\": \"' + c.function.name + '\", "
    '"arguments": \' + c.function.arguments | tojson + \', "id": "\' + c.id + \'"}\' }}'
    "{% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ']<|im_end|>\\n' }}"
    "{% else %}{{ " + TURN + " }}{% endif %}{% endfor %}" + TAIL
)
SINGLE = (  # as Llama's
    TOOLS_LINE + "{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}"
    "{{ raise_exception('one call at once') }}{% endif %}{% set c = m.tool_calls[0].function %}"
    '{{ \'<|im_start|>assistant\\n{"name": "\' + c.name + \'", "parameters": \' }}'
    "{{ c.arguments | tojson(separators=(',', ':')) + '}<|im_end|>\\n' }}"
    "{% else %}{{ " + TURN + " }}{% endif %}{% endfor %}" + TAIL
)
PYTHON = BLOCKS.replace(" | tojson }}{{ '}", " | string }}{{ '}")  # {'a': 1} is no JSON

FIELDS = ('{"name": "', Slot.NAME, '", "arguments": ', Slot.ARGUMENTS)


def with_tokens(*tokens: str) -> tokenizers.Tokenizer:
    spec = tokenizers.Tokenizer.from_str(SPECS["byte-level"].to_str())
    spec.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])
    return spec


def made(folder: Path, template: str, *tokens: str) -> Tokenizer:
    return load(write(folder, with_tokens(*tokens), template))


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (
            BLOCKS,
            ToolForm(
                ("<tool_call>\n" + FIELDS[0], *FIELDS[1:], "}\n</tool_call>"),
                separator=("\n",),
                text_may_precede=True,
            ),
        ),
        (
            LIST,
            ToolForm(
                (*FIELDS, ', "id": "', Slot.ID, '"}'),
                begin=("[TOOL_CALLS] [",),
                separator=(", ",),
                end=("]",),
                text_may_precede=True,
            ),
        ),
        (
            SINGLE,
            ToolForm(
                (*FIELDS[:2], '", "parameters": ', Slot.ARGUMENTS, "}"),
                is_compact=False,
                at_most_one=True,
                text_may_precede=True,
            ),
        ),
        (PYTHON, PROMPT_FORM),
        (CHATML, PROMPT_FORM),
    ],
    ids=["blocks", "list", "single", "python", "none"],
)
def test_the_form_is_read_from_what_the_template_writes(
    template: str, form: ToolForm, tmp_path: Path
) -> None:
    assert made(tmp_path, template).tool_form == form


def test_tokens_of_calls_are_control_tokens(tmp_path: Path) -> None:
    tokenizer = made(tmp_path, BLOCKS, "<tool_call>", "</tool_call>")
    form = tokenizer.tool_form
    assert form.trigger_id == form.call[0]
    assert form.call[1:-1] == ("\n" + FIELDS[0], *FIELDS[1:], "}\n")
    chat = [say("user", "<tool_call>"), *answered([ROME], "</tool_call>")[1:]]
    plain = [say("user", "x"), *answered([ROME], "x")[1:]]
    ids, others = tokenizer.chat(chat), tokenizer.chat(plain)
    assert control_ids(tokenizer, ids) == control_ids(tokenizer, others)
    assert ids.count(form.trigger_id) == 1


@pytest.mark.parametrize("template", [BLOCKS, LIST, SINGLE])
def test_a_template_gets_tools_and_calls_as_transformers_gives_them(
    template: str, tmp_path: Path
) -> None:
    tokenizer = made(tmp_path, template)
    text = tokenizer.decode(tokenizer.chat(answered([ROME], "sunny"), tools=TOOLS))
    tools = [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": json.loads(tool.parameters),
            },
        }
        for tool in TOOLS
    ]
    assert json.dumps(tools) in text
    assert "get_weather" in text.split("Please")[1]
    assert text.endswith("tool\nsunny\nassistant\n")


def test_reserved_characters_do_not_hide_in_escapes(tmp_path: Path) -> None:
    tokenizer = made(tmp_path, BLOCKS)
    hidden = json.dumps({"a\U0010ffff": "\U0010ffff\ue000 \U0010ffff\ue001 \U0010ffff\ue002"})
    chat: list[Message] = answered([{**ROME, "arguments": hidden}], "1")
    plain = answered([{**ROME, "arguments": "{}"}], "1")
    found = control_ids(tokenizer, tokenizer.chat(chat))
    assert found == control_ids(tokenizer, tokenizer.chat(plain))


def test_calls_render_to_the_form(tmp_path: Path) -> None:
    tokenizer = made(tmp_path, BLOCKS)
    prompt = tokenizer.chat(asked(ROME, SUM)[:1], tools=TOOLS)
    ids = tokenizer.chat(answered([ROME, SUM], "1", "2"), tools=TOOLS)
    assert ids[: len(prompt)] == prompt
    answer = tokenizer.decode(ids[len(prompt) : ids.index(min(tokenizer.eos_ids), len(prompt))])
    calls = "\n".join(
        f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {call["arguments"]}}}\n</tool_call>'
        for call in (ROME, SUM)
    )
    assert answer == calls
