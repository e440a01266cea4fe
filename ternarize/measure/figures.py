"""Figures: means with their standard errors, and the bounds that they may be held to.

Tokens of a window depend on each other, so standard errors are those of a mean over windows (or
lines), not over tokens; that of the perplexity follows by the delta method, exp(m) se(m). They
say how far another text of the same kind may lie, not how far another kind of text may.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ternarize.errors import CheckpointError, QualityError, UsageError
from ternarize.plans.recipe import GPTQ, Recipe

Figure = dict[str, float | None]  # "value", "standard_error" (None of a single window)

# figure -> whether more of it is worse
FIGURES = {
    "perplexity": True,
    "perplexity_ratio": True,
    "kl_divergence": True,
    "top1_agreement": False,
    "cosine": False,
}
# those of what a model writes, of which there are bounds in `eval` alone
WRITING_FIGURES = {
    "loops": True,
    "zlib_ratio": False,
    "stopped": False,
    "distinct_4grams": False,
    "right_answers": False,
}
# and those of speech, likewise
SPEECH_FIGURES = {"word_error_rate": True, "word_error_ratio": True, "words_changed": True}


def mean_of(values: Tensor) -> Figure:
    """Mean of independent values (n,) float64, and its standard error s / sqrt(n)."""
    error = None if len(values) < 2 else float(values.std(correction=1)) / math.sqrt(len(values))
    return {"value": float(values.mean()), "standard_error": error}


def exponential(values: Tensor) -> Figure:
    """exp(mean), and its standard error exp(mean) se(mean) by the delta method."""
    mean = mean_of(values)
    value, error = exp(mean["value"] or 0.0), mean["standard_error"]
    return {"value": value, "standard_error": None if error is None else value * error}


def ratio_of(top: Tensor, bottom: Tensor) -> Figure:
    """sum(top) / sum(bottom) of independent pairs (n,) float64, and its standard error.

    That is of a ratio R of means: sqrt(n / (n - 1) sum (top - R bottom)^2) / sum(bottom); Cochran,
    Sampling Techniques, equation 6.13. Not for bottoms that are all 0.
    """
    value, number = float(top.sum() / bottom.sum()), len(top)
    error = None
    if number > 1:
        squares = float((top - value * bottom).square().sum())
        error = math.sqrt(number / (number - 1) * squares) / float(bottom.sum())
    return {"value": value, "standard_error": error}


def exp(value: float) -> float:
    """exp that is infinite where math.exp overflows: a collapsed model can be that bad."""
    return math.exp(value) if value < 709 else math.inf


def check_numbers(values: Tensor, model: Any, found: str) -> None:
    """Raise CheckpointError for NaN among figures (..., n).

    found  what has been found, with {} for the place of the first: "embedding {} is NaN"
    """
    bad = values.isnan().reshape(-1, values.shape[-1]).any(0).nonzero()
    if len(bad):
        raise CheckpointError(
            type(model).__name__,
            f"{found.format(int(bad[0]))} in {str(model.dtype)[6:]}",
            "finite ones",
            "Compute in another dtype (--dtype float32), or verify the checkpoint",
        )


def check_quality(
    quality: Mapping[str, Figure],
    bounds: Mapping[str, float],
    *,
    of: str = "on the report samples",
    remedy: str = "Nothing was written. Calibrate on more or other text; with another "
    "--min-quality the same command goes on",
) -> None:
    """Compare the figures on the report set, or of an evaluation, with bounds.

    bounds      figure -> the most it may be (perplexity, perplexity_ratio, kl_divergence, loops),
                or the least (all others)
    of, remedy  of the error where it is not

    Raises QualityError where a bound is exceeded, or is one on what is not measured of the model.
    """
    figures = FIGURES | WRITING_FIGURES | SPEECH_FIGURES
    for name, bound in bounds.items():
        if name not in quality:
            known = ", ".join(each for each in figures if each in quality)
            raise QualityError(
                "min quality",
                f"{name!r} is not measured of this model",
                f"one of {known}",
                "Name one of them",
            )
        value, most = quality[name]["value"], figures[name]
        assert value is not None
        if (value > bound if most else value < bound) or math.isnan(value):
            expected = f"at {'most' if most else 'least'} {bound}"
            raise QualityError(name, f"{value:.4f} {of}", expected, remedy)


def check_bounds(recipe: Recipe, bounds: Mapping[str, float]) -> None:
    """Raise UsageError for a bound that no figure of the conversion would be compared with."""
    if bounds and not recipe.fits:
        raise UsageError(
            "min quality",
            f"{', '.join(bounds)}, and method {recipe.method!r} measures nothing",
            f"{GPTQ!r}, which calibrates",
            "Use it, or leave the bound out",
        )
    for name, bound in bounds.items():
        if name not in FIGURES or not math.isfinite(bound):
            raise UsageError(
                "min quality",
                f"{name}={bound}",
                f"a number for one of {', '.join(FIGURES)}",
                "Use for instance kl_divergence=0.2",
            )
