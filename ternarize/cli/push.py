"""`ternarize push`."""

from pathlib import Path
from typing import Annotated, Any

from rich.table import Table

from ternarize.cli.options import AsJson, Debug, Quiet
from ternarize.cli.terminal import advise, in_bytes, print_json, progress_bar, shown, stdout

ABOUT_CARD = {
    "own": "README.md is your own: sent as it is",
    "kept": "README.md on the Hub has been edited: left as it is, without the figures of these "
    "weights",
}


def push_command(
    model: Annotated[Path, "Packed checkpoint: directory; or journal of steps: file."],
    repo: Annotated[str, "Where to: user/name on the Hub."],
    *,
    private: Annotated[bool, "Make it private."] = False,
    revision: Annotated[str | None, "Branch to commit to; made where there is none."] = None,
    create_pr: Annotated[bool, "Open a pull request instead."] = False,
    commit_message: Annotated[str | None, "Title of the commit."] = None,
    base_model: Annotated[
        str | None,
        "Hub id of the source, for the card; default: as on record. Of a journal its base.",
    ] = None,
    shim: Annotated[
        bool, "Add code by which transformers finds ternarize with trust_remote_code=True."
    ] = False,
    token: Annotated[str | None, "Of the Hub; default: HF_TOKEN, or who is logged in."] = None,
    dry_run: Annotated[bool, "Print what would be sent; send nothing."] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Publish a packed checkpoint or a journal on the Hub with a model card, in one commit.

    A checkpoint is verified first. What was uploaded before an interruption is not sent again. A
    README.md that somebody has edited, here or on the Hub, is left as it is.

    Example: ternarize push packed user/name --private --dry-run
    """
    from ternarize.publish.hub import push

    with progress_bar(quiet) as update:
        result = push(
            model,
            repo,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            token=token,
            base_model=base_model,
            shim=shim,
            dry_run=dry_run,
            progress=update,
        )
    if as_json:
        print_json(result)
        return
    if dry_run:
        _show_files(result, repo)
    else:
        for path in result["removed"]:
            print(f"removed: {path}")
        print(result["pull_request"] or result["url"])
    if not quiet and result["card"] in ABOUT_CARD:
        advise(ABOUT_CARD[result["card"]])


def _show_files(result: dict[str, Any], repo: str) -> None:
    grid = Table("file", "size", box=None)
    for path, size in result["files"].items():
        grid.add_row(shown(path), in_bytes(size))
    stdout().print(grid)
    print(f"\n{len(result['files'])} files, {in_bytes(sum(result['files'].values()))}, to {repo}")
    if result["card_text"] is not None:
        print(f"\nREADME.md:\n\n{result['card_text']}", end="")
