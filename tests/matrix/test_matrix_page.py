"""The generated page: it says what was measured, of every combination that there is."""

import pytest
from matrix_cases import Combination, everything, measured, promised
from matrix_page import PAGE, bound_kept, parse, reason, render
from matrix_runs import BOUNDS, refusal

from camshaft.errors import Problem

INVENTED = {
    each: dict.fromkeys(("loss", "norm", "weights"), 2e-15 if each.compute == "fp64" else 3e-4)
    for each in everything()
    if promised(each)
}
REFUSED = {each: (Problem("no", key="plugins.a", fix="b"),) for each in everything() if not promised(each)}


def test_what_is_written_is_what_is_read():
    text = render(INVENTED, REFUSED)
    found = parse(text)
    assert found.keys() == set(everything())
    assert all(found[each] == "plugins.a: no. Fix: b" for each in REFUSED)
    assert all(bound_kept(each, found[each], BOUNDS[each.compute]) for each in INVENTED)


def test_a_number_over_its_bound_and_a_lost_cell_are_seen():
    combination = Combination(
        "ddp", "tp", "1f1b", next(e.numbers for e in INVENTED if str(e).startswith("ddp, tp, 1f1b"))
    )
    text = render({**INVENTED, combination: {"loss": 2e-12}}, REFUSED)
    assert not bound_kept(combination, parse(text)[combination], BOUNDS["fp64"])
    fewer = {each: found for each, found in INVENTED.items() if each != combination}
    assert set(everything()) - parse(render(fewer, REFUSED)).keys() == {combination}


def test_the_page_is_about_this_matrix(make_recipe):
    """Every combination once, each number within its bound, each refusal with today's reason."""
    found = parse(PAGE.read_text(encoding="utf-8"))
    due = {*measured(), *(each for each in everything() if not promised(each))}
    assert due <= found.keys() <= set(everything()), "run CAMSHAFT_FULL_MATRIX=1 python -m pytest tests/matrix"
    for combination, value in found.items():
        if promised(combination):
            assert bound_kept(combination, value, BOUNDS[combination.compute]), combination
        else:
            assert value == "; ".join(map(reason, refusal(make_recipe, combination))), combination


@pytest.mark.parametrize("sign", ["\n", "|"])
def test_a_reason_fits_into_its_line(make_recipe, sign):
    for combination in REFUSED:
        assert all(sign not in reason(problem) for problem in refusal(make_recipe, combination))
