"""The `ternarize` command, and `python -m ternarize`."""

import os
import signal


def _stop(number: int, frame: object) -> None:
    """Nothing has begun yet, or all is done: there is nothing to put in order."""
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


def main() -> None:
    """Entry point. Until a command runs, which ends in order, a signal ends it at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    from ternarize.cli import app  # what it imports takes a while, too

    app()


if __name__ == "__main__":
    main()
