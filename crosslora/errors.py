"""What users can mend, and how a command says it: a sentence and exit code 2, no traceback."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

INTERRUPTED = 130
"""What typer makes of Ctrl-C."""


class UserError(Exception):
    """A problem the user can mend; its message names the field, the value, the reason and the way out."""


@contextmanager
def said_in_a_sentence() -> Iterator[None]:
    """For the whole of a command. Exit code 2: to be mended; 1: interrupted."""
    try:
        yield
    except UserError as error:
        _fail(str(error))
    except (KeyboardInterrupt, SystemExit) as stopped:
        if isinstance(stopped, SystemExit) and stopped.code != INTERRUPTED:
            raise
        resumes = "; `crosslora transfer` without --redo goes on from here" if "transfer" in sys.argv else ""
        print(f"interrupted{resumes}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno is None:  # pyarrow's, from an object store, or another client's of a network
            what = (str(error).splitlines() or [type(error).__name__])[0]
            _fail(f"run folder or network: {what}; check names, the network and your access")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            _fail(
                f"{error.filename or 'a file'}: {error.strerror}; give a place that you may write to, or mend its permissions"
            )
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _fail(
            f"disk full, or your quota of it, at {error.filename or 'the run folder'}; free some space and run the same command again"
        )


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
