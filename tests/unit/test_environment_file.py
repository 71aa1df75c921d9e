"""systemd's EnvironmentFile format."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfsvc.environment_file import parse, render

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
VALUES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)


@given(st.dictionaries(NAMES, VALUES), st.text(max_size=20))
def test_what_is_written_reads_back_the_same(variables: dict[str, str], header: str) -> None:
    assert parse(render(variables, "header")) == variables


@given(st.binary(max_size=80))
def test_any_file_can_be_read(data: bytes) -> None:
    parse(data)


# What systemd 252 makes of each was seen with `systemd-run --user -p EnvironmentFile=… env`; the
# integration tests ask it again.
CASES = [
    (b"A=1\n", {"A": "1"}),
    (b"A=1", {"A": "1"}),
    (b"  A = 1  \n", {"A": "1"}),
    (b"# A=1\n; B=2\nC=3\n", {"C": "3"}),
    (b"A='a b'\n", {"A": "a b"}),
    (b'A="a \\"b\\" \\$c \\n"\n', {"A": 'a "b" $c \\n'}),
    (b"A=a\\ b\\\nc\n", {"A": "a bc"}),
    (b'A="two\nlines"\n', {"A": "two\nlines"}),
    (b"A=it's\n", {"A": "it's"}),
    (b"A='x'\"y\"\n", {"A": "xy"}),
    (b"A=\nB=2\n", {"A": "", "B": "2"}),
    (b"no assignment\nB=2\n", {"B": "2"}),
    (b"1A=1\nB-C=2\nD=3\n", {"D": "3"}),
    (b"A=1\nA=2\n", {"A": "2"}),
    (b"export A=1\n", {}),
    (b"A=$HOME\n", {"A": "$HOME"}),
]


@pytest.mark.parametrize(("data", "expected"), CASES)
def test_it_is_read_as_systemd_reads_it(data: bytes, expected: dict[str, str]) -> None:
    assert parse(data) == expected
