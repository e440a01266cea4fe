"""The site, for Sphinx (`make site`): every document where it lies, so that its links hold in both.

Its source is the folder above, and README.md its first page.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONTENTS = """
```{toctree}
:hidden:

docs/convert
docs/modules
docs/images
docs/evaluate
docs/speech
docs/calibration
docs/training
docs/machines
docs/formats
docs/imports
docs/exports
docs/serving
docs/speed
docs/steps
docs/patches
docs/hub
docs/fine-tuning
docs/errors
docs/trust
docs/house
CLI
examples/README
benchmarks/RESULTS
benchmarks/LOG
CONTRIBUTING
AGENTS
SECURITY
CHANGELOG
```
"""
BENEATH = {"docs/formats": "../formats/*", "benchmarks/RESULTS": "results/*"}

project = "ternarize"
extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "formats/*.md", "examples/*.md", "benchmarks/**.md"]
exclude_patterns = ["build", ".*"]
myst_heading_anchors = 4

# Of what comes with Sphinx: no fonts, no scripts from elsewhere.
html_theme = "alabaster"
html_theme_options = {
    "description": "Ternary checkpoints that run in transformers",
    "fixed_sidebar": True,
    "font_family": "sans-serif",
    "page_width": "70rem",
}
html_additional_pages = {"index": "to_readme.html"}
templates_path = ["."]
html_copy_source = False
html_show_copyright = False


def prepare(app: Any, page: str, source: list[str]) -> None:
    """Puts the list of pages behind some texts. Links to folders, which no site has, are text."""
    if page == root_doc:
        source[0] += CONTENTS
    elif page in BENEATH:
        source[0] += f"\n```{{toctree}}\n:hidden:\n:glob:\n\n{BENEATH[page]}\n```\n"

    def text_of(link: re.Match[str]) -> str:
        return link[1] if (ROOT / page).parent.joinpath(link[2]).is_dir() else link[0]

    source[0] = re.sub(r"\[([^]]+)\]\(([^)#:]+)\)", text_of, source[0])


def setup(app: Any) -> None:
    """What Sphinx calls."""
    app.connect("source-read", prepare)
