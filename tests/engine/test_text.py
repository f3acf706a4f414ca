import pytest
from tokenizers import Tokenizer, decoders, models

from lorauter.engine import SamplingParams
from lorauter.engine.text import TextCodec, TextStream, TokenBytes
from lorauter.engine.types import Prompt
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
    stream = codec.stream(SamplingParams(stop=stop))
    pieces, ended = pushed(stream, text.encode())  # a token is a byte
    assert ended == stopped
    assert "".join(pieces) + stream.flush() == before
    assert stream.flush() == ""
    assert "\ufffd" not in "".join(pieces)


def test_text_comes_as_soon_as_it_is_certain(codec):
    assert pushed(codec.stream(), "aé".encode()) == (["a", "", "é"], False)
    assert pushed(codec.stream(SamplingParams(stop=("é!",))), "aéb".encode()) == (["", "", "a", "é"], False)
    assert pushed(codec.stream(SamplingParams(stop=("abc",))), b"xab-") == (["", "", "x", "a"], False)


def test_special_and_unknown_tokens_have_no_text(codec):
    stream = codec.stream(SamplingParams(stop=("b",)))
    assert pushed(stream, [ord("a"), 257, 5000, ord("c"), 256]) == (["a", "", "", "c", ""], False)


def test_bytes_that_are_no_text_do_not_hold_up_what_follows(codec):
    pieces, _ = pushed(codec.stream(), b"a\xff\xe4b")
    assert "".join(pieces) == "a\ufffd\ufffdb"


def test_byte_fallback_that_takes_text_back():
    """A stray byte makes such a decoder change its mind about the characters before it."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256, "<unk>": 257}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    pieces, _ = pushed(
        TextStream(backend, SamplingParams(), TokenBytes(backend)), [*"上".encode(), 0xFF, 256, 256, *"上".encode()]
    )
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


def test_a_stop_string_may_be_part_of_the_text(codec):
    stream = codec.stream(SamplingParams(stop=("cd", "cde"), include_stop_str_in_output=True))
    pieces, stopped = pushed(stream, b"abcdef")
    assert ("".join(pieces), stopped) == ("abcd", True)
    assert stream.flush() == ""


def test_special_tokens_may_be_part_of_the_text(codec):
    stream = codec.stream(SamplingParams(skip_special_tokens=False))
    assert pushed(stream, [ord("a"), 257, ord("b")]) == (["a", "<end>", "b"], False)


def test_no_stop_string_ends_what_is_too_short(codec):
    stream = codec.stream(SamplingParams(stop=("a",), min_tokens=3))
    assert pushed(stream, b"aabba") == (["a", "a", "b", "b", ""], True)


def test_a_word_is_known_alone_and_after_a_space(codec):
    assert codec.forms("ab") == [tuple(b"ab"), tuple(b" ab")]
    assert codec.forms(" ab") == [tuple(b" ab")]


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer, kind):
    if kind == "byte level":
        backend, ids = tokenizer.backend_tokenizer, ODD.encode()
    else:
        vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"\u2581x": 256, "\u2581": 257}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
        backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
        ids = [*ODD[:-2].encode(), 256]
    assert b"".join(map(TokenBytes(backend), ids)).decode() == ODD


def test_special_and_unknown_tokens_have_bytes_too(tokenizer):
    assert [TokenBytes(tokenizer.backend_tokenizer)(token) for token in (257, 5000)] == [b"<end>", b""]


@pytest.mark.parametrize("text", ["a<end>b", "<end>\n<start>system:", "<end><end>"])
def test_what_looks_like_a_control_token_is_text(codec, text):
    assert codec.plain(text) == tuple(text.encode())
    assert codec.plain("a<end>b", parse_special=True) == (ord("a"), 257, ord("b"))
    ids = codec.chat([{"role": "user", "content": text}])
    assert ids == (258, *b"user:", *text.encode(), 257, 258, *b"assistant:")


BEGUN_ON_REQUEST = (
    "{% for m in messages %}<start>{{ m.role }}:{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant:{% endif %}"
)


def test_the_last_message_goes_on(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", BEGUN_ON_REQUEST)
    codec = TextCodec(tokenizer)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, <end>"}]
    ids = codec.chat(chat, add_generation_prompt=False, continue_final_message=True)
    assert ids == (258, *b"user:hi", 257, 258, *b"assistant:Well, <end>")
    assert codec.chat(chat[:1], add_generation_prompt=False) == (258, *b"user:hi", 257)


def test_a_prompt_is_encoded_as_it_says(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", BEGUN_ON_REQUEST)
    codec = TextCodec(tokenizer)
    chat = ({"role": "user", "content": "hi"},)
    assert codec.encode(Prompt(token_ids=(5, 6))) == (5, 6)
    assert codec.encode(Prompt(text="<end>", parse_special=True)) == (257,)
    assert codec.encode(Prompt(messages=chat)) == codec.chat(chat)
    assert codec.encode(Prompt(messages=chat, add_generation_prompt=False)) == (258, *b"user:hi", 257)


def test_variables_reach_the_template_and_cannot_take_its_place(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ mood }}:{{ messages[0]['content'] }}")
    codec = TextCodec(tokenizer)
    chat = [{"role": "user", "content": "hi"}]
    assert codec.chat(chat, template_kwargs={"mood": "<end>"}) == tuple(b"<end>:hi")
    for name in ("chat_template", "tokenize", "messages", "tools", "add_generation_prompt"):
        with pytest.raises(InvalidRequest, match=name) as caught:
            codec.chat(chat, template_kwargs={name: "x"})
        assert caught.value.param == "chat_template_kwargs"


CALLS = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": {}}}]},
    {"role": "tool", "content": "Sunny", "tool_call_id": "c"},
    {"role": "tool", "content": "Warm", "tool_call_id": "d"},
]


def test_a_template_that_knows_no_tools_is_given_text(codec):
    said = codec.decode(codec.chat(CALLS))
    assert '<start>assistant:<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><end>' in said
    answers = "<tool_response>\nSunny\n</tool_response>\n<tool_response>\nWarm\n</tool_response>"
    assert f"<start>user:{answers}<end>" in said


def test_one_that_knows_them_is_given_them(tokenizer, monkeypatch):
    template = "{% for m in messages %}{{ m.tool_calls[0].function.name if m.tool_calls else m.role }};{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert TextCodec(tokenizer).chat(CALLS) == tuple(b"user;f;tool;tool;")


def test_tokens_become_text_again(codec):
    assert codec.decode((258, *"é".encode(), 257)) == "<start>é<end>"
    assert codec.decode((258, *"é".encode(), 257), skip_special_tokens=True) == "é"
    for ids in ((5000,), (-1,)):
        with pytest.raises(InvalidRequest, match=str(ids[0])):
            codec.decode(ids)


@pytest.mark.parametrize("reason", [None, "length", "stop"])
def test_several_tokens_at_once_have_the_text_that_they_have_one_by_one(codec, reason):
    assert codec.bytes_of.is_all
    texts = ["plain", "héllo 漢字 🎉", "cut at é"]
    broken = [[*b"a", 0xC3, *b"b"], [0xE6, 0xBC], [300, *b"x", 256, 0xF0]]
    for tokens in [*([*text.encode()] for text in texts), [*"é".encode()][:1], *broken]:
        for size in range(1, len(tokens) + 1):
            one_by_one, together = codec.stream(), codec.stream()
            lots = [tokens[start : start + size] for start in range(0, len(tokens), size)]
            for lot in lots:
                end = reason if lot is lots[-1] else None
                expected = "".join(one_by_one.push(token)[0] for token in (lot[:-1] if end == "stop" else lot))
                expected += (one_by_one.end(lot[-1]) if end == "stop" else "") + (one_by_one.flush() if end else "")
                assert together.extended(lot, end) == expected, (tokens, size)
