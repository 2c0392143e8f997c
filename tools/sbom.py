"""The bill of materials of what is in the package and was made by others: CycloneDX 1.6, as JSON. setup.py puts it into sdist and wheel.

It is read from what is there: the files of unimed/sample/assets and the NOTICE beside them. Standard library only, for setup.py.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

ASSETS = Path("unimed", "sample", "assets")
TEXTS = ("NOTICE", "LICENSE")
OURS = {"license": {"id": "Apache-2.0"}}


def _digest(path: Path) -> dict[str, str]:
    return {"alg": "SHA-256", "content": hashlib.sha256(path.read_bytes()).hexdigest()}


def _source(notice: str) -> tuple[dict[str, Any], str]:
    """Where the files come from, and the licence of all of them."""
    found = re.search(r"^From: (\S+) (\S+),.*?sha256\s+([0-9a-f]{64}).*?Licence: ([\w.-]+) ", notice, flags=re.DOTALL | re.MULTILINE)
    if not found:
        raise ValueError(f"{ASSETS / 'NOTICE'}: it must say: From: NAME VERSION, ... sha256 DIGEST ... Licence: SPDX-ID (...)")
    name, version, digest, licence = found.groups()
    purl = f"pkg:pypi/{name.lower()}@{version}"
    hashes = [{"alg": "SHA-256", "content": digest}]
    return {"type": "library", "name": name, "version": version, "purl": purl, "hashes": hashes}, licence


def _places(notice: str) -> dict[str, str]:
    """Where the files of NOTICE's table were there."""
    return dict(re.findall(r"^ {4}(\S+\.\S+) +(\S+) +.+$", notice, flags=re.MULTILINE))


def document(root: Path, version: str) -> dict[str, Any]:
    """The bill of the package whose sources lie in ``root``. Files of NOTICE's table come from there; others that it names are ours; those
    that it does not name have no licence here."""
    notice = (root / ASSETS / "NOTICE").read_text(encoding="utf-8")
    source, licence = _source(notice)
    places = _places(notice)
    components = []
    for path in sorted((root / ASSETS).rglob("*")):
        name = path.relative_to(root / ASSETS).as_posix()
        if not path.is_file() or name in TEXTS:
            continue
        one: dict[str, Any] = {"type": "data", "name": (ASSETS / name).as_posix(), "hashes": [_digest(path)]}
        if name in places:
            one["licenses"] = [{"license": {"id": licence}}]
            one["pedigree"] = {"ancestors": [source], "notes": f"from {places[name]}; what was changed: {(ASSETS / 'NOTICE').as_posix()}"}
        elif name in notice:
            one["licenses"] = [OURS]
        components.append(one)
    package = {
        "type": "library",
        "name": "cmoe-kernels",
        "version": version,
        "purl": f"pkg:pypi/cmoe-kernels@{version}",
        "licenses": [OURS],
    }
    return {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "metadata": {"component": package}, "components": components}


def text(root: Path, version: str) -> str:
    return json.dumps(document(root, version), indent=1) + "\n"
