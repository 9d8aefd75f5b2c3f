"""The one error type that is the user's to mend, and how other errors are told within it."""


class UserError(ValueError):
    """The input or the configuration is wrong. Its text is one sentence: field, value, remedy. Exit code 2."""


def one_line(error: Exception, line: int = 0) -> str:
    """One line of a library's error, the first unless told, to stand in a sentence; its type where it is empty."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[line].strip().rstrip(".")
