"""The error that is the user's to mend, and what this package makes of the operating system's."""

from __future__ import annotations

import errno

__all__ = ["UserError", "user_sentence"]

#: What a folder or a disk that the user chose can answer. A file that is missing is a defect of this package, unless it
#: says so itself.
_OF_THE_PLACE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ENOTDIR,
    errno.EISDIR, errno.EEXIST, errno.ELOOP,
}  # fmt: skip


class UserError(ValueError):
    """Something the user asked for that cannot be done; the message, all that a command shows, says what can be.

    Libraries raise `ValueError` too, where a traceback is what helps; hence a type of this package's own.
    """


def user_sentence(error: BaseException) -> str | None:
    """Return the sentence that a command shows instead of a traceback.

    Args:
        error: what ended the command.

    Returns:
        The sentence; None for an error whose place the traceback has to show.

    Examples:
        >>> user_sentence(UserError("num_envs must be positive, got 0."))
        'num_envs must be positive, got 0.'
        >>> user_sentence(PermissionError(13, "Permission denied", "/results"))
        '/results: Permission denied. Choose another place, or make room or rights there.'
        >>> user_sentence(ValueError("math domain error")) is None
        True
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _OF_THE_PLACE:
        # A write that fails does not know the file's name.
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror}. Choose another place, or make room or rights there."
    return None
