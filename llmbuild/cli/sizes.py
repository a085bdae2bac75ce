"""Sizes as people write them."""

from __future__ import annotations

from llmbuild.errors import InputError

UNITS = {"": 1, "B": 1, "K": 10**3, "KB": 10**3, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9, "T": 10**12}


def size_of(option: str, text: str) -> int:
    """Return the bytes of a size such as `500M` or `2GB`.

    Raises:
        InputError: not a size.
    """
    number = text.rstrip("BKMGTbkmgt")
    unit = text[len(number) :].upper()
    try:
        value = float(number)
        if not 0 <= value < 1e15:
            raise ValueError
        return int(value * UNITS[unit])
    except (ValueError, KeyError):
        raise InputError(f"{option} {text!r}: not a size: write 500M or 2GB") from None
