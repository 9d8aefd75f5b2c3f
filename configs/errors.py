"""The one error type that is the user's to mend."""


class UserError(ValueError):
    """The input or the configuration is wrong. Its text is one sentence: field, value, remedy. Exit code 2."""
