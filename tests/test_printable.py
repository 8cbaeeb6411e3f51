import pytest

from beit.printable import printable, printable_lines


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("photos/Käse 犬 🐕.jpg", "photos/Käse 犬 🐕.jpg"),
        ("a\nbeit: all is well", r"a\nbeit: all is well"),
        ("\x1b]0;title\x07\x9b31m", r"\x1b]0;title\x07\x9b31m"),
        ("a\r\tb\0\x7f", r"a\r\tb\x00\x7f"),
        ("gpj.\u202etac\u2066", r"gpj.\u202etac\u2066"),
        ("caf\udce9.jpg", r"caf\udce9.jpg"),
        ("x\u2028y\x85", r"x\u2028y\x85"),
    ],
)
def test_what_would_act_is_shown(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown
    shown.encode()


def test_long_text_is_cut_in_its_middle():
    assert printable("a" * 600 + "b" * 600, limit=8) == "aaaa...(1,192 characters)...bbbb"
    assert printable("abcdefgh", limit=8) == "abcdefgh"


def test_lines_stay_lines():
    assert printable_lines("one\n\x1btwo\n") == "one\n\\x1btwo\n"
