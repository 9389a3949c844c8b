"""The one exception for mistakes that a user can mend."""


class UserError(ValueError):
    """A mistake in what the user gave (config, folder, weights, checkpoint).

    The message is one line that names the thing and the remedy. Entry points print it without a
    traceback and exit with a failure status.
    """
