"""``python -m lorakit``, and the console script."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C while it is imported is no traceback either."""
    try:
        from lorakit.cli.main import main
    except KeyboardInterrupt:
        sys.exit(130)
    main()


if __name__ == "__main__":
    main()
