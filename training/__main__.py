"""``python -m training``: train a preset, or resume a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from training.cli import build_parser, choose_preset


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags and do what they ask for; returns the exit status (`training.cli.EPILOG`)."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        preset = choose_preset(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        # Torch takes seconds to import, and what is wrong with the flags has been said by now.
        from training.run import execute

        return execute(args, preset)
    except KeyboardInterrupt:
        print("interrupted; a run that has a checkpoint goes on with --resume", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
