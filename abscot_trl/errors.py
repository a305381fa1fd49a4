"""The one exception class of this package, and where other errors are kept."""

import os
import sys
from itertools import count
from pathlib import Path
from time import strftime


class Refused(ValueError):
    """
    A mistake of the user's, or a limit that they must know of: what is wrong, with the value, and what to do.

    The commands print it in one line and exit with 1; any other exception shows its traceback.
    """


def save_error(beside: str | Path, text: str) -> Path:
    """
    Leave `text`, whole, in `<beside>.error.txt` (`.error2.txt`, .. where there is one); nothing is overwritten.

    Each of several ranks has files of its own. Raises `OSError` where nothing can be written.
    """
    beside = Path(os.path.abspath(beside))
    name = f"{beside.name}.rank{os.environ.get('RANK')}" if os.environ.get("WORLD_SIZE", "1") != "1" else beside.name
    beside.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside.with_name(f".{name}.error.{os.getpid()}")
    try:
        temporary.write_text(f"{strftime('%Y-%m-%d %H:%M:%S')} {' '.join(sys.argv)}\n\n{text}")
        for number in count(1):
            path = beside.with_name(f"{name}.error{number if number > 1 else ''}.txt")
            try:
                os.link(temporary, path)  # unlike a renaming it never replaces a file
                return path
            except FileExistsError:
                continue
    finally:
        temporary.unlink(missing_ok=True)
