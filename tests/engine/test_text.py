import pytest
from tokenizers import Tokenizer, decoders, models

from lorauter.engine.text import TextCodec, TextStream
from lorauter.errors import InvalidRequest

ODD = "naïve 上海 🦙🏽 x"


def pushed(stream, tokens):
    """The pieces given out for each token, and whether and where a stop string ended it."""
    pieces = []
    for token in tokens:
        text, stopped = stream.push(token)
        pieces.append(text)
        if stopped:
            return pieces, True
    return pieces, False


@pytest.mark.parametrize(
    ("text", "stop", "before", "stopped"),
    [
        ("plain text", (), "plain text", False),
        (ODD, (), ODD, False),
        ("one STOP two", ("STOP",), "one ", True),
        ("one STO two", ("STOP",), "one STO two", False),
        ("one STO", ("STOP",), "one STO", False),
        ("SSTOP", ("STOP",), "S", True),
        ("STOP", ("STOP",), "", True),
        ("abcdef", ("xyz", "de", "cdef"), "abc", True),  # "de" is whole first
        ("abcdef", ("de", "cde"), "ab", True),
        ("a\n\nb", ("\n\n", "."), "a", True),
        (ODD, ("海 🦙",), "naïve 上", True),
        (ODD, ("🦙🏾",), ODD, False),
    ],
)
def test_text_and_stop_strings_over_token_borders(codec, text, stop, before, stopped):
    stream = codec.stream(stop)
    pieces, ended = pushed(stream, text.encode())  # a token is a byte
    assert ended == stopped
    assert "".join(pieces) + stream.flush() == before
    assert stream.flush() == ""
    assert "\ufffd" not in "".join(pieces)


def test_text_comes_as_soon_as_it_is_certain(codec):
    assert pushed(codec.stream(), "aé".encode()) == (["a", "", "é"], False)
    assert pushed(codec.stream(("é!",)), "aéb".encode()) == (["", "", "a", "é"], False)
    assert pushed(codec.stream(("abc",)), b"xab-") == (["", "", "x", "a"], False)


def test_special_and_unknown_tokens_have_no_text(codec):
    stream = codec.stream(("b",))
    assert pushed(stream, [ord("a"), 257, 5000, ord("c"), 256]) == (["a", "", "", "c", ""], False)


def test_bytes_that_are_no_text_do_not_hold_up_what_follows(codec):
    pieces, _ = pushed(codec.stream(), b"a\xff\xe4b")
    assert "".join(pieces) == "a\ufffd\ufffdb"


def test_byte_fallback_that_takes_text_back():
    """A stray byte makes such a decoder change its mind about the characters before it."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256, "<unk>": 257}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    pieces, _ = pushed(TextStream(backend, ()), [*"上".encode(), 0xFF, 256, 256, *"上".encode()])
    assert pieces[2] == "上"
    assert "".join(pieces).endswith("aa上")


def test_a_chat_ends_where_the_answer_begins(codec):
    ids = codec.chat([{"role": "user", "content": "hé"}])
    assert ids == (258, *"user:hé".encode(), 257, 258, *b"assistant:")
    assert codec.plain("hé") == tuple("hé".encode())


@pytest.mark.parametrize(
    ("template", "needle"), [(None, "no chat template"), ("{{ raise_exception('user first') }}", "user first")]
)
def test_a_chat_that_cannot_be_had_is_the_callers_error(tokenizer, monkeypatch, template, needle):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(InvalidRequest, match=needle) as caught:
        TextCodec(tokenizer).chat([{"role": "user", "content": "x"}])
    assert caught.value.param == "messages"


def test_eos_is_the_tokenizers_and_the_models(tokenizer):
    assert TextCodec(tokenizer, eos_ids=[257]).eos_ids == {256, 257}
