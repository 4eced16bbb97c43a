"""`vega-edge`, which is also `python -m vega_edge`: the command line, loaded such that Ctrl-C meanwhile is one line too."""

import sys


def main() -> int:
    """Runs the command line and returns its exit status."""
    try:
        from .cli import main as run  # a tenth of a second

        return run()
    except KeyboardInterrupt:
        if sys.stderr:
            sys.stderr.write("vega-edge: interrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
