"""The one exception for what a user can mend."""


class UserError(Exception):
    """Bad input, told in one sentence: what is wrong, where, and what to do.

    Programs print it as `error: ...` and exit with status 1; anything else that escapes a program
    is a defect of ours and keeps its traceback.
    """
