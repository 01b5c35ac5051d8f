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
_ROOMS = _API | {"ProsodySERConfig": "model"}


class _Registration:
    """transformers' Auto classes know a saved model by its type once this package is imported, before them or
    after: a name goes into their table when that is made, and what it stands for is loaded when it is used."""
    table = "transformers.models.auto.configuration_auto"

    def find_spec(self, name, path=None, target=None):
        """Asked by the import system; the table's own loader, which then adds the name."""
        if name != self.table: return None
        from importlib.util import find_spec
        sys.meta_path.remove(self)
        spec = find_spec(name)
        fill = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (fill(module), self.register(module))
        return spec

    def register(self, module):
        """Add the name; versions without such a table learn of the model from `import prosody_ser.model`."""
        configs = getattr(module, "CONFIG_MAPPING", None)
        if hasattr(configs, "_modules") and hasattr(configs, "_mapping"):
            configs._modules["prosody_ser"] = sys.modules[__name__]
            configs._mapping["prosody_ser"] = "ProsodySERConfig"


if _Registration.table in sys.modules:
    _Registration().register(sys.modules[_Registration.table])
else:
    sys.meta_path.insert(0, _Registration())


def callable_module(function):
    """Lets a module be called like its function of the same name.

    `ps.train(...)` and `ps.train.run_training` both work."""
    from inspect import signature
    module = sys.modules[function.__module__]
    module.__class__ = type("CallableModule", (ModuleType,), {"__call__": staticmethod(function)})
    module.__signature__ = signature(function)


def __getattr__(name):
    """One of the names above."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'prosody_ser' has no attribute {name!r}; it offers {', '.join(_API)}.")
    try:
        room = import_module(f"prosody_ser.{_ROOMS[name]}")
    except ImportError as e:
        from .folder import import_fault
        raise ImportError(f"prosody_ser.{name}: {import_fault(e)}", name=e.name) from e
    globals()[name] = value = room if name == _ROOMS[name] else getattr(room, name)
    return value


def __dir__():
    return sorted([*globals(), *_API])
