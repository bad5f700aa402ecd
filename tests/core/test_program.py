"""Programs: the default one, and the faults that are refused."""

import pytest

from camshaft.errors import PluginError
from camshaft.program import Action, Kind, accumulate, brief, check


def test_accumulation_is_the_one_stage_schedule():
    assert " ".join(map(str, accumulate(2))) == "F0 B0 F1 B1 REDUCE CLIP STEP"
    assert check(accumulate(5), 5, "core") == accumulate(5)


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
    ],
)
def test_faulty_programs_are_refused_by_owner(mutate, words):
    with pytest.raises(PluginError, match=words) as caught:
        check(mutate(accumulate(3)), 3, "mine")
    assert caught.value.plugin == "mine"


def test_a_long_program_is_shown_with_its_middle_left_out():
    assert "... 183 more ..." in brief(accumulate(100))
    assert brief(accumulate(1)) == "F0 B0 REDUCE CLIP STEP"
