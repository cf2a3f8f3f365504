"""Sizes and durations as text, in units that fit them."""

__all__ = ["duration_text", "size_text"]

_SIZES = ("bytes", "KB", "MB", "GB", "TB")


def size_text(size: float) -> str:
    """Three digits of a number of bytes: ``"512 bytes"``, ``"1.21 MB"``.

    Example:
        >>> size_text(512), size_text(1210), size_text(81_000_000), size_text(999_999)
        ('512 bytes', '1.21 KB', '81.0 MB', '1.00 MB')
    """
    for unit in _SIZES[:-1]:
        if size < 999.5:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{_three_digits(size)} {unit}"
        size /= 1000
    return f"{_three_digits(size)} {_SIZES[-1]}"


def duration_text(seconds: float) -> str:
    """Two or three digits of a duration, in seconds, minutes, hours or days.

    Example:
        >>> duration_text(0.0123), duration_text(59), duration_text(600), duration_text(5400), duration_text(200_000), duration_text(1e6)
        ('0.012 s', '59 s', '10 min', '90 min', '2.3 days', '11.6 days')
    """
    if seconds < 99.5:
        return f"{seconds:.2g} s" if seconds < 0.995 else f"{seconds:.3g} s"
    for most, size, unit in ((99.5, 60, "min"), (48, 3600, "h")):
        if seconds / size < most:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds / 86400:.1f} days"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
