"""Errors that are the user's to mend."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in a config, a file or an argument.

    The message is one line that names the file, key or value and says how to mend it. Entry points print it as
    `error: <message>` and exit with code 2; it never reaches the user as a traceback.
    """
