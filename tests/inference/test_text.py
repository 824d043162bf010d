"""Text as it comes: whole characters, and nothing of a stop string."""

import pytest

from tide_mega.inference.text import TextStream


class Bytes:
    """A tokenizer whose ids are bytes; 256 is special."""

    special_ids = frozenset({256})

    def token_bytes(self, token_id):
        return bytes([token_id]) if token_id < 256 else b"<eos>"


def pieces(ids, stops=()):
    stream = TextStream(Bytes(), stops)
    return [*(stream.add(i) for i in ids), stream.end()], stream


def test_a_character_is_written_once_all_its_bytes_are_there():
    found, _ = pieces("aé€😀".encode())
    assert found == ["a", "", "é", "", "", "€", "", "", "", "😀", ""]


def test_bytes_that_make_no_character_are_replaced():
    found, _ = pieces([0xE2, 0x82, 0x41, 0xFF, 0xF0, 0x9F])
    assert "".join(found) == "\N{REPLACEMENT CHARACTER}A\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"


def test_special_tokens_have_no_text():
    assert "".join(pieces([65, 256, 66])[0]) == "AB"


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("one. two", ["."], "one"),
        ("a\n\nb", ["\n\n"], "a"),
        ("a\nb\n\n", ["\n\n"], "a\nb"),
        ("aab", ["aaab"], "aab"),
        ("xaaab", ["aab"], "xa"),
        ("hello", ["lo", "ell"], "h"),
        ("né!", ["é"], "n"),
        ("abc", ["abcd", ""], "abc"),
    ],
)
def test_stop_strings_end_the_text_before_them(text, stops, wanted):
    found, stream = pieces(text.encode(), stops)
    assert "".join(found) == wanted and stream.is_stopped is (wanted != text)
    # Nothing that was written is taken back: each piece is part of the text at once.
    assert all(wanted.startswith("".join(found[:n])) for n in range(len(found)))


def test_text_is_held_back_only_while_it_may_begin_a_stop_string():
    found, _ = pieces(b"ab-c", ["--"])
    assert found == ["a", "b", "", "-c", ""]
