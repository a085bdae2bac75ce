"""Sphinx configuration. Reference pages are generated from the code at every build: they are never out of date."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import generate  # noqa: E402 - lies beside this file

import llmbuild  # noqa: E402

project = "llmbuild"
author = "the llmbuild authors"
release = version = llmbuild.__version__
extensions = ["myst_parser", "sphinx_click"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "llmbuild"
myst_heading_anchors = 3
nitpicky = True
suppress_warnings = ["misc.highlighting_failure"]

generate.write(HERE / "reference" / "generated")
