"""The model card of a packed checkpoint: README.md, written from its record and nothing else.

Its last line holds a digest of what stands above it, which tells a card that nobody has touched
(and that may be written anew) from one that a person has edited (and that is never replaced).
"""

import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ternarize.calibrate.texts import SELF
from ternarize.files.metadata import RANS
from ternarize.files.names import RECORD
from ternarize.measure.documents import DEFAULT
from ternarize.measure.report import inspect
from ternarize.plans.recipe import GROUP_SIZE, KEEP, Recipe
from ternarize.plans.recipe_files import read_recipe
from ternarize.sources.fetch import split_id
from ternarize.sources.origin import inherit
from ternarize.sources.packed import check_record, open_packed
from ternarize.version import __version__

MARK = "<!-- ternarize wrote the text above (sha256 "
MARK_END = "). Once it is edited, no push replaces it. -->"
UNNAMED = "SOURCE"  # in commands, where the source's name is not known
MEASURES = {
    "perplexity": "perplexity",
    "source_perplexity": "perplexity of the source",
    "perplexity_ratio": "ratio of the two",
    "kl_divergence": "KL divergence from the source, nats per token",
    "top1_agreement": "top-1 agreement with the source",
    "cosine": "cosine similarity with the source's embeddings",
}


def is_generated(text: str) -> bool:
    """Whether a card is as `make_card` wrote it; False for any that a person has edited."""
    body, mark, rest = text.replace("\r\n", "\n").rpartition(MARK)
    return bool(mark) and rest.strip() == _text_digest(body) + MARK_END


def marked(body: str) -> str:
    """A card with the line that tells it from one that a person has edited."""
    return body + MARK + _text_digest(body) + MARK_END + "\n"


def _text_digest(body: str) -> str:
    return hashlib.sha256(body.encode("utf-8")).hexdigest()


def make_card(
    directory: str | Path, where: str, *, base_model: str | None = None, shim: bool = False
) -> str:
    """The model card of a packed checkpoint, as text.

    directory   of the packed checkpoint
    where       what people will load it by: user/name, or user/name@revision
    base_model  Hub id of the source; None: as on record, if it came from the Hub
    shim        whether the checkpoint carries the code that makes transformers find ternarize

    What the record does not say is left out or said to be unknown. Raises FormatError as `inspect`.
    """
    from huggingface_hub import ModelCardData  # slow to import

    packed, records = open_packed(directory)
    report = inspect(directory)
    record = check_record(packed, records) or {}
    source = _table_of(record, "source")
    hub, inherited = _hub(source), inherit(_table_of(source, "card"))
    base_model = base_model or hub.get("id")
    data: dict[str, Any] = {
        **inherited,  # first: what follows wins
        **({"base_model": base_model, "base_model_relation": "quantized"} if base_model else {}),
        "library_name": "transformers",
        "tags": ["ternarize", "ternary", "1.58-bit"],
    }
    name = where.partition("@")[0].rpartition("/")[2]
    coded = [each.coded for each in records.values() if each.kind == "ternary"]
    parts = [
        "---\n" + ModelCardData(**data).to_yaml() + "\n---",
        f"# {name}",
        _introduction(report, base_model, coded),
        _figures(report),
        "## How it was made",
        *_how(record, hub, where, any(coded)),
        "## How to load it",
        *_loading(where, (packed.config or {}).get("architectures"), shim),
        "## Licence",
        _licence(inherited),
    ]
    return marked("\n\n".join(parts) + "\n\n")


def _table_of(table: dict[str, Any], key: str) -> dict[str, Any]:
    """The table under a key of the record, empty if there is none: anything may be there."""
    value = table.get(key)
    return value if isinstance(value, dict) else {}


def _hub(source: dict[str, Any]) -> dict[str, str]:
    """Id and commit of a source of the Hub, as on record; empty where they cannot be such."""
    hub = _table_of(source, "hub")
    name, commit = str(hub.get("id")), str(hub.get("commit"))
    good = split_id(name) == (name, None) and re.fullmatch(r"[0-9a-f]{40}", commit)
    return {"id": name, "commit": commit} if hub and good else {}


def _introduction(report: dict[str, Any], base_model: str | None, coded: list[bool]) -> str:
    totals = report["totals"]
    of = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "its source"
    packed = "packed five to a byte"
    if any(coded):
        some = "" if all(coded) else f" in {sum(coded)} of {len(coded)} tensors"
        packed += f", and entropy-coded (rANS){some}"
    return (
        f"{of} with ternary weights: {totals['ternary_parameters']:,} of its "
        f"{totals['parameters']:,} parameters are -1, 0 or +1 times a scale, {packed}. "
        "(Counters that take each byte for a parameter show fewer.) Made with ternarize."
    )


def _figures(report: dict[str, Any]) -> str:
    totals = report["totals"]
    rows = [
        ("parameters", f"{totals['parameters']:,}"),
        ("of them ternary", f"{totals['ternary_parameters']:,}"),
    ]
    for codec in ("int8", "int4"):
        if totals[f"{codec}_parameters"]:
            rows.append((f"in {codec}", f"{totals[f'{codec}_parameters']:,}"))
    rows.append(("size", f"{totals['file_bytes'] / 1e6:,.2f} MB"))
    if totals["source_bytes"]:
        source = f"{totals['source_bytes'] / 1e6:,.2f} MB"
        rows.append(("size of the source", f"{source}, {totals['ratio']:.2f} times as much"))
    if totals["bits_per_parameter"]:
        rows.append(
            ("bits per parameter of the whole model", f"{totals['bits_per_parameter']:.3f}")
        )
    if totals["ternary_bpw"]:
        rows.append(("bits per ternary weight, scales included", f"{totals['ternary_bpw']:.3f}"))
    if totals["sparsity"] is not None:
        rows.append(("zeros among them", f"{totals['sparsity']:.1%}"))
    if totals["relative_error"] is not None:
        rows.append(("relative squared error of the weights", f"{totals['relative_error']:.4f}"))
    measured = report["training"] or report["calibration"] or {}
    quality = measured.get("quality", {})
    for key, text in MEASURES.items():
        value, error = (quality.get(key, {}).get(each) for each in ("value", "standard_error"))
        if value is not None:
            rows.append((text, f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")))
    lines = ["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)]
    if quality:
        kind, data = "calibration", measured.get("data") or measured
        if report["training"]:
            kind = "training"
        lines += [
            "",
            f"Measured on {data.get('report_samples')} held-out samples of the {kind}'s data "
            "(± standard error).",
        ]
    else:
        lines += ["", "How well it does its work, against its source, is not on record."]
    return "\n".join(lines)


def _how(record: dict[str, Any], hub: dict[str, str], where: str, coded: bool) -> list[str]:
    if not record:
        return [f"The checkpoint has no record of its conversion ({RECORD})."]
    source = f"{hub['id']}@{hub['commit']}" if hub else UNNAMED
    version = str(_table_of(record, "tool").get("version"))
    if not re.fullmatch(r"\d[\w.+-]*", version):
        version = "(of unknown version)"
    if _from_seed(record):
        return [f"With ternarize {version}, from a seed alone.", *_moved_by(record)]
    recipe, here = _with_data(read_recipe(record), record)
    parts = [
        f"With ternarize {version}:",
        _code("console", command_of(recipe, source, _was_ternary(record))),
    ]
    if here:
        parts.append(
            f"({here} names what was on the disk of whoever made it; the digest of its samples is "
            "on record.)"
        )
    if "steps" in record:
        parts += _moved_by(record)
    if coded and recipe.codec != RANS:
        parts += ["Then, the same tensors in fewer bytes:"]
        parts += [_code("console", "ternarize recode packed smaller")]
    if "steps" not in record:
        parts += [
            f"`{RECORD}` is the record of it, tensor by tensor. To check it against the source, "
            "byte by byte:",
            _code("console", shlex.join(["ternarize", "verify", where, "--source", source])),
        ]
    if _table_of(_table_of(record, "source"), "imported"):
        parts.append("The source was ternary already, and is packed without loss.")
    if not hub:
        parts.append(f"({UNNAMED} was a directory, whose name is not on record.)")
    return parts


def _with_data(recipe: Recipe, record: dict[str, Any]) -> tuple[Recipe, str]:
    """The recipe with its data as on record, which says at what commit the Hub gave them.

    And the options that name none of the Hub's, in words.
    """
    data = _table_of(_table_of(record, "calibration"), "data").get("dataset")
    texts: Any = _table_of(record, "training").get("texts")
    here = []
    if recipe.calibrate is not None and isinstance(data, str):
        recipe = replace(recipe, calibrate=replace(recipe.calibrate, dataset=data))
        here += [] if _can_be_had(data) else ["`--dataset`"]
    named = isinstance(texts, list) and all(isinstance(each, str) for each in texts)
    if recipe.train is not None and recipe.train.texts and named:
        recipe = replace(recipe, train=replace(recipe.train, texts=tuple(texts)))
        here += [] if all(map(_can_be_had, texts)) else ["`--texts`"]
    return recipe, " or ".join(here)


def _can_be_had(data: str) -> bool:
    """Whether texts, or a share of a mixture, are a data set of the Hub or come with ternarize."""
    return re.fullmatch(rf"({SELF}|{DEFAULT}|.*@[0-9a-f]{{40}})(=[\d.e+-]+)?", data) is not None


def _from_seed(record: dict[str, Any]) -> bool:
    """Whether its weights were never others than a seed's and what steps have made of them."""
    return any("seed" in said for said in _journals(record))


def _moved_by(record: dict[str, Any]) -> list[str]:
    """By which journals its trits and scales were moved afterwards, as the record says."""
    parts = [_journal_of(said) for said in _journals(record)][::-1]
    return [*parts, f"`{RECORD}` is the record of it, tensor by tensor."]


def _journals(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the record says of journals that were replayed, the last one first."""
    said = _table_of(record, "steps")
    while said:
        yield said
        said = _table_of(said, "before")


def _journal_of(said: dict[str, Any]) -> str:
    journal = _table_of(said, "journal")
    count, upto, sha = said.get("steps"), journal.get("upto"), str(journal.get("sha256"))
    many = f"{count:,} steps" if isinstance(count, int) else "steps"
    before = f", those below {upto:,}," if isinstance(upto, int) else ""
    of = f"with SHA-256 {sha}" if re.fullmatch(r"[0-9a-f]{64}", sha) else "that is not on record"
    seed = str(said.get("seed"))
    if re.fullmatch(r"[0-9a-f]{16}", seed):
        return (
            f"Its weights are what {many}{before} of a journal {of} make of the random ones that "
            f"the seed {seed} gives (`ternarize steps replay`)."
        )
    return (
        f"Then {many}{before} of a journal {of} were applied (`ternarize steps replay`): the "
        "weights are no longer those that the source gives."
    )


def _was_ternary(record: dict[str, Any]) -> bool:
    """Whether weights of the source were ternary already."""
    rows = _table_of(record, "tensors").values()
    return bool(_table_of(_table_of(record, "source"), "imported")) or any(
        isinstance(row, dict) and row.get("method") == "lossless" for row in rows
    )


def command_of(recipe: Recipe, source: str, was_ternary: bool = False) -> str:
    """The command line of a conversion by this recipe, into `packed`.

    was_ternary  the source has weights that are ternary already; the defaults are then what it has,
                 so that all options are written
    """
    words = ["ternarize", "convert", source, "packed"]
    default = Recipe(group_size=GROUP_SIZE, activations="none", head=KEEP, embeddings=KEEP)
    words += ["--method", recipe.method]
    for name in ("group_size", "zeros", "scale_bits", "dtype", "activations", "head", "embeddings"):
        value = getattr(recipe, name)
        told = was_ternary or (name == "group_size" and recipe.engine is not None)
        if value is not None and (told or value != getattr(default, name)):
            words += [_option(name), str(value)]
    if recipe.codec != default.codec:
        words += [_option("codec"), recipe.codec]
    words += [] if recipe.engine is None else ["--for", recipe.engine]
    words += ["--fold"] if recipe.fold else []
    for name in ("keep", "include", "planes"):
        for glob in getattr(recipe, name):
            words += [_option(name), glob]
    if recipe.calibrate is not None:
        usual = type(recipe.calibrate)()
        words += ["--dataset", recipe.calibrate.dataset]
        for name, value in vars(recipe.calibrate).items():
            if name != "dataset" and value != getattr(usual, name):
                words += [_option(name), str(value)]
    if recipe.train is not None:
        words[1] = "train"
        usual_training = type(recipe.train)(steps=1)
        for name, value in vars(recipe.train).items():
            if name == "texts":
                words += [part for each in value for part in ("--texts", each)]
            elif _option(name) in words:
                continue  # the calibration's seed or column, which is the training's
            elif value is True:
                words += [_option(name)]
            elif value is not None and (name == "steps" or value != getattr(usual_training, name)):
                words += [_option(name), str(value)]
    return shlex.join(words)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _loading(where: str, architectures: Any, shim: bool) -> list[str]:
    repo, _, revision = where.partition("@")
    arguments = json.dumps(repo) + (f", revision={json.dumps(revision)}" if revision else "")
    listed = isinstance(architectures, list) and architectures  # as in any config.json
    model_class = str(architectures[0]) if listed else "AutoModel"
    if not re.fullmatch(r"[A-Za-z_]\w*", model_class):
        model_class = "AutoModel"
    causal = model_class.endswith("ForCausalLM")
    if causal:
        model_class = "AutoModelForCausalLM"
    line = f"verify {shlex.quote(where)}"
    if causal:
        line = f"generate {shlex.quote(where)} --prompt 'Once upon a time'"
    parts = [
        f"With ternarize {__version__} or newer installed, on the command line:",
        _code("console", "ternarize " + line),
        "in Python:",
        _code("python", f"import ternarize\n\nmodel = ternarize.load({json.dumps(where)})"),
        "or through transformers:",
        _code(
            "python",
            "import ternarize  # transformers can then read packed weights\n"
            f"from transformers import {model_class}\n\n"
            f"model = {model_class}.from_pretrained({arguments})",
        ),
    ]
    if shim:
        parts += [
            "Programs that do not import ternarize find it through the code in this repository:",
            _code(
                "python",
                f"from transformers import {model_class}\n\n"
                f"model = {model_class}.from_pretrained({arguments}, trust_remote_code=True)",
            ),
        ]
    return parts


def _code(kind: str, text: str) -> str:
    inside = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, inside + 1)  # longer than any in the text, which would end it
    return f"{fence}{kind}\n{text}\n{fence}"


def _licence(inherited: dict[str, Any]) -> str:
    licence = inherited.get("license_name") or inherited.get("license")
    if licence is None:
        return (
            "The source's licence is not on record. Whatever it asks for holds for these weights."
        )
    licence = ", ".join(licence) if isinstance(licence, list) else licence
    link = inherited.get("license_link")
    return f"That of the source: {licence}" + (f" ({link})." if link else ".")
