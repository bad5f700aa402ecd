"""When the kernels can run, and what is said where they cannot."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is made for Linux alone")


def said(program, **environment):
    """What a fresh process prints, with these variables and no GPU."""
    known = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    known |= {"CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run([sys.executable, "-c", program], env=known, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


ASK = "from camshaft_kernels.triton import available; print(available())"


def test_importing_the_package_imports_neither_torch_nor_triton():
    program = "import camshaft_kernels.triton, sys; print(sorted({'torch', 'triton'} & set(sys.modules)))"
    assert said(program) == "[]"


def test_reason_without_a_gpu():
    assert said(ASK).startswith("there is no CUDA GPU (set TRITON_INTERPRET=1 before")


def test_interpreted():
    assert said(ASK, TRITON_INTERPRET="1") == "None"


def test_reason_where_the_variable_came_too_late():
    late = "import os, triton; os.environ['TRITON_INTERPRET'] = '1'; " + ASK
    assert "was set after triton was imported" in said(late)


def test_reason_where_triton_is_old():
    old = "import triton; triton.__version__ = '3.5.1'; " + ASK
    assert said(old) == "triton 3.5.1 is older than 3.6"


def test_reason_without_triton():
    hidden = "import importlib.util as u, camshaft; u.find_spec = lambda name: None; "
    assert said(hidden + ASK) == "triton is not installed: pip install 'camshaft[kernels]'"


CALLS = (
    "norm.rms_norm(x, x[0], 1e-5)",
    "norm.add_rms_norm(x, x, x[0], 1e-5)",
    "swiglu.swiglu(x, x)",
    "rope.rope(x[None, :, None], x[None, :, None], (x[None, :, None],) * 2, x.dtype)",
    "loss.cross_entropy(x, torch.zeros(3, dtype=torch.int64))",
    "head.linear_cross_entropy(x, x, torch.zeros(3, dtype=torch.int64))",
    "adamw.adamw([x], [x], [x], [x], 1, lr=0.1, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.0)",
)


def test_tensors_of_the_host_are_refused_with_the_reason():
    program = f"""
import torch
from camshaft.errors import MachineError
from camshaft_kernels.triton import adamw, head, loss, norm, rope, swiglu
x = torch.ones(3, 4)
for call in {CALLS}:
    try:
        eval(call)
    except MachineError as error:
        print(error)
"""
    lines = said(program).splitlines()
    assert len(lines) == len(CALLS)
    assert all(line.startswith("a Triton kernel got tensors on cpu, and there is no CUDA GPU (set") for line in lines)
