"""The number of files and sockets that a process may hold open."""

import resource


def raise_open_files() -> int:
    """Raises the process's limit of open files to the most that it is allowed; returns it.

    Many systems start a process with a soft limit of 1,024, which a server's connections reach.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):  # some systems refuse "infinity"
        return soft
    return hard
