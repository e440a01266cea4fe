"""The recipe of a conversion: each option is declared here, once.

Its name, help, default, range and allowed values stand on a field of `Recipe`, `Calibrate` or
`Train`. The options of `ternarize convert` and `train`, CLI.md, the checks, and the reading of
records and of files with recipes (recipe_files.py) are made from them. Nothing here needs torch:
`ternarize --help` imports it.
"""

from dataclasses import KW_ONLY, Field, dataclass, field, fields
from numbers import Integral, Real
from types import NoneType
from typing import Any, get_args

from ternarize.errors import UsageError

KEEP, TERNARY = "keep", "ternary"  # and int8, int4: what --head and --embeddings may be
ENDS = (KEEP, "int8", "int4", TERNARY)  # what the output head and the token embedding may become
ACTIVATIONS = ("none", "int8")
GROUP_SIZE = 128  # of weights that are not ternary yet
GPTQ = "gptq"  # the calibrated method
WITHOUT_DATA = "itf"  # the method of what a calibrated conversion cannot calibrate
MAX_COUNT = 2**31 - 1  # samples, steps, tokens: what is made of them fits in 64 bits
KEPT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
LLAMA_CPP = "llama.cpp"
ENGINES = (LLAMA_CPP,)  # what --for may name
TRIT_BITS = 1.6  # of a trit in base 3
LARGEST_ROTATION = 256  # largest block of the rotation of inputs, where nothing else is said


@dataclass(frozen=True)
class Span:
    """The numbers from `low` to `high`, both among them."""

    low: float
    high: float
    words: str = "{low} to {high}"

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return self.words.format(low=self.low, high=self.high)


def option(
    default: Any,
    text: str,
    allowed: Span | tuple[Any, ...] | None = None,
    metavar: str | None = None,
    name: str | None = None,
) -> Any:
    """The field of an option.

    text     the help; may have {default} and {allowed} in it
    allowed  what its value may be, besides None where its type has that
    metavar  the word for its value in the help, where that is not its type
    name     of the option on the command line, where that is not the field's
    """
    words = " or ".join(map(str, allowed)) if isinstance(allowed, tuple) else str(allowed)
    text = text.format(default=default, allowed=words)
    about = {"help": text, "allowed": allowed, "metavar": metavar, "name": name}
    return field(default=default, metadata=about)


GROUPS = Span(
    -1,
    2**63 - 1,
    "a positive number of weights, -1 (one group per row) or 0 (one scale per tensor)",
)
COUNT, STEPS = Span(1, MAX_COUNT), Span(0, MAX_COUNT, "{low} to {high} steps")
SEEDS = Span(0, 2**32 - 1)
BUDGETS = ("tokens", "minutes", "steps")  # the fields of Train that say when it ends
CHANGEABLE = (
    *BUDGETS,
    "recompute",
    "micro_batch",
    "compile",
    "shard",
)  # and all that may change while a training goes on
DISTILL_BATCH = 1024  # tokens of a step of --distill


@dataclass(frozen=True)
class Calibrate:
    """How weights are fitted to what a model does on text (or other input).

    Raises UsageError for a value that an option cannot have. A tenth as many samples as calibrate
    choose between results, another tenth give the figures; `dataset` may also be a .safetensors
    file of inputs.
    """

    dataset: str = option(
        "default",
        "Calibrate on texts: a .txt, .jsonl, .json or .parquet file, a directory of them, or a Hub "
        "dataset; self: what the model writes; default: a text that comes with ternarize. Of "
        "models that hear speech: a folder of audio.",
    )
    num_samples: int = option(256, "Samples to calibrate on; default: {default}.", COUNT)
    seq_len: int | None = option(
        None, "Tokens of a sample; default: what the model takes, at most 512.", Span(2, MAX_COUNT)
    )
    seed: int = option(
        0, "Of the choice of samples, of rotation and training; default: {default}.", SEEDS
    )
    text_column: str | None = option(None, "Column of the texts; default: text or messages.")
    rotation: int | None = option(
        None,
        "Largest block of the rotation of inputs at run time, a power of 4; 0: none, as with --for "
        f"and --fold; else default: {LARGEST_ROTATION}.",
        (0, 4, 16, 64, 256, 1024),
    )
    reconstruct: int = option(
        0, "Steps of training for each block; default: {default}.", STEPS, "STEPS"
    )
    window: int = option(1, "Blocks to train together, {allowed}; default: {default}.", Span(1, 4))
    distill: int = option(
        0,
        "Steps of training for the whole model, with all of it in memory; default: {default}.",
        STEPS,
        "STEPS",
    )
    target_bpw: float | None = option(
        None,
        "Bits per ternary weight, spent where they matter most; with --codec rans about so many, "
        "as stored, and below 1.6 by more zeros; beside a training as in codec base3.",
        Span(0.1, 16, "{low} to {high} bits"),
    )

    def __post_init__(self) -> None:
        _check_values(self)


@dataclass(frozen=True)
class Train:
    """How a whole model is trained once its weights are ternary.

    It ends when the first of the budgets is used up. Documents of the texts are kept apart by their
    digests to choose the state that is kept, and to give the figures. Raises UsageError for a value
    that an option cannot have.
    """

    texts: tuple[str, ...] = option(
        (),
        "Train on texts, as of --dataset, each FILE or FILE=WEIGHT for a mixture; default: that of "
        "--dataset.",
    )
    objective: str = option(
        "distill",
        "distill: towards what the teacher says of every next word; text: towards the texts "
        "themselves, of chats towards the answers. Default: {default}.",
        ("distill", "text"),
    )
    teacher: str | None = option(
        None, "Model to learn from, with the same words; default: the source itself."
    )
    start: str | None = option(
        None,
        "Packed checkpoint of this model to begin with, as it was calibrated or trained before.",
    )
    tokens: int | None = option(None, "Tokens to train on.", COUNT)
    minutes: float | None = option(
        None,
        "Minutes to train for, those before a break included.",
        Span(1e-3, MAX_COUNT, "{low} to {high} minutes"),
    )
    steps: int | None = option(None, "Steps of training.", COUNT)
    train_len: int | None = option(
        None,
        "Tokens of a sample; default: that of --seq-len, or what the model takes, at most 256.",
        Span(2, MAX_COUNT),
    )
    batch: int = option(4096, "Tokens of a step; default: {default}.", COUNT)
    micro_batch: int | None = option(
        None,
        "Tokens of a step that go through the model at a time: fewer need less memory; default: "
        "2048, on a GPU 16384.",
        COUNT,
    )
    lr: float | None = option(
        None,
        "Rate of the weights at its highest, in units of their scales (from scratch: as it is); "
        "default: 0.006 (from scratch 0.002).",
        Span(0, 1),
    )
    optimizer: str = option(
        "adamw",
        "{allowed}: 8 more bytes for each trained weight, or next to none. Default: {default}.",
        ("adamw", "adafactor"),
    )
    recompute: bool = option(
        False,
        "Work activations out again in the backward pass: less memory, longer steps, the same "
        "within rounding.",
    )
    compile: bool = option(
        False,
        "Compile the blocks of both models (torch.compile): shorter steps after a minute or two, "
        "the same within rounding. On a CPU it needs a C++ compiler.",
    )
    shard: bool = option(
        False,
        "Of several processes (torchrun): divide weights, gradients and moments of the blocks of "
        "both models among them (FSDP2); the same within rounding.",
    )
    all_weights: bool = option(
        False, "Train what is kept as well: embeddings, head, every dense matrix."
    )
    from_scratch: bool = option(
        False,
        "Draw the weights at random: MODEL is a folder with config.json and a tokenizer. With the "
        "rule and activations of BitNet b1.58, on the texts themselves, if nothing else is said.",
    )
    seed: int = option(
        0, "Of the choice and order of samples, and of what is drawn; default: {default}.", SEEDS
    )
    text_column: str | None = option(None, "Column of the texts; default: text or messages.")

    def __post_init__(self) -> None:
        _check_values(self)
        if all(getattr(self, name) is None for name in BUDGETS):
            raise UsageError(
                "training",
                "without an end",
                "tokens, minutes or steps",
                "Name one of them (--tokens, --minutes, --steps)",
            )


@dataclass(frozen=True)
class Recipe:
    """What is done to a checkpoint; with the source it determines every byte of the result.

    Raises UsageError for a value that an option cannot have, and where the method and `calibrate`
    do not go together: it is there for "gptq" alone.
    """

    method: str = option(
        "absmean",
        "How weights become trits; gptq calibrates. Default: {default}, with --dataset gptq.",
        ("absmean", "twn", "itf", GPTQ),
    )
    group_size: int | None = option(
        None,
        "Weights per scale; -1: one group per row; 0: one scale per tensor. Default: "
        f"{GROUP_SIZE}; of weights that are ternary already their own.",
        GROUPS,
    )
    _: KW_ONLY
    keep: tuple[str, ...] = option((), "Leave tensors that match this glob as they are.")
    include: tuple[str, ...] = option(
        (), "Ternarize linear weights that match this glob, kept by default."
    )
    dtype: str | None = option(
        None, "Dtype of kept weights; default: as in the source.", tuple(KEPT_DTYPES)
    )
    activations: str | None = option(
        None,
        "Recorded for the loader: int8 per token, or none. Default: none; of imported models what "
        "they were trained with.",
        ACTIVATIONS,
    )
    scale_bits: int = option(
        16,
        "Bits of a scale: {allowed}, the last with --codec rans; default: {default}.",
        (16, 8, 6),
    )
    zeros: float | None = option(
        None,
        "Share of zeros: without data of each group the smallest weights, with twn or itf; with "
        "data, or a training, of each matrix those that matter least. Default: what comes of the "
        "method. Of many zeros --codec rans makes a smaller file.",
        Span(0, 0.999),
    )
    codec: str = option(
        "base3",
        "How ternary tensors are stored; base3: five trits in a byte; rans: by their frequencies, "
        "where that is less, as `ternarize recode` does it. Default: {default}.",
        ("base3", "rans"),
    )
    planes: tuple[str, ...] = option(
        (), "Make tensors that match this glob the sum of two ternary ones."
    )
    head: str | None = option(
        None,
        "What becomes of the output head. Default: keep; ternary if the source has it in 2 bits.",
        ENDS,
    )
    embeddings: str | None = option(
        None,
        "What becomes of the token embedding; if tied to the head, of both. Default: as of the "
        "head.",
        ENDS,
    )
    engine: str | None = option(
        None,
        "Choose what files of {allowed} hold (groups, no rotation at run time), and refuse what "
        "they do not.",
        ENGINES,
        name="--for",
    )
    fold: bool = option(
        False,
        "Rotate what goes from layer to layer, and the heads of values, by other weights: nothing "
        "of it is left for run time.",
    )
    calibrate: Calibrate | None = None
    train: Train | None = None

    def __post_init__(self) -> None:
        _check_values(self)
        words = f"{self.method!r} {'without' if self.calibrate is None else 'with'} data"
        if self.method == GPTQ and self.calibrate is None:
            raise UsageError("method", words, "some with it", "Add `calibrate`, or take another")
        if self.method != GPTQ and self.calibrate is not None:
            raise UsageError("method", words, f"{GPTQ!r} with it", "Take that, or no `calibrate`")
        if self.zeros is not None and self.method == "absmean":
            raise UsageError(
                "zeros",
                f"{self.zeros} beside absmean, whose scale is the mean of all weights",
                "another method",
                "Add --method itf or --dataset, or leave it out",
            )
        if self.scale_bits == 6 and self.codec == "base3":
            raise UsageError(
                "scale bits",
                "6 in codec base3, where it would take 8",
                "codec rans",
                "Add --codec rans, or use --scale-bits 8",
            )
        if self.calibrate is not None and self.calibrate.target_bpw is not None:
            self._check_budget(self.calibrate.target_bpw)
        if self.fold and self.training is not None:
            raise UsageError(
                "fold",
                "beside a training, which begins with the weights of the source as they are",
                "one of the two",
                "Leave out --fold, or the training",
            )
        if self.train is not None:
            self._check_training(self.train)

    def _check_budget(self, target_bpw: float) -> None:
        if target_bpw < TRIT_BITS and (self.codec == "base3" or self.training is not None):
            how = "in codec base3" if self.codec == "base3" else "beside a training"
            raise UsageError(
                "target bpw",
                f"{target_bpw} {how}",
                f"{TRIT_BITS} at least; less with codec rans, and without a training",
                "Ask for more bits, or add --codec rans",
            )
        if self.zeros is not None:
            found, remedy = f"{target_bpw} beside zeros {self.zeros}", "Leave out one of the two"
            raise UsageError("target bpw", found, "shares of zeros that it chooses", remedy)

    def _check_training(self, train: Train) -> None:
        if self.calibrate is None and not train.texts:
            raise UsageError("training", "without a text", "some", "Name one with --texts")
        if self.calibrate is not None and self.calibrate.distill:
            raise UsageError(
                "distill", "beside a training", "one of the two", "Leave it out, or `train`"
            )
        if self.planes and self.calibrate is None and train.start is None:
            raise UsageError(
                "planes",
                "beside a training that begins without data, which trains one plane",
                "calibration with it, whose two planes stay",
                "Name a --dataset, or leave out --planes",
            )
        if train.start is not None and self.method == "absmean":
            raise UsageError(
                "method",
                "'absmean' beside --start, whose scales are learned and not means",
                "another rule, or weights to begin with",
                "Leave out one of the two",
            )
        if self.calibrate is not None and (train.from_scratch or train.start is not None):
            raise UsageError(
                "--from-scratch" if train.from_scratch else "--start",
                "with calibration, which begins with the weights of a source",
                "texts to train on alone",
                "Use --texts in the place of --dataset, and another method",
            )

    @property
    def training(self) -> Train | None:
        """How the whole model is trained: `train`, or what --distill asks for, or not at all."""
        found = self.calibrate
        if self.train is None and found is not None and found.distill:
            return Train(
                steps=found.distill,
                batch=DISTILL_BATCH,
                seed=found.seed,
                text_column=found.text_column,
            )
        return self.train

    @property
    def fits(self) -> bool:
        """Whether data decide what becomes of weights."""
        return self.calibrate is not None or self.train is not None


_TYPES = {int: Integral, float: Real}  # numpy's numbers are some, too
_IN_WORDS = {int: "a whole number", float: "a number", str: "a text", ...: "a list of texts"}


def _check_values(options: Recipe | Calibrate | Train) -> None:
    """Raise UsageError for the first value that its option cannot have; make tuples of lists."""
    for each in fields(options):
        value = getattr(options, each.name)
        if isinstance(value, list):
            value = tuple(value)
            object.__setattr__(options, each.name, value)
        if not _can_be(each, value):
            what = each.name.replace("_", " ")
            raise UsageError(what, f"{value!r:.60}", _expected(each))


def _can_be(option: Field[Any], value: Any) -> bool:
    kinds = get_args(option.type) or (option.type,)
    if ... in kinds:
        return isinstance(value, tuple) and all(isinstance(each, str) for each in value)
    if value is None:
        return NoneType in kinds
    good = isinstance(value, tuple(_TYPES.get(kind, kind) for kind in kinds))
    allowed = option.metadata.get("allowed")
    if isinstance(value, bool):
        return bool in kinds
    return good and (allowed is None or value in allowed)


def _expected(option: Field[Any]) -> str:
    allowed, kinds = option.metadata.get("allowed"), get_args(option.type) or (option.type,)
    if isinstance(allowed, tuple):
        return f"one of {', '.join(map(str, allowed))}"
    if allowed is not None:
        return str(allowed)
    return next((words for kind, words in reversed(_IN_WORDS.items()) if kind in kinds), "a table")
