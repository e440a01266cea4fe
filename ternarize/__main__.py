"""The `ternarize` command, and `python -m ternarize`."""

import signal

from ternarize.threads import ENDING, end_at_once, is_ours


def main() -> None:
    """Entry point. Until a command runs, which ends in order, a signal ends it at once."""
    for number in ENDING:
        if is_ours(number):
            signal.signal(number, end_at_once)
    from ternarize.cli.app import app  # what it imports takes a while, too

    app()


if __name__ == "__main__":
    main()
