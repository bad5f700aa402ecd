"""Families of tests that are tried in part: enough of each that every value of every parameter occurs.

``@pytest.mark.broad`` or ``pytestmark = pytest.mark.broad`` on parametrized tests whose cases are long; the complete
families run with CAMSHAFT_FULL_MATRIX=1, and those of the kit with CAMSHAFT_FULL_CONFORMANCE=1 too. A family of which
only some cases were asked for runs those. Classes that share a test are one family, and a value of it each.
"""

import os
from collections import defaultdict

SHARE = 1 / 3
COMPLETE = ("CAMSHAFT_FULL_MATRIX", "CAMSHAFT_FULL_CONFORMANCE")


def pytest_configure(config):
    config.addinivalue_line("markers", "broad(share): of the cases that a family of tests has, some cover each value")


def covering(cases, share):
    """Indices of ``cases``, each a set of values: first each that has the most values not seen yet, then in order.

    At least ``share`` of them, and as many as it takes to see every value.
    """
    unseen, kept = set().union(*cases), []
    left = dict(enumerate(cases))
    while unseen:
        best = max(left, key=lambda index: (len(left[index] & unseen), -index))
        unseen -= left.pop(best)
        kept.append(best)
    wanted = round(share * len(cases)) - len(kept)
    if wanted > 0:
        others = sorted(left)
        kept += [others[place * len(others) // wanted] for place in range(wanted)]
    return sorted(kept)


def pytest_collection_modifyitems(config, items):
    if any(map(os.environ.get, COMPLETE)):
        return
    families = defaultdict(list)
    for item in items:
        if item.get_closest_marker("broad") is not None and hasattr(item, "callspec"):
            families[item.path, item.originalname].append(item)
    out = set()
    for family in families.values():
        marker = family[0].get_closest_marker("broad")
        share = marker.args[0] if marker.args else SHARE
        values = [
            {("", item.cls), *((name, repr(each)) for name, each in item.callspec.params.items())} for item in family
        ]
        kept = covering(values, share)
        out |= set(map(id, family)) - {id(family[index]) for index in kept}
    if out:
        config.hook.pytest_deselected(items=[item for item in items if id(item) in out])
        items[:] = [item for item in items if id(item) not in out]
