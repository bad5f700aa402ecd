"""DeepSpeed is imported once, before ranks are forked: it takes seconds."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def loaded():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        from camshaft_deepspeed.runtime import load

        load()
