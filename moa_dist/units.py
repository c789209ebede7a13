"""Formats numbers and durations for people."""

from __future__ import annotations


def short(number: float) -> str:
    """Format a number with three digits and a suffix: 999, 12.3k, 4.02M, 1.04G, 2.50T."""
    for suffix in ("", "k", "M", "G", "T"):
        # 999.5 would round to four digits.
        if abs(number) < 999.5 or suffix == "T":
            break
        number /= 1000
    if not suffix:
        return f"{number:.0f}"
    decimals = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    return f"{number:.{decimals}f}{suffix}"


def duration(seconds: float) -> str:
    """Format a duration with its two largest units: 12s, 4m12s, 2h05m, 3d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
