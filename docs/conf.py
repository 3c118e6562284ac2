"""The site: ``make docs``. Sources are the Markdown files of the whole repository, so that links between them lead to
the same places here and where the files are read as they lie."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import askew_kernels  # noqa: E402

project = "askew_kernels"
author = "the authors of askew_kernels"
version = release = askew_kernels.__version__

root_doc = "docs/index"
include_patterns = ["docs/**.md", "benchmarks/**.md", "*.md"]
exclude_patterns = [
    ".*",
    "build",
    "*-results",
    "*.egg-info",
    "askew_kernels",
    "csrc",
    "experiments",
    "tests",
    "examples",
]

extensions = ["myst_parser", "sphinx.ext.autodoc", "site_parts"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist", "attrs_block"]
myst_heading_anchors = 4
html_math_renderer = "mathml"  # of site_parts: made here, no script and no network where the page is read

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # what torch says of its own methods is in torch's reference
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
add_module_names = False

html_theme = "furo"
html_title = f"askew_kernels {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_root"]  # index.html of the folder: leads to docs/index.html
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
