"""``python -m vitkernels info | bench | demo | merge``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    from vitkernels import demo, info, merge_demo
    from vitkernels.bench import cli as bench

    parser = argparse.ArgumentParser("vitkernels", description="Kernels for efficient vision transformers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | bench | demo | merge")
    for name, module, text in (
        ("info", info, "what is installed, built and usable here, in a form to paste into a bug report"),
        ("bench", bench, "time an operator or a network against PyTorch and public peers"),
        ("demo", demo, "an EfficientViT on a photograph, before and after vitkernels.apply"),
        ("merge", merge_demo, "which tokens of a photograph a ViT merges, as a picture"),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=getattr(module, "DESCRIPTION", text),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("vitkernels: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has gone, as in `| head`; Python would try again to flush at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
