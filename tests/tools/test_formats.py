"""A chat template tells which family's format it teaches."""

import pytest

from lorauter.tools.formats import FORMATS, found_in, knows_tools

QWEN = '{% if tools %}<tools>{{ tools }}</tools>\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": ...}'
QWEN_CODER = "{% if tools %}<tool_call>\n<function=example>\n<parameter=a>"
GLM = "{% for tool in tools %}<tool_call>{function-name}\n<arg_key>"
LLAMA = (
    '{%- if tools is not none %}Respond in the format {"name": function name, "parameters": dictionary of argument '
    "name and its value}.{% endif %}<|start_header_id|>ipython<|end_header_id|>"
)
MISTRAL = '{%- if tools %}[AVAILABLE_TOOLS] [{{ tools }}][/AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS] [{"name": '
PLAIN = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (QWEN, "hermes"),
        (LLAMA, "llama"),
        (MISTRAL, "mistral"),
        (MISTRAL + "[ARGS]", "mistral-args"),
        (QWEN_CODER, None),
        (GLM, None),
        ("{{ tools }}", None),
    ],
)
def test_families_are_told_apart(template, name):
    assert knows_tools(template)
    assert found_in(template) is (None if name is None else FORMATS[name])


def test_a_template_that_knows_none():
    assert not knows_tools(PLAIN)
    assert not knows_tools("")
