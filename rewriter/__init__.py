"""A compiler for parameter-efficient fine-tuning: methods are passes over a traced graph."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewriter.diff import diff as diff
    from rewriter.edit import Edit as Edit
    from rewriter.errors import LawError as LawError
    from rewriter.errors import RewriteError as RewriteError
    from rewriter.errors import UnsafeError as UnsafeError
    from rewriter.errors import UsageError as UsageError
    from rewriter.load import load as load
    from rewriter.program import Program as Program
    from rewriter.report import report as report
    from rewriter.text import text as text
    from rewriter.trace import trace as trace
    from rewriter.transform import apply as apply
    from rewriter.undo import undo as undo

__version__ = "0.1.0"

# name -> module: torch is imported when a name is first used, so that `rewriter --help` stays fast
_HOME = {
    "Edit": "edit",
    "LawError": "errors",
    "Program": "program",
    "RewriteError": "errors",
    "UnsafeError": "errors",
    "UsageError": "errors",
    "apply": "transform",
    "diff": "diff",
    "load": "load",
    "report": "report",
    "text": "text",
    "trace": "trace",
    "undo": "undo",
}
__all__ = [*_HOME, "__version__"]


class _Package(ModuleType):
    """Functions named like the submodule they live in (`rewriter.diff`) win over the submodule."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'rewriter' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"rewriter.{_HOME[name]}"), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
