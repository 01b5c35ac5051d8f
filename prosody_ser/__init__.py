"""Emotion, transcript and word prominence from one shared speech backbone."""
import sys
from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

_API = {  # name -> its room; loaded when it is asked for, so that the import itself costs nothing
    "demo_corpus": "corpus", "read_manifest": "data", "audit": "audit", "train": "train",
    "Predictor": "inference", "Run": "run", "runs": "ablation",
}
__all__ = list(_API)


def callable_module(function):
    """Lets a module be called like its function of the same name.

    `ps.train(...)` and `ps.train.run_training` both work."""
    from inspect import signature
    module = sys.modules[function.__module__]
    module.__class__ = type("CallableModule", (ModuleType,), {"__call__": staticmethod(function)})
    module.__signature__ = signature(function)


def __getattr__(name):
    """One of the names above."""
    if name not in _API:
        raise AttributeError(f"module 'prosody_ser' has no attribute {name!r}; it offers {', '.join(_API)}.")
    room = import_module(f"prosody_ser.{_API[name]}")
    globals()[name] = value = room if name == _API[name] else getattr(room, name)
    return value


def __dir__():
    return sorted([*globals(), *_API])
