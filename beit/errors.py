"""The one exception that means: the user asked for something that cannot be done."""


class UserError(ValueError):
    """A mistake in the input: one line with the value, what was expected and the mend.

    The command line prints the message without a traceback and exits with code 2. Anything else
    that is raised is a fault of the program and keeps its traceback.
    """
