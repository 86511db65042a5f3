"""The errors of this package: one sentence each, that says what was wrong and what would be right.

ExportError       nothing was exported (exit status 2)
`-- GateError     the exported model does not answer as the trained one does (exit status 1)
"""


class ExportError(Exception):
    """Nothing was exported."""

    exit_status = 2


class GateError(ExportError):
    """The gate refused: the difference is above the tolerance, or labels differ."""

    exit_status = 1
