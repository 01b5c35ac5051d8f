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
    """Lets the module of a function be called like the function.

    Once `prosody_ser.train` is imported, `ps.train` is that module, no longer ours; `ps.train(...)` works all the same."""
    kind = type("CallableModule", (ModuleType,), {"__call__": staticmethod(function)})
    sys.modules[function.__module__].__class__ = kind


def __getattr__(name):
    """One of the names above."""
    if name not in _API:
        raise AttributeError(f"module 'prosody_ser' has no attribute {name!r}; it offers {', '.join(_API)}.")
    globals()[name] = value = getattr(import_module(f"prosody_ser.{_API[name]}"), name)
    return value


def __dir__():
    return sorted([*globals(), *_API])
