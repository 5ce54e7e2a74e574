"""Numbers as they are read."""


def in_bytes(value: float) -> str:
    """A number of bytes: 12.29 KB."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    raise AssertionError


def in_millions(value: float) -> str:
    """A large number: 134.52 M."""
    return f"{value / 1e6:,.2f} M"
