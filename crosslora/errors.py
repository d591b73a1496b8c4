"""Errors that a user can act on."""


class UserError(Exception):
    """Bad input or a state the user can change: one clear sentence with the way out. The command line exits with 2."""
