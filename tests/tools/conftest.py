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
            tokenizer.add_special_tokens(
                {"additional_special_tokens": [*tokenizer.additional_special_tokens, *FORMATS[name].marks]}
                if hasattr(tokenizer, "additional_special_tokens")
                else {"extra_special_tokens": [*FORMATS[name].marks]}
            )
        return TextCodec(tokenizer, tool_format=name)

    return make
