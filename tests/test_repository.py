"""What lies beside the package: licence, citation, security, container."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

import vitkd_cli

ROOT = Path(__file__).resolve().parents[1]


def test_the_licence_is_on_the_first_screen():
    first = "\n".join((ROOT / "README.md").read_text().splitlines()[:24])
    assert "[Apache-2.0](LICENSE)" in first


def test_the_citation_is_of_this_version_and_of_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert {"title", "message", "authors"} <= cited.keys()
    assert cited["version"] == vitkd_cli.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cited["license"] == project["license"]
    [paper] = cited["references"]
    assert paper["url"] == project["urls"]["Paper"]
    assert len(paper["authors"]) == 6


def test_the_container_installs_extras_that_exist():
    text = (ROOT / "Dockerfile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [named] = re.findall(r'"/src\[([\w,]+)\]"', text)
    assert set(named.split(",")) <= extras.keys()
    assert "ARG TORCH_INDEX" in text


def test_security_names_the_page_on_trust():
    assert "docs/trust.md" in (ROOT / "SECURITY.md").read_text()
