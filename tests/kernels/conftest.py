"""Tests of Triton kernels run in processes of their own, because ``TRITON_INTERPRET`` counts when triton is imported.

A test module says with ``TRITON`` which kind: "interpreted" (on a GPU, where there is one: in this process, compiled)
or "compiled". Nothing changes in pytest's own process, whatever it imported before and in whatever order tests run.
"""

import importlib.util
import multiprocessing
import os

import pytest
from kernel_worker import serve

VARIABLE = "TRITON_INTERPRET"
_workers = {}


class Worker:
    """A process that imports test modules and calls their functions, one after another."""

    def __init__(self, kind):
        context = multiprocessing.get_context("spawn")
        self.end, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other,), daemon=True)
        before = os.environ.pop(VARIABLE, None)
        if kind == "interpreted":
            os.environ[VARIABLE] = "1"
        try:
            self.process.start()
        finally:
            os.environ.pop(VARIABLE, None)
            if before is not None:
                os.environ[VARIABLE] = before
        other.close()

    def call(self, path, name, arguments):
        """The traceback of what the function raised, or None."""
        self.end.send((path, name, arguments))
        return self.end.recv()

    def stop(self):
        self.process.kill()
        self.process.join()
        self.end.close()


def kind_of(module):
    import torch

    kind = getattr(module, "TRITON", None)
    return None if kind == "interpreted" and torch.cuda.is_available() else kind


def pytest_collection_finish():
    """On a GPU kernels are compiled here: the variable that importing them sets must be there before any test."""
    import torch

    if torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
        importlib.import_module("camshaft_kernels.triton.launch")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    kind = kind_of(pyfuncitem.module)
    if kind is None:
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    worker = _workers.pop(kind, None) or Worker(kind)
    try:
        failure = worker.call(str(pyfuncitem.path), pyfuncitem.originalname, arguments)
    except EOFError:
        worker.stop()
        pytest.fail(f"the process for {kind} kernels died, as it does of an address that is not its own", pytrace=False)
    except BaseException:  # a time-out or an interrupt: what it would answer next is not ours
        worker.stop()
        raise
    _workers[kind] = worker
    if failure is not None:
        pytest.fail(f"in the process for {kind} kernels:\n{failure}", pytrace=False)
    return True


def pytest_sessionfinish():
    while _workers:
        _workers.popitem()[1].stop()
