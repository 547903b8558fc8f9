"""`python -m benchmarks [losses] [memory] [compile] [classes] [retrieval] [--out figures/bench]`: all of these by default.

`python -m benchmarks search`, `training`, `device` and `paths` take longer, so they run only when they are named; their options stand in their modules.
A part that fails does not keep the next ones from running; failures are told at the end, and the exit code is not 0.
`python -m benchmarks --render` writes tables and plots of losses and compile anew from their csv and measures nothing.
"""
import argparse
import traceback
from importlib import import_module

PARTS = ("losses", "memory", "compile", "classes", "retrieval")
LONG = ("search", "training", "device", "paths")        # run when named
OPTIONS = {"search": ("exact", "sizes", "dim", "queries", "rounds", "threads", "embeddings", "run"),
           "training": ("encoder", "size", "crop", "batch", "steps", "rounds", "threads", "compile"),
           "device": ("batches", "classes", "exact", "dim", "rounds", "threads", "only"), "paths": ("data", "seeds", "epochs")}
RENDERED = ("losses", "compile")                        # can be written anew from what was measured


def count(text: str) -> int:
    "A count from the command line."
    if (n := int(text)) < 1: raise argparse.ArgumentTypeError(f"must be 1 or more, got {n}")
    return n


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed against floors and peers.")
    parser.add_argument("parts", nargs="*", help=f"which of {', '.join((*PARTS, *LONG))}; default: {', '.join(PARTS)}")
    parser.add_argument("--out", default="figures/bench", help="folder for csv, md, svg and png")
    parser.add_argument("--render", action="store_true", help=f"measure nothing: write {' and '.join(RENDERED)} anew from their csv")
    search = parser.add_argument_group("search", "may take an hour")
    search.add_argument("--sizes", nargs="+", type=count, metavar="N", help="sizes of synthetic galleries")
    search.add_argument("--queries", type=count, metavar="N")
    search.add_argument("--embeddings", metavar="FILE", help="a .npy of your own embeddings: one gallery more")
    search.add_argument("--run", metavar="FOLDER", help="a finished run: views of its images, one gallery more")
    training = parser.add_argument_group("training", "the paper's size on a GPU, a small one elsewhere")
    training.add_argument("--encoder", metavar="NAME")
    training.add_argument("--compile", action="store_true", default=None, help="the compiler's rung on a CPU, too")
    for name in ("size", "crop", "batch", "steps"): training.add_argument(f"--{name}", type=count, metavar="N")
    device = parser.add_argument_group("device", "large sizes on a GPU, small ones elsewhere")
    for name, what in (("batches", "batch sizes of the losses"), ("classes", "numbers of classes of cross-entropy")): device.add_argument(f"--{name}", nargs="+", type=count, metavar="N", help=what)
    device.add_argument("--only", nargs="+", choices=("losses", "classes", "search"), help="measure these only; give each --out of its own")
    shared = parser.add_argument_group("more than one")
    shared.add_argument("--exact", nargs=2, type=int, metavar=("N", "D"), help="search, device: size of exact search; 0 0: leave it out")
    shared.add_argument("--dim", type=count, metavar="N", help="search, device: of embeddings")
    for name in ("rounds", "threads"): shared.add_argument(f"--{name}", type=count, metavar="N", help="search, training, device")
    paths = parser.add_argument_group("paths")
    paths.add_argument("--data", metavar="FOLDER", help="holds grocery; default: DML_DATA")
    for name in ("seeds", "epochs"): paths.add_argument(f"--{name}", type=count, metavar="N")
    arguments = vars(parser.parse_args(argv))
    render, out = arguments.pop("render"), arguments.pop("out")
    parts = arguments.pop("parts") or (RENDERED if render else PARTS)
    options = {name: value for name, value in arguments.items() if value is not None}
    for part in parts:
        if part not in (*PARTS, *LONG): parser.error(f"unknown benchmark {part!r}: choose from {', '.join((*PARTS, *LONG))}")
    for name in options:
        if not any(name in of for part, of in OPTIONS.items() if part in parts):
            owners = [part for part, of in OPTIONS.items() if name in of]
            parser.error(f"--{name} is an option of {' and '.join(owners)}: say `python -m benchmarks {owners[0]} ...`")
    if render and not {*parts} <= {*RENDERED}: parser.error(f"--render knows {' and '.join(RENDERED)}, got {' '.join(parts)}")
    if render:
        for part in parts: import_module(f"benchmarks.bench_{part}").render(out)
        return
    failed, code = [], 2                                    # 2: no part broke, but one cannot do what was asked; 1: one broke
    for part in parts:
        try: import_module(f"benchmarks.bench_{part}").main(out, **{k: v for k, v in options.items() if k in OPTIONS.get(part, ())})
        except (ValueError, OSError) as e: failed.append(f"{parser.prog} {part}: {e}\n")
        except Exception as e:                              # its words are kept, and not itself, which would hold the part's memory
            traceback.print_exc()
            failed.append(f"{parser.prog} {part}: {type(e).__name__}: {e}\n")
            code = 1
    if failed: parser.exit(code, "".join(failed))


if __name__ == "__main__": main()
