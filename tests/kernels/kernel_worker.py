"""What a process for kernels runs. A module of its own: started processes find it by its name, which no other has."""

import importlib.util
import sys
import traceback
from pathlib import Path

FOLDER = Path(__file__).parent


def serve(end):
    """Take a module's path, a function's name and its arguments, and answer with a traceback or None; without end."""
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(FOLDER))
    while True:
        path, name, arguments = end.recv()
        try:
            getattr(module_of(path), name)(**arguments)
            answer = None
        except BaseException:
            answer = traceback.format_exc()
        end.send(answer)


def module_of(path):
    name = Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
