"""`python -m benchmarks [losses] [memory] [compile] [classes] [retrieval] [--out figures/bench]`: all by default."""
import argparse
from importlib import import_module

PARTS = ("losses", "memory", "compile", "classes", "retrieval")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed against floors and peers.")
    parser.add_argument("parts", nargs="*", help=f"which of {', '.join(PARTS)}; default: all")
    parser.add_argument("--out", default="figures/bench", help="folder for csv, md, svg and png")
    arguments = parser.parse_args(argv)
    for part in arguments.parts or PARTS:
        if part not in PARTS: parser.error(f"unknown benchmark {part!r}: choose from {', '.join(PARTS)}")
    for part in arguments.parts or PARTS: import_module(f"benchmarks.bench_{part}").main(arguments.out)


if __name__ == "__main__": main()
