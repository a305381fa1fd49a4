"""Bytes, counts and seconds as they are read: three digits, in the largest unit of which there is at least one."""


def _words(value: float, units: dict[str, float]) -> str:
    name, unit = next((found for found in units.items() if value >= found[1]), [*units.items()][-1])
    n = value / unit
    return (f"{n:,.0f}" if n >= 100 else f"{n:.3g}") + name


def size_words(n_bytes: float) -> str:
    return _words(n_bytes, {" GiB": 2**30, " MiB": 2**20, " KiB": 2**10, " B": 1})


def count_words(n: float) -> str:
    """Of tokens or parameters."""
    return _words(n, {"B": 1e9, "M": 1e6, "k": 1e3, "": 1})


def time_words(seconds: float) -> str:
    return _words(seconds, {" h": 3600, " min": 60, " s": 1})
