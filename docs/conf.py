"""How Sphinx builds these pages: `make docs`, with every warning an error and no network."""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import api_pages  # noqa: E402
import docstrings  # noqa: E402

from purify_fast import __version__  # noqa: E402

project = "purify_fast"
release = version = __version__
copyright = "the purify_fast developers, MIT licence"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
# what is written between single backticks in a docstring is code
default_role = "code"

# warnings are written as on GitHub: > [!WARNING]
myst_enable_extensions = ["colon_fence", "alert"]
# headings can be linked as on GitHub: [text](page.md#the-heading)
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"purify_fast {__version__}"
html_static_path = ["static"]
html_css_files = ["purify_fast.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#b4400a", "color-brand-content": "#b4400a"},
    "dark_css_variables": {"color-brand-primary": "#ff9d66", "color-brand-content": "#ff9d66"},
}
# a release writes the address of its repository in place of ADDRESS
repository = re.search(r'^Repository = "(.*)"', (HERE.parent / "pyproject.toml").read_text(), re.M)[1]
if "ADDRESS" not in repository:
    html_theme_options |= {"source_repository": f"{repository}/", "source_branch": "main", "source_directory": "docs/"}
# the pages are read from a disk too: nothing is asked of another server
html_show_sphinx = False
html_copy_source = False


def write_generated_pages(app):
    """The reference of the API, the tables of every measured row, and the project's own files."""
    api_pages.write(HERE / "api")
    api_pages.write_project(HERE / "generated")


def link_to_generated(app, name, source):
    """Links to files of the repository lead to the pages of the site that hold the same."""
    for file in (*api_pages.RESULTS, *api_pages.PROJECT):
        source[0] = source[0].replace(f"](../{file}.md)", f"](generated/{api_pages.page_of(file)}.md)")


def name_commands(app, name, source):
    """Blocks without a language are commands, which look different from Python and from what programs print."""
    # the lines between two fences, and those outside, take turns
    parts = re.split(r"^(```.*)$", source[0], flags=re.M)
    parts[1::4] = ["```bash" if fence == "```" else fence for fence in parts[1::4]]
    source[0] = "".join(parts)


def keep_errors_beside_values(app, name, source):
    """In a table, the two numbers of "84.9 ± 0.4" stay in one line."""
    lines = source[0].split("\n")
    source[0] = "\n".join(line.replace(" ± ", "\u00a0±\u00a0") if line.startswith("|") else line for line in lines)


def list_every_page(app, name, source):
    """A page that the front page does not list yet stands beside the other results."""
    if name == "index":
        listed = source[0].splitlines()
        others = [page.stem for page in sorted(HERE.glob("*.md")) if page.stem not in ("index", *listed)]
        source[0] = source[0].replace("\nreliability\n", "\n".join(["", "reliability", *others, ""]))


def setup(app):
    """Called by Sphinx."""
    app.connect("builder-inited", write_generated_pages)
    app.connect("source-read", link_to_generated)
    app.connect("source-read", list_every_page)
    app.connect("source-read", keep_errors_beside_values)
    app.connect("source-read", name_commands)
    # before napoleon, which comes at 500, and after it
    app.connect("autodoc-process-docstring", docstrings.keep_returns_whole, priority=400)
    app.connect("autodoc-process-docstring", docstrings.to_rst)
