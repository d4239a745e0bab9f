"""The one exception that a user may see: what is wrong, and what to do about it."""


class UserError(Exception):
    """A mistake or a circumstance that the user can mend; anything else keeps its traceback.

    Args:
        message: what is wrong, one line, naming the key, file, model or path concerned.
        hint: what to do about it, one line; printed below the message.
        exit_code: the process's exit status (docs/exit-codes.md): 2 for a wrong request,
            3 for a run that had to stop.
    """

    def __init__(self, message: str, hint: str = "", exit_code: int = 2) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message
