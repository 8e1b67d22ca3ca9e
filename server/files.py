"""Open files, of which each connection is one."""

import resource


def allow_most() -> int:
    """Let this process open as many files as its hard limit allows, and give that number.

    The soft limit that most shells and service managers set is 1024, which is kept low for programs that use select(2); this
    one does not, and a thousand connections would be refused.
    """
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most
