"""Strict reading of JSON configuration files: what two readers could understand differently is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from rewriter.errors import RewriteError
from rewriter.formats.files import open_regular, unchanged

LIMIT_BYTES = 64 * 1024 * 1024


def read_json(path: Path, *, limit_bytes: int = LIMIT_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Raises `RewriteError` for a file over `limit_bytes`, bad UTF-8, a byte order mark, syntax errors, NaN and Infinity,
    duplicate keys, nesting beyond reason, and for anything that is not an object.
    """
    with unchanged(path) as before, open_regular(path) as file:
        if before.st_size > limit_bytes:
            raise RewriteError(
                f"{path} is too large to be a configuration file",
                evidence=[f"{before.st_size} bytes, the limit is {limit_bytes}"],
                fix="Check that this is the right file.",
            )
        data = file.read(limit_bytes + 1)
    return parse_object(data, str(path))


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`, as strictly as `read_json`; `where` names it in errors."""
    fix = "Correct it, or download it again."
    if not data.strip():
        raise RewriteError(f"{where} is empty, JSON was expected", fix=fix)
    if data.startswith(b"\xef\xbb\xbf"):
        raise RewriteError(f"{where} starts with a byte order mark", fix="Save it as UTF-8 without one.")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RewriteError(f"{where} is not UTF-8 text", evidence=[str(error)], fix=fix) from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise RewriteError(f"{where} is not valid JSON", evidence=[line], fix=fix) from None
    except _NotStrictError as error:
        raise RewriteError(f"{where} is not valid JSON", evidence=[str(error)], fix=fix) from None
    except RecursionError:
        raise RewriteError(f"{where} is nested too deeply", fix=fix) from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise RewriteError(f"{where} is not valid JSON", evidence=[str(error)], fix=fix) from None
    if not isinstance(value, dict):
        kind = "a list" if isinstance(value, list) else "a single value"
        raise RewriteError(f"{where} holds {kind}, an object {{...}} was expected", fix=fix)
    return value


class _NotStrictError(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _NotStrictError(f"the key {key!r} appears twice")
            seen.add(key)
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise _NotStrictError(f"{name} is not a JSON number")
