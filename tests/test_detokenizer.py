"""Pieces of a stream, joined, are the tokenizer's own text, for every kind of decoder."""

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qjl.errors import QJLError
from qjl.server import detokenizer
from qjl.server.decoders import UNFINISHED, rules_of
from qjl.server.detokenizer import WINDOW, Writer

SPECIAL = "<|special|>"
ADDED = [
    AddedToken(SPECIAL, special=True, normalized=False),
    AddedToken("<think>", special=False, lstrip=True, rstrip=True),
    AddedToken("  indent", special=False),
]
BYTES = [f"<0x{byte:02X}>" for byte in (*"\n a€😀é".encode(), 0xFF, 0xC0, 0x80)]
WORDS = ["a", "b", "ab", " ", "\n", ".", ",", "'s", " n't", "€", UNFINISHED, "é", "END", "<0x", "0>", "{{", "\u2028"]
PIECES = ["", "▁", "▁▁", "▁a", "▁Hello", "a▁b", "lo", *WORDS]
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def tokenizer_of(model, decoder, **settings):
    backend = Tokenizer(model)
    if decoder is not None:
        backend.decoder = decoder
    backend.add_tokens(ADDED)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def word_level(words, decoder):
    return tokenizer_of(WordLevel({word: index for index, word in enumerate(dict.fromkeys(words))}, "a"), decoder)


def byte_level(*more):
    spelled = bytes_to_unicode()
    words = ["".join(spelled[byte] for byte in text.encode()) for text in ("Hello", " world", " a", "é", "😀", "  ")]
    halves = ["".join(spelled[byte] for byte in half) for half in ("😀é".encode()[:3], "😀é".encode()[3:5], b"a\xe2")]
    vocabulary = {word: index for index, word in enumerate([*spelled.values(), *words, *halves, "", "not ▁ a byte"])}
    decoder = decoders.Sequence([decoders.ByteLevel(), *more]) if more else decoders.ByteLevel()
    return tokenizer_of(BPE(vocabulary, []), decoder)


def metaspace(scheme):
    return tokenizer_of(
        Unigram([(piece, -1.0) for piece in dict.fromkeys(["<unk>", *PIECES])], 0),
        decoders.Metaspace(prepend_scheme=scheme, split=scheme != "first"),
    )


LOCAL = {
    "bytes": byte_level,
    "bytes, fused and stripped": lambda: byte_level(decoders.Fuse(), decoders.Strip(" ", 1, 0)),
    "bytes, a character replaced": lambda: byte_level(decoders.Replace("a", "<>")),
    "metaspace, always": lambda: metaspace("always"),
    "metaspace, first": lambda: metaspace("first"),
    "metaspace, never": lambda: metaspace("never"),
    "llama": lambda: word_level([*PIECES, *BYTES], decoders.Sequence(LLAMA)),
    "llama, two spaces": lambda: word_level(
        [*PIECES, *BYTES], decoders.Sequence([*LLAMA[:3], decoders.Strip(" ", 2, 0)])
    ),
    "gemma": lambda: word_level([*PIECES, *BYTES], decoders.Sequence(LLAMA[:3])),
    "gemma, a merge model": lambda: tokenizer_of(
        BPE({word: index for index, word in enumerate(dict.fromkeys([*PIECES, *BYTES]))}, [], byte_fallback=True),
        decoders.Sequence(LLAMA[:3]),
    ),
    "byte fallback and metaspace": lambda: word_level(
        [*PIECES, *BYTES], decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    ),
    "words": lambda: tokenizer_of(
        WordPiece({word: index for index, word in enumerate([*WORDS, "##a", "##.", "##", "#", "[UNK]"])}),
        decoders.WordPiece(),
    ),
    "words, not cleaned": lambda: word_level([*WORDS, "##a", "##."], decoders.WordPiece(cleanup=False)),
    "suffixes": lambda: word_level([*WORDS, "a</w>", "b</w>", "</w>", "a</w>b", "</w></w>"], decoders.BPEDecoder()),
    "suffixes, fused": lambda: word_level(
        ["a@", "@", "a", "b", "a@b"], decoders.Sequence([decoders.BPEDecoder("@"), decoders.Fuse()])
    ),
    "ctc": lambda: word_level([*WORDS, "<pad>", "|"], decoders.CTC()),
    "tokens stripped and replaced": lambda: word_level(
        PIECES[1:],  # tokenizers cannot strip the end of nothing
        decoders.Sequence([decoders.Replace(Regex("▁+"), " "), decoders.Strip("b", 0, 1), decoders.Replace("ab", "X")]),
    ),
    "joined by spaces": lambda: word_level(WORDS, None),
}
WHOLE = {
    "a pattern across tokens": lambda: byte_level(decoders.Replace(Regex(" +"), " ")),
    "a string across tokens": lambda: word_level(
        PIECES, decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "X")])
    ),
    "fused before bytes": lambda: byte_level(decoders.ByteLevel()),
    "bytes from replaced tokens": lambda: word_level(
        [*BYTES, "<0xE2", "a"], decoders.Sequence([decoders.Replace("<0xE2", "<0xE2>"), decoders.ByteFallback()])
    ),
    "suffixes, then replaced": lambda: word_level(
        ["a</w>", "b"], decoders.Sequence([decoders.BPEDecoder(), decoders.Replace("a ", "X")])
    ),
    "written in Python": lambda: custom(word_level(PIECES, None)),
    "decode of its own": lambda: _Shouting(tokenizer_object=LOCAL["gemma"]().backend_tokenizer),
}


def custom(tokenizer):
    tokenizer.backend_tokenizer.decoder = decoders.Decoder.custom(_Backwards())
    return tokenizer


class _Backwards:
    def decode_chain(self, tokens):
        return tokens[::-1]


class _Shouting(PreTrainedTokenizerFast):
    def _decode(self, *arguments, **settings):
        return super()._decode(*arguments, **settings).upper()


ALL = {name: build() for name, build in (LOCAL | WHOLE).items()}


def decoded(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def until(text, stops):
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def write(tokenizer, tokens, stops=()):
    """Pieces of a text, the writer, and how many tokens it was given."""
    writer, found = Writer(tokenizer, stops), []
    for token in tokens:
        found.append(writer.write(token))
        if writer.stopped:
            break
    return [*found, writer.finish()], writer, len(found)


def tokens_of(tokenizer):
    """Single tokens, runs of one token, and ids that the tokenizer does not know."""
    one = st.integers(0, len(tokenizer) + 1)
    run = st.builds(lambda token, count: [token] * count, one, st.integers(1, 3 * WINDOW))
    return st.lists(st.one_of(one.map(lambda token: [token]), run), max_size=30).map(lambda runs: [*chain(*runs)])


@st.composite
def answers(draw, names):
    """A tokenizer's name, tokens, and stop strings, some of which are in the text."""
    name = draw(st.sampled_from(names))
    tokens = draw(tokens_of(ALL[name]))
    text = decoded(ALL[name], tokens)
    places = draw(st.lists(st.tuples(st.integers(0, max(len(text) - 1, 0)), st.integers(0, 6)), max_size=3))
    return (
        name,
        tokens,
        [text[start : start + size] for start, size in places] + draw(st.lists(st.text(max_size=2), max_size=1)),
    )


@given(answers(sorted(ALL)))
@settings(max_examples=400)
def test_pieces_joined_are_the_tokenizers_text(answer):
    name, tokens, stops = answer
    tokenizer = ALL[name]
    pieces, writer, used = write(tokenizer, tokens, stops)
    read, found = decoded(tokenizer, tokens[:used]), [stop for stop in stops if stop]
    assert "".join(pieces) == until(read, found)
    assert writer.stopped is any(stop in read for stop in found)
    assert writer.stopped or used == len(tokens)
    if name in LOCAL:  # no token behind the stop string would have moved it
        assert "".join(pieces) == until(decoded(tokenizer, tokens), found)


def ids(tokenizer, words):
    found = [tokenizer.backend_tokenizer.token_to_id(word) for word in words]
    assert None not in found
    return found


def byte_words(*values):
    return [bytes_to_unicode()[value] for value in values]


GRIN = "😀".encode()
EXAMPLES = [
    ("llama", ["▁Hello", SPECIAL, "▁a"], ["Hello", "", " a", ""]),  # the first token alone loses its space
    ("llama", ["▁", "▁", "▁a"], ["", " ", " a", ""]),
    ("llama", ["a", *[""] * 2 * WINDOW, "▁a"], ["a", *[""] * 2 * WINDOW, " a", ""]),
    ("llama", ["▁a", "<0x0A>", "b"], ["a", "", "\nb", ""]),
    ("llama", ["▁a", "<0x0A>"], ["a", "", "\n"]),
    ("llama", ["a", "<0xE2>", SPECIAL, "<0x82>", "<0xAC>", "b"], ["a", "", "", "", "", "€b", ""]),
    ("llama", ["a", "<0xE2>", "<0x82>", "<0xAC>", "<0xE2>", "b"], ["a", "", "", "", "", UNFINISHED * 4 + "b", ""]),
    ("llama", ["a", *["<0x0A>"] * 3 * WINDOW, "b"], ["a", *[""] * 3 * WINDOW, "\n" * 3 * WINDOW + "b", ""]),
    ("metaspace, always", ["▁Hello", "▁a", "lo"], ["Hello", " a", "lo", ""]),
    ("metaspace, never", ["▁Hello", "▁a"], [" Hello", " a", ""]),
    ("metaspace, always", [SPECIAL, "▁Hello", SPECIAL, "▁a"], ["", "Hello", "", " a", ""]),
    ("bytes", byte_words(*GRIN), ["", "", "", "😀", ""]),
    ("bytes", [*byte_words(*GRIN[:2]), SPECIAL, *byte_words(*GRIN[2:])], ["", "", "", "", "😀", ""]),
    ("bytes", byte_words(*GRIN[:3]), ["", "", "", UNFINISHED]),
    ("bytes", ["a"] * 13 + byte_words(*GRIN), [*["a"] * 13, "", "", "", "😀", ""]),
    ("bytes", byte_words(0x80) * 3, ["", UNFINISHED, UNFINISHED, UNFINISHED]),
    (
        "bytes",
        ["a"] * 7 + byte_words(*GRIN[:3]) + [""] * 6 + byte_words(GRIN[3]),
        ["a"] * 7 + [""] * 9 + ["😀", ""],
    ),
    ("words", ["a", "##a", ".", SPECIAL, "b", "##a"], ["a", "a", ".", "", " b", "a", ""]),
    ("suffixes", ["a</w>", "b", "a</w>"], ["a", " b", "a", ""]),
    ("suffixes", ["a</w>b", "a</w>"], ["", "a ba", ""]),
    ("ctc", ["a", "a", "<pad>", "a", SPECIAL, "a"], ["a", "", "", "a", "", "", ""]),
    ("joined by spaces", ["a", SPECIAL, "b"], ["a", "", " b", ""]),
    ("a string across tokens", ["a", "b"], ["", "", "X"]),
]


@pytest.mark.parametrize(("name", "words", "expected"), EXAMPLES)
def test_text_is_written_when_it_is_certain(name, words, expected):
    pieces, _, _ = write(ALL[name], ids(ALL[name], words))
    assert pieces == expected


def test_which_texts_are_certain_only_at_the_end():
    assert {name for name, tokenizer in ALL.items() if rules_of(tokenizer) is None} == set(WHOLE)
    for last in (decoders.Strip(" ", 0, 1), decoders.Replace(UNFINISHED, "?"), decoders.WordPiece(), decoders.CTC()):
        assert rules_of(byte_level(last)) is None


@pytest.fixture
def decoding(monkeypatch):
    """How many tokens were decoded, call by call."""
    sizes, decode = [], PreTrainedTokenizerFast.decode

    def count(tokenizer, tokens, **settings):
        sizes.append(len(tokens))
        return decode(tokenizer, tokens, **settings)

    monkeypatch.setattr(PreTrainedTokenizerFast, "decode", count)
    return sizes


@pytest.mark.parametrize("name", sorted(LOCAL))
def test_a_token_costs_as_much_in_a_long_text(decoding, name):
    writer, tokens = Writer(ALL[name], ["never"]), ids(ALL[name], ["a", SPECIAL, "a", "b"]) * 100
    for token in tokens:
        writer.write(token)
    assert max(decoding) == 2 * WINDOW
    assert len(decoding) <= len(tokens) * (1 + 1 / WINDOW)


def test_broken_bytes_cost_no_more(decoding):
    writer = Writer(ALL["bytes"])
    pieces = [writer.write(token) for token in ids(ALL["bytes"], byte_words(0x80)) * 200]
    assert max(decoding) == 2 * WINDOW
    assert "".join(pieces) == UNFINISHED * 199


def test_a_text_in_one_piece_is_searched_as_it_grows(decoding):
    tokenizer = ALL["a string across tokens"]
    words = [*["a"] * 100, "b", *["a"] * 900]  # of the tokenizer's text the last a and b are an X
    pieces, writer, used = write(tokenizer, ids(tokenizer, words), ["X"])
    assert (writer.stopped, "".join(pieces)) == (True, "a" * 99)
    assert 101 <= used <= 101 * detokenizer.GROWTH
    assert sum(decoding) < 10 * used


@pytest.mark.parametrize("words", [[*"abcdefg"], ["abc", "def", "g"], ["ab", "cde", "fg"], ["abcdefg"]], ids=str)
@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["cd"], "ab"),
        (["bcde", "cd"], "a"),  # the earlier beginning, though the other one is whole first
        (["bcdX", "cd"], "ab"),
        (["cd", "c"], "ab"),
        (["X", "efg"], "abcd"),
        (["", "abcdefgh"], "abcdefg"),
    ],
)
def test_a_text_ends_where_the_first_stop_string_begins(words, stops, expected):
    tokenizer = word_level(words, decoders.Fuse())
    pieces, _, _ = write(tokenizer, ids(tokenizer, words), stops)
    assert "".join(pieces) == expected


def test_a_tokenizer_that_takes_back_what_it_said_is_told(monkeypatch):
    tokenizer = word_level(["a", "b"], decoders.Fuse())
    writer = Writer(tokenizer)
    assert writer.write(0) == "a"
    monkeypatch.setattr(tokenizer, "decode", lambda tokens, **settings: "no such text")
    with pytest.raises(QJLError, match="decodes a text otherwise than its parts"):
        writer.finish()
