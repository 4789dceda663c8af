"""Writes the golden manifest and the published schema; run it and review the difference.

python tests/golden/make_golden.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import builders_manifest  # noqa: E402
from partition.manifest_file import canonical_json, json_schema, schema_text  # noqa: E402

MANIFEST = ROOT / "tests/golden/manifest.json"
SCHEMA = ROOT / "docs/manifest.schema.json"


def contents() -> dict[Path, bytes]:
    """Return what the files should hold."""
    manifest = builders_manifest.manifest(builders_manifest.two_hosts())
    return {
        MANIFEST: canonical_json(manifest),
        SCHEMA: schema_text(json_schema()).encode(),
    }


def main() -> None:
    for path, content in contents().items():
        path.write_bytes(content)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
