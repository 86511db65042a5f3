"""`python -m export`: export a run as the next version of a model folder; `--verify` runs a version's gates again."""

import argparse
import sys
from pathlib import Path

from export.build import Options, export
from export.errors import ExportError
from export.parity import TABLE_HEAD, summary
from export.quantization.gate import describe
from export.quantization.variants import PROVIDERS, VariantPrecision, provider_for
from export.source import load_source, random_source
from export.verify import verify
from service.engine.metadata import MODEL_FILES
from training.config import exportable_presets

GOLDEN, MAX_BATCH = 64, 32

# Flags that have no effect with each command, and are refused there.
UNUSED_FLAGS = {
    "run": ("provider",),
    "random": ("data", "provider"),
    "verify": ("out", "name", "golden", "plain", "variants", "untimed", "other_classes", "even_if_worse"),
}


def positive(text: str) -> int:
    """Parse an integer of at least 1.

    Raises:
        argparse.ArgumentTypeError: it is smaller.
    """
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Export a trained run to a model folder that the service can serve. Nothing is written unless the "
        "logits of the exported model, run by the service's engine, are those of torch.",
        epilog="Exit status: 0 done, 1 a gate refuses, 2 wrong usage or nothing to export.",
        allow_abbrev=False,
    )
    command = parser.add_argument_group("command (one of them)")
    command.add_argument(
        "run", nargs="?", type=Path, metavar="RUN", help="folder of a run, or a .safetensors file in it"
    )
    command.add_argument(
        "--random", metavar="PRESET", help=f"random weights, to measure speed: {', '.join(exportable_presets())}"
    )
    command.add_argument(
        "--verify", type=Path, metavar="FOLDER", help="run the gates of a version or model folder again"
    )
    parser.add_argument("--out", type=Path, help="model folder; the next version is written below it")
    parser.add_argument("--name", help="name of the model (default: that of the folder)")
    parser.add_argument(
        "--data", type=Path, help="the run's data set, also for --verify (default: its path in training)"
    )
    parser.add_argument("--golden", type=positive, metavar="N", help=f"golden images (default: {GOLDEN})")
    parser.add_argument(
        "--max-batch",
        type=positive,
        default=MAX_BATCH,
        metavar="N",
        help=f"largest batch that is verified, in images (default: {MAX_BATCH})",
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="export the trained form, without the algebra of export/graph/fold.py: slower, for a model that it does "
        "not know",
    )
    parser.add_argument(
        "--variants",
        nargs="*",
        choices=tuple(PROVIDERS),
        metavar="PRECISION",
        help="files to write beside float32 if they pass their gates: int8 (for CPUs), float16 (for CUDA); without "
        "values: float32 alone (default: those that can be timed here; none with --plain and --random)",
    )
    parser.add_argument(
        "--untimed",
        action="store_true",
        help="also try variants whose speed can't be measured here; their metadata say so",
    )
    parser.add_argument(
        "--other-classes", action="store_true", help="allow a model folder whose newest version has other classes"
    )
    parser.add_argument(
        "--even-if-worse",
        action="store_true",
        help="allow a model folder whose newest version has a higher top-1 on validation images",
    )
    parser.add_argument(
        "--provider",
        choices=("auto", "cpu", "cuda"),
        help="where --verify runs (default: auto, CUDA if available); an export's own check runs on the CPU",
    )
    return parser


def run_verify(args: argparse.Namespace) -> None:
    """Run the gates of a folder again and print the results.

    Raises:
        ExportError: a gate refuses, or the folder can't be verified.
    """
    results = verify(args.verify, args.provider or "auto", args.max_batch, args.data)
    for result in results:
        print(f"{result.path} on {result.provider}")
        if result.comparisons:
            print(TABLE_HEAD, *result.comparisons, summary(result.comparisons), sep="\n")
        if result.gate is not None:
            print(describe(result.gate))
        for warning in result.warnings:
            print(f"warning: {warning}")
    for result in results:
        result.require()


def choose_variants(args: argparse.Namespace) -> tuple[VariantPrecision, ...]:
    """Return the variants to try: those that the user names, else those that can be timed or need not be.

    Prints a warning for each of the others. With --plain and --random there are none by default.
    """
    if args.variants is not None:
        return tuple(dict.fromkeys(args.variants))
    if args.plain or args.random:
        return ()
    chosen = []
    for precision, provider in PROVIDERS.items():
        if args.untimed or provider_for(precision)[1] is None:
            chosen.append(precision)
        else:
            name = MODEL_FILES[precision]
            print(
                f"warning: {name} is not tried: its speed is measured on {provider.upper()}, which can't be used here."
            )
    return tuple(chosen)


def run_export(args: argparse.Namespace) -> None:
    """Export and print the version's path.

    Raises:
        ExportError: nothing was written.
    """
    source = random_source(args.random) if args.random else load_source(args.run)
    for warning in source.warnings:
        print(f"warning: {warning}")
    options = Options(
        out=args.out,
        name=args.name,
        data=args.data,
        golden=args.golden or GOLDEN,
        max_batch=args.max_batch,
        plain=args.plain,
        variants=choose_variants(args),
        variants_asked=args.variants is not None,
        untimed=args.untimed,
        other_classes=args.other_classes,
        even_if_worse=args.even_if_worse,
    )
    print(f"written: {export(source, options)}")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 a gate refuses, 2 nothing could be exported."""
    parser = build_parser()
    args = parser.parse_args(argv)
    commands = [command for command in UNUSED_FLAGS if getattr(args, command) is not None]
    if len(commands) != 1:
        parser.error("name one of RUN, --random PRESET and --verify FOLDER")
    unused = [name for name in UNUSED_FLAGS[commands[0]] if getattr(args, name) not in (None, False)]
    if unused:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        command = "RUN" if commands == ["run"] else f"--{commands[0]}"
        parser.error(f"{command} does not take {flags}; leave out what is not meant")
    if args.verify is None and args.out is None:
        parser.error("--out is needed: the model folder, say models/perceiver-cifar100")
    try:
        run_export(args) if args.verify is None else run_verify(args)
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:  # of temporary files, the data, or the folder to verify
        print(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}.", file=sys.stderr)
        return ExportError.exit_status
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
