"""Every error a user can meet, in one tree.

    RaywardError
    ├── UserError (also a ValueError)     something the user can mend; shown as one message, exit code 2
    │   ├── SettingsError                 a setting with a wrong name, type or value
    │   ├── DataError                     a source, dataset or example that is missing or not what it should be
    │   ├── ModelError                    a model or tokenizer that cannot be used as asked
    │   └── RegistryError                 a name, version or alias the registry does not hold
    └── Interrupted                       stopped by the user; says how to continue; exit code 130

A UserError says what is wrong, with the value, and the way out:

    >>> print(SettingsError("objective=bradly_terry is not known", "did you mean bradley_terry?"))
    objective=bradly_terry is not known
      -> did you mean bradley_terry?

All of them survive pickling, since they cross process borders in Ray:

    >>> import pickle
    >>> pickle.loads(pickle.dumps(DataError("a", "b"))).way_out
    'b'
"""

from __future__ import annotations


class RaywardError(Exception):
    """Anything Rayward raises on purpose."""


class UserError(RaywardError, ValueError):
    """Something the user can mend: what is wrong, and the way out."""

    def __init__(self, what: str, way_out: str = ""):
        super().__init__(what, way_out)
        self.what = what
        self.way_out = way_out

    def __str__(self) -> str:
        return f"{self.what}\n  -> {self.way_out}" if self.way_out else self.what


class SettingsError(UserError):
    """A setting with a wrong name, type or value."""


class DataError(UserError):
    """A source, dataset or example that is missing or not what it should be."""


class ModelError(UserError):
    """A model or tokenizer that cannot be used as asked."""


class RegistryError(UserError):
    """A name, version or alias the registry does not hold."""


class Interrupted(RaywardError):
    """Stopped by the user; the message says what is kept and how to continue."""
