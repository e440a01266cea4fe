"""Word error rates of a speech recogniser: source, rounded, calibrated and trained.

    apt-get install espeak-ng; pip install 'ternarize[audio]'
    python benchmarks/speech.py MODEL TEXTS --work FOLDER [--only ROW ...] [--json OUT.json]
    python benchmarks/speech.py MODEL TEXTS --work FOLDER --speed [--json OUT.json]

MODEL is a checkpoint of Whisper. TEXTS holds `text/general.txt`, from which sentences to calibrate
and train on are taken, and `text/general_eval.txt`, from which those to measure on are; espeak-ng
speaks them, in each with other voices. What is calibrated and trained has no transcripts: the
source's own words take their place. FOLDER keeps speech and models, and what is there is not made
again. With --speed: one window of 30 seconds through the encoder, in torch and packed, and what the
whole model holds.
"""

import hashlib
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from common import hide_bars, parser, write_figures

import ternarize
from ternarize.convert.run import convert
from ternarize.measure.documents import read_documents
from ternarize.measure.report import inspect
from ternarize.measure.speech import evaluate_speech
from ternarize.plans.recipe import Calibrate, Recipe, Train

# accent and speaker of espeak-ng, words a minute
TO_LEARN = [
    (f"{accent}+{speaker}", speed)
    for accent, speed in (("en-us", 150), ("en-gb", 160), ("en-gb-scotland", 145))
    for speaker in ("m1", "m3", "m7", "f1", "f2", "f5", "steph", "max", "adam", "linda")
]
TO_MEASURE = [
    (f"{accent}+{speaker}", speed)
    for accent, speed in (("en-us", 155), ("en-gb-x-rp", 150), ("en-029", 145))
    for speaker in ("m2", "m4", "f3", "f4", "paul", "anika")
]
# plain sentences of 6 to 18 words, spoken as they are written
SENTENCE = re.compile(r"(?<![\w.,;:'\"-] )\b[A-Z][a-z]+(?:,? [a-z']+){5,17}\.(?=\s)")


def sentences(text: Path) -> list[str]:
    """The plain sentences of a text, each once, in the order of their digests."""
    found = {each for document in read_documents(text) for each in SENTENCE.findall(document)}
    return sorted(found, key=lambda each: hashlib.sha256(each.encode()).hexdigest())


def speak(said: list[str], voices: list[tuple[str, int]], folder: Path, transcripts: bool) -> Path:
    """A recording of each sentence, by one voice after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    for at, sentence in enumerate(said):
        audio = folder / f"{at:05}.wav"
        if not audio.exists():
            voice, speed = voices[at % len(voices)]
            words = ["espeak-ng", "-v", voice, "-s", str(speed), "-w", str(audio), sentence]
            subprocess.run(words, check=True)
            if transcripts:
                audio.with_suffix(".txt").write_text(sentence + "\n")
    return folder


def speed(source: Path, packed: Path, rounds: int) -> list[dict[str, Any]]:
    """Print milliseconds of the encoder for a window, and MB of all that each model holds."""
    heard: Any = transformers.WhisperForConditionalGeneration
    models: dict[str, Any] = {
        "torch, float32": heard.from_pretrained(source, dtype=torch.float32).eval(),
        "torch, bfloat16": heard.from_pretrained(source, dtype=torch.bfloat16).eval(),
        "packed, float32": ternarize.load(packed, dtype=torch.float32),
        "packed, float32, int8 activations": ternarize.load(
            packed, dtype=torch.float32, activations="int8"
        ),
        "packed, bfloat16": ternarize.load(packed, dtype=torch.bfloat16),
    }
    config = models["torch, float32"].config
    torch.manual_seed(0)
    window = torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions)
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for name, model in models.items():
                began = time.perf_counter()
                model.get_encoder()(window.to(model.dtype))
                times[name].append(1e3 * (time.perf_counter() - began))
    print(
        f"{torch.get_num_threads()} threads; file {(packed / 'model.safetensors').stat().st_size}"
    )
    print("| | encoder, ms | times as fast as torch in float32 | model, MB |")
    print("|---|---|---|---|")
    rows, first = [], times["torch, float32"][1:]
    for name, model in models.items():
        own = times[name][1:]
        ratio = statistics.median(a / b for a, b in zip(first, own, strict=True))
        tensors = [*model.parameters(), *model.buffers()]  # each once, also where two are tied
        size = sum(each.nbytes for each in tensors)
        rows.append({"name": name, "ms": statistics.median(own), "ratio": ratio, "bytes": size})
        print(f"| {name} | {rows[-1]['ms']:.0f} | {ratio:.2f} | {size / 1e6:.1f} |")
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("model", type=Path, help="a checkpoint of Whisper")
    arguments.add_argument("texts", type=Path, help="folder with text/general.txt")
    arguments.add_argument("--work", type=Path, required=True, help="folder for speech and models")
    arguments.add_argument("--recordings", type=int, default=512, help="to learn from")
    arguments.add_argument("--measured", type=int, default=120, help="sentences to measure on")
    arguments.add_argument("--num-samples", type=int, default=128, help="windows to calibrate on")
    arguments.add_argument("--minutes", type=float, default=30.0, help="of training; 0: none")
    arguments.add_argument("--batch", type=int, default=4096, help="tokens of a step of training")
    arguments.add_argument("--only", nargs="*", help="names of rows")
    arguments.add_argument("--speed", action="store_true", help="of the encoder, from FOLDER/itf")
    arguments.add_argument("--rounds", type=int, default=7, help="of --speed")
    args = arguments.parse_args()
    hide_bars()
    if args.speed:
        if not (args.work / "itf").exists():
            convert(args.model, args.work / "itf", Recipe("itf"))
        figures = {"rows": speed(args.model, args.work / "itf", args.rounds)}
        write_figures(args.json, __file__, figures)
        return
    texts: Path = args.texts / "text"
    measured = sentences(texts / "general_eval.txt")[: args.measured]
    others = [s for s in sentences(texts / "general.txt") if s not in set(measured)]
    learn = speak(others[: args.recordings], TO_LEARN, args.work / "learn", transcripts=False)
    measure = speak(measured, TO_MEASURE, args.work / "measure", transcripts=True)
    calibrate = Calibrate(str(learn), num_samples=args.num_samples)
    form: dict[str, Any] = {"group_size": 64, "scale_bits": 8}  # 1.75 bits a weight, as itf's 128
    recipes = {"itf": Recipe("itf"), "calibrated": Recipe("gptq", calibrate=calibrate, **form)}
    if args.minutes:
        start = str(args.work / "calibrated")
        train = Train((str(learn),), start=start, minutes=args.minutes, batch=args.batch)
        recipes["trained"] = Recipe("itf", train=train, **form)
    rows = []
    print("| model | bpw | word error rate | of the source | ratio | words changed | minutes |")
    print("|---|---|---|---|---|---|---|")
    for name, recipe in recipes.items():
        if args.only is not None and name not in args.only:
            continue
        print(f"{name} ...", file=sys.stderr)
        output, began = args.work / name, time.perf_counter()
        minutes = None
        if not output.exists():
            convert(args.model, output, recipe)
            minutes = (time.perf_counter() - began) / 60
        found = evaluate_speech(output, measure, source=args.model, language="en")
        bits = inspect(output)["totals"]["ternary_bpw"]
        row: dict[str, Any] = {"name": name, "bpw": bits, "minutes": minutes, **found}
        cells = [
            f"{row[figure]['value']:.4f} ± {row[figure]['standard_error']:.4f}"
            for figure in (
                "word_error_rate",
                "source_word_error_rate",
                "word_error_ratio",
                "words_changed",
            )
        ]
        took = "" if minutes is None else f"{minutes:.1f}"
        print(f"| {name} | {bits:.3f} | {' | '.join(cells)} | {took} |", flush=True)
        rows.append(row)
    write_figures(args.json, __file__, {"rows": rows})


if __name__ == "__main__":
    main()
