"""Files as the system sees them: how many may be open, and what a refusal means."""

import errno

from stvit_jax.errors import UserError, one_line, reason

MOST_OPEN = 2**16  # some programs walk through all numbers up to the limit that they inherit

_TOO_MANY = "allow more open files (ulimit -n)"
_DISK = "the disk or the connection to it fails, see to that"
_REMEDIES = {
    errno.EACCES: "give this user the right to read it",
    errno.EPERM: "give this user the right to read it",
    errno.EMFILE: _TOO_MANY,
    errno.ENFILE: _TOO_MANY,
    errno.EIO: _DISK,
    errno.ENODEV: _DISK,
    errno.ENXIO: _DISK,
    errno.ESTALE: _DISK,
    errno.ETIMEDOUT: _DISK,
    errno.ENOTCONN: _DISK,
    errno.EHOSTDOWN: _DISK,
    errno.ELOOP: "the link leads back to itself, remove it",
}


def allow_many_open() -> int:
    """Raises the number of files that this process may have open, as far as the system permits.

    Processes started later inherit it.

    Returns:
      the number.
    """
    try:
        import resource
    except ImportError:  # Windows
        return 512
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_OPEN if hard == resource.RLIM_INFINITY else min(hard, MOST_OPEN)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):  # macOS: its true limit is another one
            return soft
        return wanted
    return MOST_OPEN if soft == resource.RLIM_INFINITY else soft


def fault(what: str, error: OSError, restore: str = "restore it") -> UserError:
    """The line about a file that the system does not give out.

    Args:
      what: the file, and the place in it.
      error: why not.
      restore: what to do about a file that is not there.
    """
    what = one_line(what, 1000)
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return UserError(f"{what} is missing: {restore}")
    remedy = _REMEDIES.get(error.errno, restore)
    return UserError(f"{what} cannot be read ({reason(error)}): {remedy}")
