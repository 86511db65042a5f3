"""``python -m export``: a run becomes the next version of a model folder; ``--verify`` runs a folder's gates again."""

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
from training.config import PRESETS

GOLDEN, MAX_BATCH = 64, 32

# Flags that what is asked for takes no notice of: who gives one would believe that it had been followed.
MEANINGLESS = {
    "run": ("provider",),
    "random": ("data", "provider"),
    "verify": ("out", "name", "golden", "plain", "variants", "untimed", "other_classes", "even_if_worse"),
}


def positive(text: str) -> int:
    """Read a number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Export a trained run to a model folder that the service can serve. Nothing is written unless the "
        "exported model, run by the service's engine, answers as torch does.",
        epilog="Exit status: 0 done, 1 the gate refused, 2 wrong usage or nothing that could be exported.",
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what (one of them)")
    what.add_argument("run", nargs="?", type=Path, metavar="RUN", help="folder of a run, or a .safetensors file in it")
    what.add_argument("--random", metavar="PRESET", help=f"random weights, to measure speed: {', '.join(PRESETS)}")
    what.add_argument("--verify", type=Path, metavar="FOLDER", help="run the gates of a version or model folder again")
    parser.add_argument("--out", type=Path, help="model folder; the next version is written below it")
    parser.add_argument("--name", help="name of the model (default: that of the folder)")
    parser.add_argument(
        "--data", type=Path, help="the run's data set, also for --verify (default: where it was while training)"
    )
    parser.add_argument("--golden", type=positive, metavar="N", help=f"golden pictures (default: {GOLDEN})")
    parser.add_argument(
        "--max-batch",
        type=positive,
        default=MAX_BATCH,
        metavar="N",
        help=f"largest batch that is verified (default: {MAX_BATCH})",
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="keep the form that was trained, without the algebra of export/graph/fold.py: slower, for a model that it "
        "does not know",
    )
    parser.add_argument(
        "--variants",
        nargs="*",
        choices=tuple(PROVIDERS),
        metavar="PRECISION",
        help="files that are written beside float32 if they pass their gates and are faster: int8 (for CPUs), float16 "
        "(for CUDA); none after the flag: float32 alone (default: those that can be timed here; none with --plain and "
        "--random)",
    )
    parser.add_argument(
        "--untimed",
        action="store_true",
        help="try variants whose speed can't be measured here as well, and write them if they pass; they say so",
    )
    parser.add_argument(
        "--other-classes", action="store_true", help="write beside versions that have other classes than this model"
    )
    parser.add_argument("--even-if-worse", action="store_true", help="write beside a version that was right more often")
    parser.add_argument(
        "--provider",
        choices=("auto", "cpu", "cuda"),
        help="where --verify runs (default: auto, CUDA where there is one); an export's gate runs on the CPU",
    )
    return parser


def run_verify(args: argparse.Namespace) -> None:
    """Run the gates of a folder again and print them.

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
        for note in result.notes:
            print(f"note: {note}")
    for result in results:
        result.require()


def chosen_variants(args: argparse.Namespace) -> tuple[VariantPrecision, ...]:
    """Those that were asked for; else those that can be timed here, or need not be, and a note on the others.

    None of what is for comparisons only.
    """
    if args.variants is not None:
        return tuple(dict.fromkeys(args.variants))
    if args.plain or args.random:
        return ()
    timed = []
    for precision, provider in PROVIDERS.items():
        if args.untimed or provider_for(precision)[1] is None:
            timed.append(precision)
        else:
            name = MODEL_FILES[precision]
            print(f"note: {name} is not tried: its speed is measured on {provider.upper()}, which can't be used here.")
    return tuple(timed)


def run_export(args: argparse.Namespace) -> None:
    """Export and say where to.

    Raises:
        ExportError: nothing was written.
    """
    source = random_source(args.random) if args.random else load_source(args.run)
    for note in source.notes:
        print(f"note: {note}")
    options = Options(
        out=args.out,
        name=args.name,
        data=args.data,
        golden=args.golden or GOLDEN,
        max_batch=args.max_batch,
        plain=args.plain,
        variants=chosen_variants(args),
        variants_asked=args.variants is not None,
        untimed=args.untimed,
        other_classes=args.other_classes,
        even_if_worse=args.even_if_worse,
    )
    print(f"written: {export(source, options)}")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 the gate refused, 2 nothing could be exported."""
    parser = build_parser()
    args = parser.parse_args(argv)
    asked = [what for what in MEANINGLESS if getattr(args, what) is not None]
    if len(asked) != 1:
        parser.error("name one of RUN, --random PRESET and --verify FOLDER")
    given = [name for name in MEANINGLESS[asked[0]] if getattr(args, name) not in (None, False)]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        what = "RUN" if asked == ["run"] else f"--{asked[0]}"
        parser.error(f"{flags} would change nothing with {what}; leave out what is not meant")
    if args.verify is None and args.out is None:
        parser.error("--out is needed: the model folder, say models/perceiver-cifar100")
    try:
        run_export(args) if args.verify is None else run_verify(args)
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:  # of temporary files, of the data, of what is verified
        print(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}.", file=sys.stderr)
        return ExportError.exit_status
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
