"""The task grammar."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfsvc.errors import InvalidTask
from lfsvc.task import Command, make_absolute, parse, split

FOLDER = st.text(st.characters(codec="utf-8", exclude_characters="\0\n\r/"), min_size=1, max_size=12)
FOLDERS = st.lists(FOLDER, max_size=3).map(lambda parts: "/" + "/".join(parts) + ("/" if parts else ""))
NAME = st.text(st.characters(codec="ascii", categories=("Ll", "Lu", "Nd")), min_size=1, max_size=10)
DEVICES = st.lists(st.integers(0, 4095), unique=True, max_size=8).map(tuple)


@given(FOLDERS, NAME, st.sampled_from(["", "train:", "eval:"]), DEVICES, st.booleans())
def test_every_task_that_follows_the_grammar_is_read_as_it_was_written(
    folder: str, name: str, prefix: str, devices: tuple[int, ...], no_eval: bool
) -> None:
    suffix = ("@" + ",".join(map(str, devices)) if devices else "") + ("#no_eval" if no_eval else "")
    task = parse(f"{prefix}{folder}{name}.yaml{suffix}")
    assert task.path == f"{folder}{name}.yaml"
    assert task.devices == devices
    assert task.command is (Command.EVAL if prefix == "eval:" else Command.TRAIN)
    assert task.evaluate is (task.command is Command.TRAIN and not no_eval)
    assert bool(task.warnings) is (no_eval and prefix == "eval:")
    again = parse(task.text)
    assert again._replace(warnings=()) == task._replace(warnings=())


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_with_a_sentence(text: str) -> None:
    assert "".join(split(text)) == text
    try:
        parse(text)
    except InvalidTask as error:
        assert str(error).endswith(".")
        assert "\n" not in error.hint


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "The task is empty."),
        ("   ", "The task is empty."),
        ("/a/x.txt", "/a/x.txt is neither a .yaml nor a .sh file."),
        ("/a/x", "/a/x is neither a .yaml nor a .sh file."),
        ("/a/x.YAML", "/a/x.YAML is neither a .yaml nor a .sh file."),
        ("/a/x.yml", "/a/x.yml ends in .yml; LLaMA-Factory takes .yaml only."),
        ("/a/x.yml@0", "/a/x.yml ends in .yml; LLaMA-Factory takes .yaml only."),
        ("x.yaml", "The path 'x.yaml' is not absolute."),
        ("train:x.sh", "The path 'x.sh' is not absolute."),
        ("train:/a/x.sh", "train: does not go with a .sh file."),
        ("eval:/a/x.sh", "eval: does not go with a .sh file."),
        ("/a/x.sh@0", "@devices does not go with a .sh file."),
        ("/a/x.sh#no_eval", "#no_eval does not go with a .sh file."),
        ("merge:/a/x.yaml", "The prefix merge: is unknown."),
        ("/a/x.yaml@", "No device follows the @."),
        ("/a/x.yaml@0,,1", "A device is empty in @0,,1."),
        ("/a/x.yaml@0,1,", "A device is empty in @0,1,."),
        ("/a/x.yaml@0,0", "Device 0 is repeated in @0,0."),
        ("/a/x.yaml@00,0", "Device 0 is repeated in @00,0."),
        ("/a/x.yaml@a", "'a' in @a is not a device number."),
        ("/a/x.yaml@-1", "'-1' in @-1 is not a device number."),
        ("/a/x.yaml@ 1", "' 1' in @ 1 is not a device number."),
        ("/a/x.yaml@\u0661", "'\u0661' in @\u0661 is not a device number."),
        ("/a/x.yaml@4096", "Device 4096 in @4096 is over 4095."),
        ("/a/x.yaml@" + "9" * 40, f"Device {'9' * 40} in @{'9' * 40} is over 4095."),
        ("/a/x.yaml#eval", "The flag #eval is unknown."),
        ("/a/x.yaml#", "The flag # is unknown."),
        ("/a/x.yaml#no_eval#no_eval", "The flag #no_eval#no_eval is unknown."),
        ("/a/x.yaml#no_eval@0", "In '#no_eval@0' the flag comes before the devices."),
        ("/a/x.yamlx", "After .yaml comes 'x', which is neither @devices nor #no_eval."),
        ("/a\0/x.yaml", "The task contains a line break or a NUL character, which no file name here may have."),
        ("/a\n/x.yaml", "The task contains a line break or a NUL character, which no file name here may have."),
        ("/" + "a" * 9000 + ".yaml", "The task is longer than 8192 bytes."),
        ("train:", "The task 'train:' names no file."),
    ],
)
def test_each_form_that_is_refused_has_a_sentence_of_its_own(text: str, sentence: str) -> None:
    with pytest.raises(InvalidTask) as caught:
        parse(text)
    assert str(caught.value) == sentence


def test_suffixes_are_read_from_the_right() -> None:
    task = parse("/a@0#no_eval/b.yaml@1/c@2.yaml@3#no_eval")
    assert (task.path, task.devices, task.evaluate) == ("/a@0#no_eval/b.yaml@1/c@2.yaml", (3,), False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x.yaml@0", "/w/x.yaml@0"),
        ("train:./x.yaml", "train:/w/x.yaml"),
        ("eval:/a/x.yaml#no_eval", "eval:/a/x.yaml#no_eval"),
        ("../x.sh", "/w/../x.sh"),
    ],
)
def test_the_command_line_makes_paths_absolute(text: str, expected: str) -> None:
    assert make_absolute(text, "/w") == expected
