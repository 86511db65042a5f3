"""``python -m training``: train a preset or the stages of a recipe, or resume a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from training.cli import batch_sizes, build_parser, choose_preset
from training.recipe import DEFAULT_RECIPE, check_flags, is_bare, plan, read_recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags and do what they ask for; returns the exit status (`training.cli.EPILOG`)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if is_bare(args):
            args.recipe = DEFAULT_RECIPE
        stages = None if args.recipe is None else plan(args, argv)
        check_flags(stages or [])
        if args.stages:
            if stages is None:
                raise ValueError("--stages shows those of a recipe: name one by --recipe.")
            print(*(stage.describe() for stage in stages), sep="\n")
            if took := read_recipe(args.recipe).took:
                print(f"It took {took}.")
            return 0
        preset = choose_preset(args) if stages is None else None
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}.", file=sys.stderr)
        return 2
    try:
        # Torch takes seconds to import, and what is wrong with the flags has been said by now.
        from training.processes import count_processes, run_processes
        from training.run import execute, execute_stages

        try:
            count = count_processes(args, batch_sizes(args, preset, stages))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if count > 1:
            return run_processes(argv, count, args.threads)
        return execute(args, preset) if stages is None else execute_stages(args, stages)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted; a run that has a checkpoint goes on with --resume", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
