"""TODO."""

from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from ternarize.errors import FormatError, UsageError
from ternarize.files.names import RECORD
from ternarize.trits.int8 import INT8
from ternarize.trits.methods import METHODS
from ternarize.trits.rotation import BLOCKS
from ternarize.trits.ternary import check_group_size

KEEP, TERNARY = "keep", "ternary"  # and INT8: what --head and --embeddings may be


ACTIVATIONS = ("none", "int8")
GROUP_SIZE = 128  # of weights that are not ternary yet
GPTQ = "gptq"  # the calibrated method
WITHOUT_DATA = "itf"  # the method of what a calibrated conversion cannot calibrate
ENDS = (KEEP, INT8, TERNARY)  # what the output head and the token embedding may become
MAX_COUNT = 2**31 - 1  # samples, steps, tokens: what is made of them fits in 64 bits
KEPT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Calibrate:
    """How weights are fitted to what a model does on text (or other input).

    dataset      .txt, .jsonl, .json or .parquet file, or a directory of them; .safetensors file of
                 inputs; Hub dataset user/name[/folder][@revision]; "self": what the model writes;
                 "default": the text that comes with ternarize
    num_samples  samples to calibrate on; a tenth as many choose, another tenth give the figures
    seq_len      tokens of a sample; None: what the model can take, at most 512
    seed         of the choice of samples, of rotations and of training
    text_column  of .jsonl, .json and .parquet; None: `text` or `messages`
    rotation     largest block of the rotation of inputs, a power of four; 0: none
    reconstruct  steps of training for each block; 0: none
    window       blocks trained together, 1 to 4
    distill      steps of training for the whole model, which has to be in memory; 0: none
    target_bpw   bits per ternary weight to be spent where they matter; None: all alike
    """

    dataset: str = "default"
    num_samples: int = 256
    seq_len: int | None = None
    seed: int = 0
    text_column: str | None = None
    rotation: int = 256
    reconstruct: int = 0
    window: int = 1
    distill: int = 0
    target_bpw: float | None = None

    def __post_init__(self) -> None:
        counts, steps = range(MAX_COUNT + 1), f"0 to {MAX_COUNT} steps"
        for what, value, good, expected in (
            ("num samples", self.num_samples, self.num_samples in counts[1:], f"1 to {MAX_COUNT}"),
            (
                "seq len",
                self.seq_len,
                self.seq_len is None or self.seq_len in counts[2:],
                f"2 to {MAX_COUNT}",
            ),
            ("seed", self.seed, 0 <= self.seed < 2**32, "0 to 4294967295"),
            (
                "rotation",
                self.rotation,
                self.rotation in (0, *BLOCKS),
                f"0 or one of {', '.join(map(str, BLOCKS))}",
            ),
            ("reconstruct", self.reconstruct, self.reconstruct in counts, steps),
            ("distill", self.distill, self.distill in counts, steps),
            ("window", self.window, 1 <= self.window <= 4, "1 to 4 blocks"),
            (
                "target bpw",
                self.target_bpw,
                self.target_bpw is None or 1.6 <= self.target_bpw <= 16,
                "1.6 to 16 bits",
            ),
        ):
            if not good:
                raise UsageError(what, f"{value}", f"{expected}")


@dataclass(frozen=True)
class Recipe:
    """What is done to a checkpoint; with the source it determines every byte of the result.

    method       a name of ternarize.trits.methods.METHODS, or "gptq" with `calibrate`
    group_size   weights per scale; -1 one group per row; 0 one scale per tensor; None: 128, and of
                 weights that are ternary already the largest groups in which they are
    keep         globs of tensors to leave in floating point
    include      globs of tensors to ternarize although they are kept by default
    dtype        float32, float16 or bfloat16 for kept floating-point tensors; None: as they are
    activations  none, or int8 per token; recorded for the loader; None: what the model was trained
                 with, as far as its format says that, else none
    scale_bits   16 or 8, of the scales of ternary weights
    planes       globs of ternary tensors that become the sum of two ternary matrices
    head         keep, int8 or ternary: the output head; None: ternary if the source has it in a
                 ternary format, else keep
    embeddings   likewise the token embedding; tied to the head, both become what either says
    calibrate    None: weights are ternarized without data
    """

    method: str = "absmean"
    group_size: int | None = None
    keep: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    dtype: str | None = None
    activations: str | None = None
    scale_bits: int = 16
    planes: tuple[str, ...] = ()
    head: str | None = None
    embeddings: str | None = None
    calibrate: Calibrate | None = None

    def __post_init__(self) -> None:
        if (self.method == GPTQ) != (self.calibrate is not None):
            raise UsageError(
                "method",
                f"{self.method!r} {'without' if self.method == GPTQ else 'with'} data to "
                "calibrate on",
                f"{GPTQ!r} with, and any other without",
                "Use --method gptq, or leave out the options of calibration",
            )
        if self.group_size is not None:
            check_group_size(self.group_size)
        for what, value, known in (
            ("method", self.method, (*METHODS, GPTQ)),
            ("dtype", self.dtype, (None, *KEPT_DTYPES)),
            ("activations", self.activations, (None, *ACTIVATIONS)),
            ("scale bits", self.scale_bits, (16, 8)),
            ("head", self.head, (None, *ENDS)),
            ("embeddings", self.embeddings, (None, *ENDS)),
        ):
            if value not in known:
                names = ", ".join(str(k) for k in known if k is not None)
                raise UsageError(what, f"{value!r}", f"one of {names}")


Options = TypeVar("Options", Recipe, Calibrate)


def read_recipe(record: dict[str, Any]) -> Recipe:
    """The recipe on record; raises FormatError where it is none."""
    try:
        return _options(Recipe, record.get("recipe"))
    except (TypeError, UsageError) as error:
        raise FormatError(
            RECORD,
            f"its recipe cannot be used ({error})",
            "the options of a conversion",
            "Fetch it again",
        ) from None


def _options(kind: type[Options], value: Any) -> Options:
    """Plain data as Recipe or Calibrate; raises TypeError for what `asdict` cannot have given."""
    hints = get_type_hints(kind)
    if not isinstance(value, dict) or not value.keys() <= hints.keys():
        raise TypeError(f"{kind.__name__.lower()} is {str(value)[:60]!r}")
    options: dict[str, Any] = {}
    for name, each in value.items():
        allowed: tuple[Any, ...] = get_args(hints[name]) or (hints[name],)
        options[name] = each
        if hints[name] == tuple[str, ...]:
            good = isinstance(each, list) and all(isinstance(item, str) for item in each)
            options[name] = tuple(each) if good else each
        elif Calibrate in allowed and isinstance(each, dict):
            good, options[name] = True, _options(Calibrate, each)
        else:
            if float in allowed:
                allowed = (*allowed, int)
            good = isinstance(each, allowed) and not isinstance(each, bool)
        if not good:
            raise TypeError(f"{name} is {str(each)[:60]!r}")
    return kind(**options)
