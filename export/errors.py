"""The errors of this package; each message says what was wrong and what would be right.

ExportError       nothing was exported (exit status 2)
`-- GateError     the exported model differs from the trained one (exit status 1)
"""


class ExportError(Exception):
    """Nothing was exported."""

    exit_status = 2


class GateError(ExportError):
    """A gate refuses: a difference is above its tolerance, or labels differ."""

    exit_status = 1
