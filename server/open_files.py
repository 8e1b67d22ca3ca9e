"""How many connections the operating system lets a process have."""

import resource


def raise_limit() -> None:
    """Raise this process's limit of open files to the most that it may have: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
