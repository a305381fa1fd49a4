"""The one exception class of this package."""


class Refused(ValueError):
    """
    A mistake of the user's, or a limit that they must know of: what is wrong, with the value, and what to do.

    The commands print it in one line and exit with 1; any other exception shows its traceback.
    """
