"""Start-up: `ternarize --help`, and what `import ternarize` adds to `import transformers`.

python benchmarks/startup.py [--repeats 11] [--json F]
"""

import argparse
import json
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

COMMANDS = {
    "ternarize --help": [str(Path(sysconfig.get_path("scripts")) / "ternarize"), "--help"],
    "import transformers": [sys.executable, "-c", "import transformers"],
    "import transformers, ternarize": [sys.executable, "-c", "import transformers, ternarize"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(options.repeats + 1):  # the first warms the page cache
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if number:
                seconds[name].append(time.perf_counter() - start)
    print("| | median, s |\n|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values):.3f} |")
    pairs = zip(
        seconds["import transformers, ternarize"], seconds["import transformers"], strict=True
    )
    print(f"| added by ternarize | {statistics.median(a - b for a, b in pairs):.3f} |")
    if options.json:
        options.json.write_text(json.dumps(seconds, indent=2) + "\n")


if __name__ == "__main__":
    main()
