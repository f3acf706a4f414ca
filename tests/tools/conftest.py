"""Byte tokenizers, with and without tokens for the marks of calls."""

import pytest
from counting import CHAT, byte_tokenizer

from lorauter.engine.text import TextCodec
from lorauter.tools.formats import FORMATS

TOOLED = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}" + CHAT.replace(
    "<end>", "{% for call in m.tool_calls %}[{{ call.function | tojson }}]{% endfor %}<end>"
)


@pytest.fixture
def codec_of():
    def make(name, *, tokens, template=TOOLED):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
        if tokens:
            tokenizer.add_tokens(list(FORMATS[name].marks), special_tokens=True)
        return TextCodec(tokenizer, tool_format=name)

    return make
