"""Programs: the default one, and the faults that are refused."""

import pytest

from camshaft.errors import PluginError
from camshaft.program import Action, Kind, accumulate, brief, check


def test_accumulation_is_the_one_stage_schedule():
    assert " ".join(map(str, accumulate(2))) == "F0 B0 F1 B1 REDUCE CLIP STEP"
    assert check(accumulate(5), 5, "core") == accumulate(5)


def split(program):
    """The same program in stage 2, with backward in halves: F0@2 I0@2 W0@2 ..."""
    halves = {Kind.F: (Kind.F,), Kind.B: (Kind.I, Kind.W)}
    body = (Action(half, action.microbatch, 2) for action in program[:-3] for half in halves[action.kind])
    return (*body, *program[-3:])


def test_a_stage_with_split_backward_is_a_program():
    assert check(split(accumulate(3)), 3, "core") == split(accumulate(3))
    mixed = (*accumulate(2)[:-3], *split(accumulate(2)))  # two stages on a rank, each in its own way
    assert check(mixed, 2, "core") == mixed


@pytest.mark.parametrize("text", ["F3", "F3@2", "W12@31", "SEND_F0@1", "RECV_B7", "UNSHARD@3", "REDUCE", "STEP"])
def test_what_an_action_writes_can_be_read(text):
    assert str(Action.parse(text)) == text
    assert Action.parse("F3@0") == Action(Kind.F, 3)


@pytest.mark.parametrize("text", ["", "f3", "3F2", "F", "F@1", "F-1", "F3@", "STEP0", "REDUCE@1", "SEND3", "F3 ", "F٣"])
def test_what_is_no_action_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"is no action; write F3 or F3@2"):
        Action.parse(text)


@pytest.mark.parametrize(
    ("mutate", "words"),
    [
        (lambda p: p[1:], "F must run once"),
        (lambda p: (*p[:2], p[1], *p[2:]), "B must run once"),
        (lambda p: (p[1], p[0], *p[2:]), "B0 comes before F0"),
        (lambda p: p[:-1], "ends with REDUCE, CLIP, STEP"),
        (lambda p: (*p[:-2], p[-1], p[-2]), "ends with REDUCE, CLIP, STEP"),
        (lambda p: (*p, Action(Kind.F, 0)), "ends with REDUCE, CLIP, STEP"),
        (lambda p: (p[-3], *p), "ends with REDUCE, CLIP, STEP"),
        (lambda p: p[-3:], "F must run once"),
        (lambda p: split(p)[1:], r"F must run once .*stage 2, got \[1, 2\]"),
        (
            lambda p: (*split(p)[:2], *split(p)[3:]),
            r"I and W must run for the same .*stage 2, got \[0, 1, 2\] and \[1, 2\]",
        ),
        (lambda p: (Action(Kind.B, 0, 2), *split(p)), r"B must run once .*stage 2, got \[0, 0, 1, 2\]"),
        (lambda p: (split(p)[0], split(p)[2], split(p)[1], *split(p)[3:]), "W0@2 comes before I0@2"),
    ],
)
def test_faulty_programs_are_refused_by_owner(mutate, words):
    with pytest.raises(PluginError, match=words) as caught:
        check(mutate(accumulate(3)), 3, "mine")
    assert caught.value.plugin == "mine"


def test_a_long_program_is_shown_with_its_middle_left_out():
    assert "... 183 more ..." in brief(accumulate(100))
    assert brief(accumulate(1)) == "F0 B0 REDUCE CLIP STEP"
