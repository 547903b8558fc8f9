"""`python -m benchmarks [losses] [memory] [compile] [classes] [retrieval] [--out figures/bench]`: all of these by default.

`python -m benchmarks search` takes longer, so it runs only when it is named; its sizes are options, see bench_search.
`python -m benchmarks --render` writes tables and plots of losses and compile anew from their csv and measures nothing.
"""
import argparse
from importlib import import_module

PARTS = ("losses", "memory", "compile", "classes", "retrieval")
LONG = ("search",)                                      # run when named
RENDERED = ("losses", "compile")                        # can be written anew from what was measured


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed against floors and peers.")
    parser.add_argument("parts", nargs="*", help=f"which of {', '.join((*PARTS, *LONG))}; default: {', '.join(PARTS)}")
    parser.add_argument("--out", default="figures/bench", help="folder for csv, md, svg and png")
    parser.add_argument("--render", action="store_true", help=f"measure nothing: write {' and '.join(RENDERED)} anew from their csv")
    search = parser.add_argument_group("options of search, which may take an hour")
    search.add_argument("--exact", nargs=2, type=int, metavar=("N", "D"), help="size of exact search; 0 0: leave it out")
    search.add_argument("--sizes", nargs="+", type=int, metavar="N", help="sizes of synthetic galleries")
    for name in ("dim", "queries", "rounds", "threads"): search.add_argument(f"--{name}", type=int, metavar="N")
    search.add_argument("--embeddings", metavar="FILE", help="a .npy of your own embeddings: one gallery more")
    arguments = vars(parser.parse_args(argv))
    render, out = arguments.pop("render"), arguments.pop("out")
    parts = arguments.pop("parts") or (RENDERED if render else PARTS)
    options = {name: value for name, value in arguments.items() if value is not None}
    for part in parts:
        if part not in (*PARTS, *LONG): parser.error(f"unknown benchmark {part!r}: choose from {', '.join((*PARTS, *LONG))}")
    if options and "search" not in parts: parser.error(f"--{next(iter(options))} is an option of search: say `python -m benchmarks search ...`")
    if render and not {*parts} <= {*RENDERED}: parser.error(f"--render knows {' and '.join(RENDERED)}, got {' '.join(parts)}")
    if render:
        for part in parts: import_module(f"benchmarks.bench_{part}").render(out)
        return
    for part in parts: import_module(f"benchmarks.bench_{part}").main(out, **options if part == "search" else {})


if __name__ == "__main__": main()
